"""What a front door sees of the engine, whatever lies between them: a queue in one process or a ring between two."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from blockdex.engine.stats import Stats
from blockdex.messages import Answer, CacheOverview, Info, Limits, Request
from blockdex_kernels import IndexSpec


class PendingAnswer(asyncio.Future[Answer]):
    """An answer to come, or a `BlockdexError`. Cancelling it gives the request up.

    Attributes:
        stage_seconds: once it is there, the seconds in the engine's `queue` and in each kernel phase, as far as the
            request got; the rest of its time it waited for keys or its turn, or was at the front door.
    """

    stage_seconds: Mapping[str, float] = MappingProxyType({})


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

    def submit(self, request: Request, timeout: float) -> PendingAnswer:
        """Hands a request over.

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

    async def overview(self, max_cells: int) -> CacheOverview:
        """What pages and sequences are like, now, the pages in `max_cells` cells at most."""
        ...

    def stats(self) -> Stats:
        """What the engine counted and timed since it started."""
        ...
