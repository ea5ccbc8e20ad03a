"""How a link begins: over a Unix socket the engine hands out the segment and the eventfds that both sides sleep on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import NamedTuple

from blockdex.ring.layout import MAGIC
from blockdex.ring.segment import RingError, Segment, Sizes

_GREETING = MAGIC.to_bytes(8, "little")
_CREDENTIALS = struct.Struct("=iII")


class Handles(NamedTuple):
    """What both sides of a link hold.

    Attributes:
        segment: the shared memory.
        engine_bell: eventfd that the engine sleeps on.
        client_bell: eventfd that the frontend sleeps on.
    """

    segment: Segment
    engine_bell: int
    client_bell: int

    def close(self) -> None:
        """Gives the files back; the memory stays as long as somebody looks at it."""
        for fd in (self.segment.fd, self.engine_bell, self.client_bell):
            os.close(fd)


def listen() -> socket.socket:
    """A socket for frontends to connect to. The kernel chose its name, which is no file and goes with the socket."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(b"")
    listening.listen()
    listening.setblocking(False)
    return listening


def offer(connected: socket.socket, sizes: Sizes, epoch: int) -> Handles:
    """Hands a new segment and two new eventfds to who has connected.

    Raises:
        RingError: it is the process of another user.
        OSError: it is gone, or there is no file or memory left for it.
    """
    # Before anything is made for it: anybody may connect.
    _, user, _ = _CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if user not in (0, os.getuid()):
        raise RingError(f"link: user {user} may not connect, {os.getuid()} may")
    with contextlib.ExitStack() as unless_sent:
        segment = Segment.create(sizes, epoch)
        unless_sent.callback(os.close, segment.fd)
        engine_bell, client_bell = (_bell(unless_sent) for _ in range(2))
        socket.send_fds(connected, [_GREETING], [segment.fd, engine_bell, client_bell])
        unless_sent.pop_all()
    return Handles(segment, engine_bell, client_bell)


def _bell(closing: contextlib.ExitStack) -> int:
    bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    closing.callback(os.close, bell)
    return bell


async def take(connected: socket.socket) -> Handles:
    """Waits for what the engine hands out; however long it takes to start.

    Raises:
        ConnectionError: it went away first.
        RingError: it speaks another language.
    """
    await _readable(connected)
    greeting, fds, _, _ = socket.recv_fds(connected, len(_GREETING), 3)
    if not greeting:
        raise ConnectionResetError("link: the engine went away")
    try:
        if greeting != _GREETING or len(fds) != 3:
            raise RingError(f"link: expected {_GREETING!r} and 3 files, got {greeting!r} and {len(fds)}")
        memory, engine_bell, client_bell = fds
        return Handles(Segment(memory), engine_bell, client_bell)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


async def _readable(connected: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def is_ready() -> None:
        loop.remove_reader(connected)
        ready.set_result(None)

    loop.add_reader(connected, is_ready)
    try:
        await ready
    finally:
        loop.remove_reader(connected)
