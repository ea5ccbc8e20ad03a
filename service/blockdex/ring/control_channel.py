"""What two processes say to each other beside the ring: JSON objects on a socket, each with its length before it.

For what is rare and of any length: what the engine is, holds and counts, and what a supervisor tells its children.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import socket
from array import array
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from blockdex.contract.errors import Reason, UnavailableError
from blockdex.faults import strikes

Words = dict[str, Any]

LENGTH_BYTES = 4
_LONGEST = 1 << 26
_MOST_FILES = 4
"""That come with words which were not heard yet; the others are closed."""
_ANSWER_SECONDS = 5.0


class _FileSocket(socket.socket):
    """A connected socket that keeps the files which come with what it receives, and up to which byte they came."""

    def __init__(self, connected: socket.socket) -> None:
        super().__init__(fileno=connected.detach())
        self._received = 0
        self._files: deque[tuple[int, int]] = deque()

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """As `socket.recv`."""
        numbers = array("i")
        room = socket.CMSG_LEN(_MOST_FILES * numbers.itemsize)
        data, others, _, _ = self.recvmsg(size, room, flags | socket.MSG_CMSG_CLOEXEC)
        self._received += len(data)
        for level, kind, bytes_of_numbers in others:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(bytes_of_numbers) // numbers.itemsize * numbers.itemsize
                numbers.frombytes(bytes_of_numbers[:whole])
        # The kernel ends what it returns behind the bytes that files came with.
        self._files.extend((self._received, fd) for fd in numbers)
        while len(self._files) > _MOST_FILES:
            os.close(self._files.pop()[1])
        return data

    def take(self, position: int) -> list[int]:
        """The files that came with the bytes up to a position."""
        taken: list[int] = []
        while self._files and self._files[0][0] <= position:
            taken.append(self._files.popleft()[1])
        return taken

    def close(self) -> None:
        """As `socket.close`."""
        for _, fd in self._files:
            os.close(fd)
        self._files.clear()
        super().close()


class ControlChannel:
    """One end of a conversation, on an asyncio loop. Questions are answered in their order.

    The other end is gone when the socket is: a process that dies closes it, however it dies.

    Attributes:
        files: that came with the words heard last. They are closed when the next words are asked for.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connected: _FileSocket) -> None:
        self.files: list[int] = []
        self._connected = connected
        self._position = 0
        self._reader = reader
        self._writer = writer
        self._asked: deque[asyncio.Future[Words]] = deque()
        self._over = False

    @classmethod
    async def on(cls, connected: socket.socket) -> ControlChannel:
        """Talks on a connected socket."""
        connected.setblocking(False)
        keeping = _FileSocket(connected)
        return cls(*await asyncio.open_unix_connection(sock=keeping), keeping)

    def tell(self, words: Words) -> None:
        """Sends words, dataclasses and arrays in them as objects and lists; to nobody, once the other end is gone."""
        body = json.dumps(words, separators=(",", ":"), default=_plain).encode()
        if strikes("socket"):
            self._writer.write(len(body).to_bytes(LENGTH_BYTES, "little"))
            self._writer.transport.abort()
            return
        self._writer.write(len(body).to_bytes(LENGTH_BYTES, "little") + body)

    async def drain(self) -> None:
        """Waits until the other end has read what it was told, but for a little.

        Raises:
            TimeoutError: it does not read; the conversation is over.
            ConnectionError: it is gone.
        """
        try:
            await asyncio.wait_for(self._writer.drain(), _ANSWER_SECONDS)
        except TimeoutError:
            # Not `hang_up`, which would keep what was not read until it is.
            self._writer.transport.abort()
            raise TimeoutError(f"link: what it was told was not read within {_ANSWER_SECONDS:g} s") from None

    async def ask(self, words: Words) -> Words:
        """Sends a question and waits for its answer.

        Raises:
            UnavailableError: the other end is gone, does not answer, or failed to.
        """
        if self._over:
            raise _gone()
        answer: asyncio.Future[Words] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self.tell(words)
        try:
            return await asyncio.wait_for(asyncio.shield(answer), _ANSWER_SECONDS)
        except TimeoutError:
            answer.cancel()
            raise UnavailableError(f"engine: no answer within {_ANSWER_SECONDS:g} s", Reason.UNREACHABLE) from None

    async def heard(self) -> AsyncIterator[Words]:
        """What the other end says, but for answers, until it is gone, or has said what nobody can mean."""
        try:
            while (words := await self._next()) is not None:
                match words:
                    case {"answer": dict(answer)} if self._asked:
                        _settle(self._asked.popleft(), answer)
                    case {"failed": str(message)} if self._asked:
                        _settle(self._asked.popleft(), UnavailableError(message, Reason.UNREACHABLE))
                    case {"answer": _} | {"failed": _}:
                        return  # to what nobody has asked
                    case _:
                        yield words
        finally:
            self._close_files()
            self._over = True
            for asked in self._asked:
                _settle(asked, _gone())

    async def _next(self) -> Words | None:
        """One object; None where the other end is gone, or what it says is none."""
        self._close_files()
        try:
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
            if length > _LONGEST:
                return None
            body = await self._reader.readexactly(length)
            self._position += LENGTH_BYTES + length
            self.files = self._connected.take(self._position)
            words = json.loads(body)
        except (asyncio.IncompleteReadError, ConnectionError, ValueError, RecursionError):
            return None
        return words if isinstance(words, dict) else None

    def _close_files(self) -> None:
        for fd in self.files:
            os.close(fd)
        self.files = []

    def hang_up(self) -> None:
        """Ends the conversation: the other end is told, and so is who listens here."""
        self._writer.close()


def _settle(asked: asyncio.Future[Words], answer: Words | UnavailableError) -> None:
    if asked.done():
        return
    if isinstance(answer, UnavailableError):
        asked.set_exception(answer)
        asked.exception()  # its asker may have gone
    else:
        asked.set_result(answer)


def _plain(value: Any) -> Words | list[Any]:
    """What JSON has no word for; `dataclasses.asdict` would copy every number."""
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _gone() -> UnavailableError:
    return UnavailableError("engine: it is gone", Reason.UNREACHABLE)
