"""The engine's side of links: who connects gets a segment, may ask what the engine is, and is missed when gone."""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial
from typing import TYPE_CHECKING

from blockdex.checks import check_request
from blockdex.logs import log_event
from blockdex.messages import Limits
from blockdex.transport.handover import offer
from blockdex.transport.inbox import Line, RingInbox
from blockdex.transport.reports import answer_of
from blockdex.transport.segment import RingError, Segment, Sizes
from blockdex.transport.talk import Talk
from blockdex_kernels import IndexSpec

if TYPE_CHECKING:
    from blockdex.engine.engine import Engine

logger = logging.getLogger(__name__)

_COLUMN_BYTES = 4 * 8
_MARGIN = 1 << 20


class RingHost:
    """Serves an engine to the front doors that connect; used on one asyncio loop.

    Args:
        engine: takes its entries from the inbox.
        inbox: where requests come in.
        listening: where front doors connect.
    """

    def __init__(self, engine: Engine, inbox: RingInbox, listening: socket.socket) -> None:
        self._engine = engine
        self._inbox = inbox
        self._listening = listening
        self._guests: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Lets front doors in until it is cancelled; then no link is left."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                connected, _ = await loop.sock_accept(self._listening)
                guest = asyncio.create_task(self._serve(connected))
                self._guests.add(guest)
                guest.add_done_callback(self._guests.discard)
        finally:
            for guest in self._guests:
                guest.cancel()

    async def _serve(self, connected: socket.socket) -> None:
        """One link, from its beginning to its end."""
        with connected:
            info = self._engine.info()
            segment = Segment.create(sizes_of(info.spec, info.limits), info.epoch)
            try:
                handles = offer(connected, segment)
            except (RingError, OSError) as error:
                log_event(logger, logging.WARNING, "link refused", reason=str(error))
                return
            talk = await Talk.on(connected.dup())
        loop = asyncio.get_running_loop()

        def hang_up(error: RingError) -> None:
            log_event(logger, logging.WARNING, "link broken", reason=str(error))
            loop.call_soon_threadsafe(talk.hang_up)

        line = Line(handles, partial(check_request, info.spec, info.limits), hang_up)
        self._inbox.add(line)
        try:
            async for words in talk.heard():
                talk.tell({"answer": await answer_of(self._engine, words)})
        finally:
            self._inbox.drop(line)
            talk.hang_up()


def sizes_of(spec: IndexSpec, limits: Limits) -> Sizes:
    """Room for requests and answers of the largest kind that limits allow, twice over."""
    tokens_times_heads = limits.max_message_bytes // spec.head_dim
    largest_request = limits.max_message_bytes + _COLUMN_BYTES * limits.max_spans
    largest_answer = 8 * spec.topk * tokens_times_heads
    return Sizes(
        slots=1 << max(limits.max_queued_requests - 1, 1).bit_length(),
        request_bytes=2 * largest_request + _MARGIN,
        answer_bytes=2 * largest_answer + _MARGIN,
    )
