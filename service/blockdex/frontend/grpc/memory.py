"""Memory that large messages took, given back: the C library keeps what was freed, else, a heap for each thread."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Iterator

LARGE_BYTES = 1 << 20
"""What is shorter goes into memory that others' messages take next."""

_AFTER_SECONDS = (2.0, 8.0, 30.0)
"""After a large message: first what was answered soon, then what waited."""

_libc = ctypes.CDLL(None)


class MemoryKeeper:
    """Has the C library give memory back some time after large messages; used on one asyncio loop."""

    def __init__(self) -> None:
        self._due: asyncio.TimerHandle | None = None
        self._rounds: Iterator[float] = iter(())

    def took(self, num_bytes: int) -> None:
        """Notes that a message of so many bytes came."""
        if num_bytes < LARGE_BYTES:
            return
        self._rounds = iter(_AFTER_SECONDS)
        if self._due is None:
            self._wait()

    def _wait(self) -> None:
        seconds = next(self._rounds, None)
        self._due = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._give_back)

    def _give_back(self) -> None:
        # It takes milliseconds by what was freed, and the loop has others to serve.
        threading.Thread(target=_libc.malloc_trim, args=(0,), name="blockdex-trim", daemon=True).start()
        self._wait()
