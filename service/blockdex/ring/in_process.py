"""The channel inside one process: the engine's thread on one side, an asyncio loop on the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from blockdex.contract.messages import CacheOverview, Info, Limits, Request
from blockdex.contract.stats import Stats
from blockdex.ring.channel import Asker, GivenUp, InFlight, PendingAnswer
from blockdex.scheduler.loop import Engine
from blockdex.scheduler.request import Entry, Outcome
from blockdex_kernels import IndexSpec


class LocalChannel:
    """`Channel` to an engine in a thread of this process; made and used on one asyncio loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._in_flight = InFlight()

    @property
    def spec(self) -> IndexSpec:
        """The indexer that requests are checked against."""
        return self._engine.spec

    @property
    def limits(self) -> Limits:
        """Bounds that requests are checked against."""
        return self._engine.limits

    def start(self) -> None:
        """Starts the engine."""
        self._engine.start(self._deliver)

    async def drain(self, grace: float) -> None:
        """Refuses new requests and waits until those in flight are answered; after `grace` seconds they are refused."""
        self._in_flight.closed = True
        self._engine.expect_no_more()
        await self._in_flight.drain(grace)

    def stop(self) -> None:
        """Ends the engine; what it has not answered stays unanswered."""
        self._engine.stop()

    def submit(self, request: Request, timeout: float) -> PendingAnswer:
        """As `Channel.submit`."""
        pending = self._in_flight.open(request)
        entry = Entry(request, pending.received + timeout, ticket=pending, received=pending.received)
        try:
            self._engine.submit(entry)
        except BaseException:
            pending.cancel()
            raise
        pending.add_done_callback(lambda _: self._finished(entry, pending))
        return pending

    def send(self, asker: Asker, rpc: int, tenant: str, timeout: float, message: bytes) -> bool:
        """As `Channel.send`: the short way is one over a ring."""
        del asker, rpc, tenant, timeout, message
        return False

    def look(self) -> None:
        """As `Channel.look`: nothing is sent the short way."""

    def awaits(self, asker: Asker, number: int) -> bool:
        """As `Channel.awaits`."""
        del asker, number
        return False

    def give_up(self, asker: Asker, number: int) -> GivenUp | None:
        """As `Channel.give_up`."""
        del asker, number
        return None

    def give_up_all(self, asker: Asker) -> list[GivenUp]:
        """As `Channel.give_up_all`."""
        del asker
        return []

    async def info(self) -> Info:
        """As `Channel.info`."""
        return self._engine.info()

    async def overview(self, max_cells: int) -> CacheOverview:
        """As `Channel.overview`."""
        # Beside the engine's thread, not on it: batches do not wait, and a page is drawn even while one hangs.
        return await asyncio.to_thread(self._engine.overview, max_cells)

    async def stats(self) -> Stats:
        """As `Channel.stats`."""
        return self._engine.stats()

    def _finished(self, entry: Entry, pending: PendingAnswer) -> None:
        if pending.cancelled():
            entry.cancelled = True
            self._engine.notice()

    def _deliver(self, outcomes: Sequence[Outcome]) -> None:
        # One wake-up of the loop for a whole batch. After the loop has closed nobody is left to answer.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_resolve, outcomes)


def _resolve(outcomes: Sequence[Outcome]) -> None:
    now = time.monotonic()
    for entry, outcome in outcomes:
        pending = entry.ticket
        assert isinstance(pending, PendingAnswer)
        if pending.done():
            continue
        pending.phase, pending.stage_seconds = entry.phase, entry.stage_seconds(now)
        if isinstance(outcome, Exception):
            pending.set_exception(outcome)
        else:
            pending.set_result(outcome)
