"""A channel inside one process, without a ring: the engine's thread on one side, an asyncio loop on the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from blockdex.contract.errors import shutting_down
from blockdex.contract.messages import Answer, Phase, Request, Stage
from blockdex.scheduler.loop import Engine
from blockdex.scheduler.request import Entry, Outcome


class PendingAnswer(asyncio.Future[Answer]):
    """An answer to come, or a `BlockdexError`. Cancelling it gives the request up.

    Attributes:
        request: what it is the answer to.
        received: `time.monotonic` seconds at which that was handed over.
        phase: once it is there, what the request came to.
        stage_seconds: once it is there, the seconds in each of the engine's stages, as far as the request got; the rest
            of its time it was at the frontend.
    """

    phase: Phase = "sequence"
    stage_seconds: Mapping[Stage, float] = MappingProxyType({})

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request
        self.received = time.monotonic()


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


class LocalChannel:
    """The way to an engine in a thread of this process; made and used on one asyncio loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._in_flight = InFlight()

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
        """Hands a request over."""
        pending = self._in_flight.open(request)
        entry = Entry(request, pending.received + timeout, ticket=pending, received=pending.received)
        try:
            self._engine.submit(entry)
        except BaseException:
            pending.cancel()
            raise
        pending.add_done_callback(lambda _: self._finished(entry, pending))
        return pending

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
