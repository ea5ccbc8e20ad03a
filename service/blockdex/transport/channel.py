"""What a front door sees of the engine, whatever lies between them: a queue in one process or a ring between two."""

from __future__ import annotations

import asyncio
from typing import Protocol

from blockdex.engine.stats import Stats
from blockdex.messages import Answer, Info, Limits, Request
from blockdex_kernels import IndexSpec


class Channel(Protocol):
    """The engine, seen from an asyncio loop. Every call is made on that loop; none blocks it."""

    @property
    def spec(self) -> IndexSpec:
        """The indexer that requests are checked against."""
        ...

    @property
    def limits(self) -> Limits:
        """Bounds that requests are checked against."""
        ...

    def submit(self, request: Request, timeout: float) -> asyncio.Future[Answer]:
        """Hands a request over; the future gets the answer or a `BlockdexError`. Cancelling it gives the request up.

        Args:
            request: checked against spec and limits.
            timeout: seconds until the engine drops it with DEADLINE_EXCEEDED.

        Raises:
            ResourceExhaustedError: too many requests are queued (OVERLOADED).
            UnavailableError: the engine is shutting down (SHUTTING_DOWN).
        """
        ...

    def info(self) -> Info:
        """What the engine is, holds and can do, now."""
        ...

    def stats(self) -> Stats:
        """What the engine counted and timed since it started."""
        ...
