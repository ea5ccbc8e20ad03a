"""What a front door sees of the engine, whatever lies between them: a queue in one process or a ring between two."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from blockdex.engine.entry import shutting_down
from blockdex.engine.stats import Stats
from blockdex.messages import Answer, CacheOverview, Info, Limits, Phase, Request, Stage
from blockdex_kernels import IndexSpec


class PendingAnswer(asyncio.Future[Answer]):
    """An answer to come, or a `BlockdexError`. Cancelling it gives the request up.

    Attributes:
        request: what it is the answer to.
        received: `time.monotonic` seconds at which that was handed over.
        phase: once it is there, what the request came to.
        stage_seconds: once it is there, the seconds in each of the engine's stages, as far as the request got; the rest
            of its time it was at the front door.
    """

    phase: Phase = "sequence"
    stage_seconds: Mapping[Stage, float] = MappingProxyType({})

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request
        self.received = time.monotonic()


class Reports(Protocol):
    """What is said of the engine rather than by it; every call is made on an asyncio loop, and none blocks it."""

    async def info(self) -> Info:
        """What the engine is, holds and can do, now.

        Raises:
            UnavailableError: the engine is gone (UNREACHABLE); so do the other two.
        """
        ...

    async def overview(self, max_cells: int) -> CacheOverview:
        """What pages and sequences are like, now, the pages in `max_cells` cells at most."""
        ...

    async def stats(self) -> Stats:
        """What the engine counted and timed since it started."""
        ...


class Channel(Reports, Protocol):
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
            UnavailableError: the engine is shutting down (SHUTTING_DOWN) or gone (UNREACHABLE).
        """
        ...


class InFlight:
    """The answers to come of one channel, and its end; used on one asyncio loop.

    Attributes:
        closed: whether no new request is taken.
    """

    def __init__(self) -> None:
        self.closed = False
        self._pending: set[PendingAnswer] = set()
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._pending)

    def open(self, request: Request) -> PendingAnswer:
        """A new one, to a request.

        Raises:
            UnavailableError: no new request is taken (SHUTTING_DOWN).
        """
        if self.closed:
            raise shutting_down("takes no new requests")
        pending = PendingAnswer(request)
        self._pending.add(pending)
        self._none.clear()
        pending.add_done_callback(self._forget)
        return pending

    def fail_all(self, error: Exception) -> None:
        """Answers all of them with an error."""
        for pending in list(self._pending):
            if not pending.done():
                pending.set_exception(error)

    async def drain(self, grace: float) -> None:
        """Waits until all are there; after `grace` seconds the rest are refused."""
        try:
            await asyncio.wait_for(self._none.wait(), timeout=grace)
        except TimeoutError:
            self.fail_all(shutting_down(f"the request was not done within {grace:g} s"))

    def _forget(self, pending: PendingAnswer) -> None:
        self._pending.discard(pending)
        if not self._pending:
            self._none.set()
