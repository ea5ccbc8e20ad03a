"""How a link begins: over a Unix socket the engine hands out the segment and the sockets that both sides sleep on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from array import array
from collections.abc import Callable
from typing import NamedTuple

from blockdex.ring.layout import GREETING_STRUCT, HELLO_STRUCT, MAGIC, MAX_REFUSAL_BYTES, MAX_TENANT_BYTES, VERSION
from blockdex.ring.segment import RingError, Segment, Sizes

_CREDENTIALS = struct.Struct("=iII")
_SO_PEERGROUPS, _MOST_GROUPS = 59, 256
_WAKE_UPS = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_HELLO_SECONDS = 5.0
"""How long the engine waits for what a client says first."""


class Handles(NamedTuple):
    """What one side of a link holds.

    Attributes:
        segment: the shared memory.
        engine_bell: this side's end of the datagram pair that the engine sleeps on; below 0: nobody rings.
        client_bell: this side's end of the pair that the client sleeps on; below 0 likewise.
        tenant: of all its requests; without one each names its own.
    """

    segment: Segment
    engine_bell: int
    client_bell: int
    tenant: str = ""

    def close(self) -> None:
        """Gives the files back; the memory stays as long as somebody looks at it."""
        for fd in (self.segment.fd, self.engine_bell, self.client_bell):
            if fd >= 0:
                os.close(fd)


class Peer(NamedTuple):
    """Who is at the other end of a Unix socket, as the kernel says.

    Attributes:
        user: number of its user.
        groups: of its process, its main one first.
        process: its number; 0 where it is in another namespace.
    """

    user: int
    groups: tuple[int, ...]
    process: int = 0

    @classmethod
    def of(cls, connected: socket.socket) -> Peer:
        """Of who has connected."""
        process, user, group = _CREDENTIALS.unpack(
            connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        others = array("I")
        with contextlib.suppress(OSError):  # more than there is room for: the main one counts alone
            others.frombytes(connected.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * others.itemsize))
        return cls(user, (group, *others), process)


TenantOf = Callable[[str], str]
"""Whose the requests of a link are that names this tenant, or none."""


def listen() -> socket.socket:
    """A socket for frontends to connect to. The kernel chose its name, which is no file and goes with the socket."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(b"")
    listening.listen()
    listening.setblocking(False)
    return listening


def new_link(sizes: Sizes, epoch: int, tenant: str = "") -> tuple[Handles, Handles]:
    """Both sides of a new link: the engine's, and the client's.

    Raises:
        OSError: there is no file or memory left for it.
    """
    with contextlib.ExitStack() as unless_made:

        def wake_ups() -> tuple[int, int]:
            ends = socket.socketpair(socket.AF_UNIX, _WAKE_UPS)
            for end in ends:
                unless_made.callback(os.close, end.fileno())
            return ends[0].detach(), ends[1].detach()

        segment = Segment.create(sizes, epoch)
        unless_made.callback(os.close, segment.fd)
        bells = [wake_ups() for _ in range(2)]
        again = os.dup(segment.fd)
        unless_made.callback(os.close, again)
        engine = Handles(segment, bells[0][0], bells[1][0], tenant)
        client = Handles(Segment(again), bells[0][1], bells[1][1], tenant)
        unless_made.pop_all()
    return engine, client


async def offer(connected: socket.socket, sizes: Sizes, epoch: int, tenant_of: TenantOf) -> Handles:
    """Hands a new segment and two wake-up sockets to who has connected and said hello.

    Args:
        connected: to who has connected.
        sizes: of the segment.
        epoch: the cache's.
        tenant_of: says whose all requests of the link are, of the tenant that is named in the hello or empty; empty
            where each request names its own. What it raises this raises.

    Raises:
        RingError: it speaks another language.
        TimeoutError: it says nothing.
        OSError: it is gone, or there is no file or memory left for it.
    """
    async with asyncio.timeout(_HELLO_SECONDS):
        named = await _hear_hello(connected)
    engine, client = new_link(sizes, epoch, tenant_of(named))
    try:
        files = [client.segment.fd, client.engine_bell, client.client_bell]
        socket.send_fds(connected, [GREETING_STRUCT.pack(MAGIC, VERSION, 0)], files)
    except BaseException:
        engine.close()
        raise
    finally:
        client.close()
    return engine


def refuse(connected: socket.socket, why: str) -> None:
    """Greets with why there is no link, as far as that is read."""
    text = why.encode()[:MAX_REFUSAL_BYTES]
    with contextlib.suppress(OSError):
        connected.send(GREETING_STRUCT.pack(MAGIC, VERSION, len(text)) + text)


async def _hear_hello(connected: socket.socket) -> str:
    """The tenant that a client names."""
    magic, version, tenant_bytes = HELLO_STRUCT.unpack(await _exactly(connected, HELLO_STRUCT.size))
    if magic == MAGIC and version != VERSION:
        # So that it can say why it does not come in.
        connected.send(GREETING_STRUCT.pack(MAGIC, VERSION, 0))
    if (magic, version) != (MAGIC, VERSION):
        raise RingError(f"link: expected magic {MAGIC:x}, version {VERSION}, got {magic:x}, {version}")
    if tenant_bytes > MAX_TENANT_BYTES:
        raise RingError(f"link: a tenant has at most {MAX_TENANT_BYTES} bytes, got {tenant_bytes}")
    return (await _exactly(connected, tenant_bytes)).decode("ascii", "replace")


async def _exactly(connected: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        more = await asyncio.get_running_loop().sock_recv(connected, size - len(received))
        if not more:
            raise ConnectionResetError("link: the client went away")
        received += more
    return received


async def take(connected: socket.socket, tenant: str = "") -> Handles:
    """Says hello, and waits for what the engine hands out; however long it takes to start.

    Args:
        connected: to the engine; it does not block.
        tenant: of all requests; without one each names its own.

    Raises:
        ConnectionError: it went away first.
        RingError: it refuses, or speaks another language.
    """
    name = tenant.encode("ascii")
    hello = HELLO_STRUCT.pack(MAGIC, VERSION, len(name)) + name
    with contextlib.suppress(BrokenPipeError):  # what it said last is read below
        await asyncio.get_running_loop().sock_sendall(connected, hello)
    await _readable(connected)
    said, fds = b"", list[int]()
    with contextlib.suppress(ConnectionResetError):
        said, fds, _, _ = socket.recv_fds(connected, GREETING_STRUCT.size + MAX_REFUSAL_BYTES, 3)
    if not said:
        raise ConnectionResetError("link: the engine went away")
    try:
        magic, version, refused = GREETING_STRUCT.unpack(
            said[: GREETING_STRUCT.size].ljust(GREETING_STRUCT.size, b"\0")
        )
        if (magic, version) == (MAGIC, VERSION) and refused:
            raise RingError(f"link: {said[GREETING_STRUCT.size :].decode('utf-8', 'replace')}")
        if (magic, version, len(fds)) != (MAGIC, VERSION, 3):
            raise RingError(
                f"link: expected magic {MAGIC:x}, version {VERSION} and 3 files, got {magic:x}, {version}, {len(fds)}"
            )
        memory, engine_bell, client_bell = fds
        return Handles(Segment(memory), engine_bell, client_bell, tenant)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def silence(bell: int) -> None:
    """Takes a wake-up off this side's end of a pair."""
    with contextlib.suppress(BlockingIOError):
        os.read(bell, 1)


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
