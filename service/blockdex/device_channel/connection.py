"""The socket of a device channel: it is handed over there, watched while it is open, and given back."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from blockdex.contract.errors import Reason, UnauthenticatedError, UnavailableError, UnimplementedError, error_of
from blockdex.ring.layout import GREETING_STRUCT, HELLO_STRUCT, MAGIC, MAX_REFUSAL_BYTES, VERSION

_SECONDS = 10.0
"""For the engine to answer."""
_LENGTH_BYTES = 4
_GREETING_FILES = 3


class Connection:
    """A link's socket, on which channels are spoken of. A thread reads it, and notices at once when the engine is gone.

    Args:
        address: of the engine's Unix socket; one that is no file begins with a zero byte.
        tenant: of the link.
        lost: called on that thread once the engine is gone, however it went, also after `close`.

    Raises:
        UnavailableError: nobody answers there.
        UnimplementedError: it speaks another version.
        UnauthenticatedError: it does not let this process in.
    """

    def __init__(self, address: str, tenant: str, lost: Callable[[], None]) -> None:
        self._lost = lost
        self._replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_SECONDS)
        try:
            self._socket.connect(address)
            self._greet(tenant.encode("ascii"))
        except OSError as error:
            self._socket.close()
            raise UnavailableError(f"engine: nobody answers at {address!r} ({error})", Reason.UNREACHABLE) from None
        except BaseException:
            self._socket.close()
            raise
        self._socket.settimeout(None)
        self._listening = threading.Thread(target=self._listen, name="blockdex-channel", daemon=True)
        self._listening.start()

    def _greet(self, tenant: bytes) -> None:
        self._socket.sendall(HELLO_STRUCT.pack(MAGIC, VERSION, len(tenant)) + tenant)
        room = GREETING_STRUCT.size + MAX_REFUSAL_BYTES
        said, files, _, _ = socket.recv_fds(self._socket, room, _GREETING_FILES)
        for fd in files:  # a ring, of which this link makes no use
            os.close(fd)
        if len(said) < GREETING_STRUCT.size:
            raise ConnectionResetError("the engine went away")
        magic, version, refused = GREETING_STRUCT.unpack(said[: GREETING_STRUCT.size])
        if (magic, version) != (MAGIC, VERSION):
            message = f"link: expected magic {MAGIC:x}, version {VERSION}, got {magic:x}, {version}"
            raise UnimplementedError(message, Reason.UNKNOWN_FEATURE)
        if refused:
            why = said[GREETING_STRUCT.size :].decode("utf-8", "replace")
            raise UnauthenticatedError(f"link: {why}", Reason.UNKNOWN_CREDENTIALS)

    def ask(self, words: dict[str, Any], files: Sequence[int] = ()) -> dict[str, Any]:
        """Says something, and returns what is answered; one thread at a time.

        Raises:
            BlockdexError: it is refused, or the engine is gone or does not answer.
        """
        body = json.dumps(words).encode()
        said = len(body).to_bytes(_LENGTH_BYTES, "little") + body
        try:
            sent = socket.send_fds(self._socket, [said], list(files)) if files else 0
            self._socket.sendall(said[sent:])
            reply = self._replies.get(timeout=_SECONDS)
        except (OSError, queue.Empty):
            reply = None
        match reply:
            case {"answer": dict(answer)}:
                return answer
            case {"failed": str(message), "reason": str(reason), "code": int(code)}:
                raise error_of(code, message, reason, {})
        raise UnavailableError("engine: it is gone, or does not answer", Reason.UNREACHABLE)

    def close(self) -> None:
        """Ends the link; `lost` has been called when this returns."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # the thread that reads it closes it
        self._listening.join(_SECONDS)

    def _listen(self) -> None:
        try:
            while True:
                size = int.from_bytes(self._exactly(_LENGTH_BYTES), "little")
                words = json.loads(self._exactly(size))
                if "answer" in words or "failed" in words:
                    self._replies.put(words)
        except (OSError, ValueError):
            pass  # it is gone, or says what nobody can mean
        finally:
            self._lost()
            self._replies.put(None)
            self._socket.close()

    def _exactly(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            more = self._socket.recv(size - len(received))
            if not more:
                raise ConnectionResetError("link: the engine went away")
            received += more
        return received
