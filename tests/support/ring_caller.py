"""A caller that asks an engine of the same process through a ring, and awaits its answers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Mapping

from benchmarks.ring_messages import Answer, Request
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import Phase, Stage
from blockdex.ring import layout
from blockdex.ring.codec import phase_of, stage_seconds_of
from blockdex.ring.events import Event
from blockdex.ring.handshake import new_link
from blockdex.ring.layout import RequestSlot
from blockdex.ring.segment import Sizes
from blockdex.ring.server import RingInbox, ServerLink
from blockdex.scheduler.loop import Engine
from support.foreign_frontend import ForeignFrontend

_SIZES = Sizes(slots=1 << 13, request_bytes=1 << 29, answer_bytes=1 << 28)
_LOOK_SECONDS = 0.0003


class PendingAnswer(asyncio.Future[Answer]):
    """An answer to come, or a `BlockdexError`. Cancelling it gives the request up.

    Attributes:
        phase: what the request came to, once it is answered.
        stage_seconds: seconds in each stage that it reached, likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase: Phase = "sequence"
        self.stage_seconds: Mapping[Stage, float] = {}


class RingCaller:
    """The client's side of a link to an engine, which it starts and stops; made and used on one asyncio loop."""

    def __init__(self, engine: Engine, inbox: RingInbox) -> None:
        engine_side, handles = new_link(_SIZES, engine.info().epoch)
        self.broken: list[Exception] = []
        self.events: list[Event] = []
        self._engine = engine
        self._frontend = ForeignFrontend(handles)
        self._in_flight: dict[int, PendingAnswer] = {}
        self._tickets = itertools.count(1)
        self._reading: asyncio.Task[None] | None = None
        self._line = ServerLink(engine_side, self.broken.append, self.events.append)
        self._files = contextlib.ExitStack()
        self._files.callback(os.close, inbox.nudge)
        self._files.callback(handles.close)
        self._files.callback(lambda: None if self._line.gone else engine_side.close())
        inbox.add(self._line)

    def start(self) -> None:
        """Starts the engine."""
        self._engine.start()
        self._reading = asyncio.create_task(self._read())

    def stop(self) -> None:
        """Ends the engine."""
        if self._reading is not None:
            self._reading.cancel()
        self._engine.stop()
        self._files.close()

    def submit(self, request: Request, timeout: float) -> PendingAnswer:
        """Writes a request."""
        pending, ticket = PendingAnswer(), next(self._tickets)
        self._frontend.write(self._frontend.lay(request, ticket, deadline=timeout))
        self._in_flight[ticket] = pending
        pending.add_done_callback(lambda _: self._give_up(ticket) if pending.cancelled() else None)
        return pending

    def _give_up(self, ticket: int) -> None:
        self._frontend.write(RequestSlot(ticket=ticket, kind=layout.CANCEL))

    async def _read(self) -> None:
        while True:
            self._frontend.read()
            for ticket in list(self._frontend.told):
                self._take(ticket)
            await asyncio.sleep(_LOOK_SECONDS)

    def _take(self, ticket: int) -> None:
        numbers, answer = self._frontend.told.pop(ticket)
        pending = self._in_flight.pop(ticket)
        if pending.done():
            return
        pending.phase, pending.stage_seconds = phase_of(numbers), stage_seconds_of(numbers)
        if isinstance(answer, BlockdexError):
            pending.set_exception(answer)
        else:
            pending.set_result(answer)
