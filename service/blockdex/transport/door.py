"""The channel to an engine in another process, seen from a front door's asyncio loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockdex.errors import BlockdexError, Reason, ResourceExhaustedError, UnavailableError
from blockdex.logs import log_event
from blockdex.messages import Answer, Limits, Request
from blockdex.transport import codec
from blockdex.transport.arena import Arena, Reader
from blockdex.transport.channel import InFlight, PendingAnswer
from blockdex.transport.handover import Handles, take
from blockdex.transport.layout import AT, AnswerSlot
from blockdex.transport.reports import RemoteReports, gone, info_of
from blockdex.transport.ring import Bell, Consumer, Producer
from blockdex.transport.segment import RingError
from blockdex.transport.talk import Talk
from blockdex_kernels import IndexSpec

logger = logging.getLogger(__name__)

ROOM_SECONDS = 2.0
"""Longest that a request waits for room in shared memory before it is refused as OVERLOADED."""

_AGAIN_SECONDS = 0.02


class Outgoing(NamedTuple):
    """A request to send; None as request: give up the one with that ticket."""

    ticket: int
    pending: PendingAnswer
    request: Request | None
    received: float
    deadline: float


class Link:
    """The rings to one life of the engine; ends with it.

    Args:
        handles: what the engine has handed out.
        spin_seconds: after a request or an answer, how long to look for answers before sleeping.
        broken: called once the engine has written what cannot be.
    """

    def __init__(self, handles: Handles, spin_seconds: float, broken: Callable[[], None]) -> None:
        self._handles = handles
        self._segment = segment = handles.segment
        self._spin_seconds = spin_seconds
        self._broken = broken
        self._loop = asyncio.get_running_loop()
        self._requests = Producer(segment, "request", Bell(segment, "engine_sleeps", handles.engine_bell))
        self._arena = Arena(segment.request_arena_bytes)
        self._answers = Consumer(segment, "answer")
        self._payloads = Reader()
        self._payload_refs: dict[int, weakref.ref[NDArray[np.uint8]]] = {}
        self._room_bell = Bell(segment, "engine_waits_for_room", handles.engine_bell)
        self._bell = Bell(segment, "door_sleeps", handles.door_bell)
        self._outbox: deque[Outgoing] = deque()
        self._sent: dict[int, tuple[PendingAnswer, int]] = {}
        self._waits_for_room = False
        self._active = 0.0
        self._looking = False
        self._closed = False
        self._bell.lie_down()
        self._loop.add_reader(handles.door_bell, self._woken)

    def close(self) -> None:
        """Lets go of everything; what is on its way stays unanswered."""
        self._closed = True
        self._loop.remove_reader(self._handles.door_bell)
        self._handles.close()

    def send(self, outgoing: Outgoing) -> None:
        """Sends a request as soon as there is room; refuses it as OVERLOADED if that takes `ROOM_SECONDS`."""
        self._outbox.append(outgoing)
        if len(self._outbox) == 1:
            self._flush()
        self._flush_later()
        self._active = outgoing.received
        if self._spin_seconds and not self._looking:
            self._bell.get_up()
            self._look()

    def give_up(self, ticket: int) -> None:
        """Tells the engine that nobody waits for a request any more."""
        if ticket in self._sent and not self._closed:
            pending, _ = self._sent[ticket]
            # Before those that wait for room: this one makes some.
            self._outbox.appendleft(Outgoing(ticket, pending, None, time.monotonic(), 0.0))
            self._flush()
            self._flush_later()

    def _flush(self) -> None:
        """Writes what there is room for, in order."""
        published = False
        while self._outbox and not self._requests.full:
            ticket, pending, request, received, deadline = self._outbox[0]
            if request is None:
                codec.write_cancellation(self._segment, self._requests.claim(), ticket)
            elif not pending.done():
                offset = self._arena.take(codec.request_bytes(request))
                if offset is None:
                    break
                slot = self._requests.claim()
                codec.write_request(self._segment, slot, offset, ticket, request, received, deadline)
                self._sent[ticket] = pending, offset
            self._outbox.popleft()
            published = True
        if published:
            self._requests.publish()

    def _flush_later(self) -> None:
        # The engine tells of answers, but not of slots that it has emptied: who waits for one looks again.
        if self._outbox and not self._waits_for_room:
            self._waits_for_room = True
            self._loop.call_later(_AGAIN_SECONDS, self._flush_again)

    def _flush_again(self) -> None:
        self._waits_for_room = False
        if self._closed:
            return
        self._flush()
        too_late = time.monotonic() - ROOM_SECONDS
        while self._outbox and self._outbox[0].received < too_late:
            self._refuse(self._outbox.popleft())
        self._flush_later()

    def _refuse(self, outgoing: Outgoing) -> None:
        if outgoing.request is not None and not outgoing.pending.done():
            wanted, room = codec.request_bytes(outgoing.request), self._segment.request_arena_bytes
            outgoing.pending.set_exception(
                ResourceExhaustedError(
                    f"queue: {wanted} bytes waited {ROOM_SECONDS:g} s for room among {room}", Reason.OVERLOADED
                )
            )

    def _woken(self) -> None:
        self._bell.silence()
        self._bell.get_up()
        if not self._looking:
            self._look()

    def _look(self) -> None:
        """Takes the answers that are there; then looks again soon, or sleeps."""
        self._looking = False
        if self._closed:
            return
        try:
            self._take_answers()
            if not self._sent or time.monotonic() - self._active >= self._spin_seconds:
                self._bell.lie_down()
                if not self._answers.filled:
                    return
                self._bell.get_up()
        except RingError:
            logger.exception("the link to the engine broke")
            self._broken()
            return
        self._looking = True
        self._loop.call_soon(self._look)

    def _take_answers(self) -> None:
        filled = self._answers.check()
        if not filled:
            return
        for _ in range(filled):
            numbers = codec.read_answer_slot(self._segment, self._answers.take())
            self._answered(numbers, codec.read_answer(numbers, self._payload(numbers)))
        self._answers.release()
        self._room_bell.ring()
        self._active = time.monotonic()
        self._flush()

    def _answered(self, numbers: AnswerSlot, answer: Answer | BlockdexError) -> None:
        pending, offset = self._sent.pop(numbers.ticket)
        self._arena.give_back(offset)
        if pending.done():
            return
        pending.phase, pending.stage_seconds = codec.phase_of(numbers), codec.stage_seconds_of(numbers)
        if isinstance(answer, BlockdexError):
            pending.set_exception(answer)
        else:
            pending.set_result(answer)

    def _payload(self, numbers: AnswerSlot) -> NDArray[np.uint8]:
        """What an answer carries; its room is given back when nobody looks at it any more."""
        segment, end = self._segment, numbers.payload_end
        begin = segment.answer_arena_offset + numbers.payload_offset
        payload = np.frombuffer(segment.memory, np.uint8, numbers.payload_bytes, begin)
        if numbers.payload_bytes:
            self._payloads.hold(end)
            self._payload_refs[end] = weakref.ref(payload, lambda _: self._give_back(end))
        return payload

    def _give_back(self, end: int) -> None:
        del self._payload_refs[end]
        if self._payloads.give_back(end) and not self._closed:
            self._segment.counters[AT["answer_bytes_freed"] // 8] = self._payloads.freed
            self._room_bell.ring()


class RingChannel(RemoteReports):
    """`Channel` to an engine in another process, through all its lives; made and used on one asyncio loop.

    Args:
        address: where the engine listens for front doors.
        spin_seconds: as `Link` takes it.
        changed: called with whether the engine is there, whenever that changes.
    """

    def __init__(self, address: str, *, spin_seconds: float = 0.0, changed: Callable[[bool], None]) -> None:
        super().__init__(lambda: self._talk)
        self._address = address
        self._spin_seconds = spin_seconds
        self._changed = changed
        self._in_flight = InFlight()
        self._tickets = itertools.count(1)
        self._talk: Talk | None = None
        self._link: Link | None = None
        self._spec: IndexSpec | None = None
        self._limits: Limits | None = None

    @property
    def spec(self) -> IndexSpec:
        """The indexer that requests are checked against."""
        assert self._spec is not None, "run() connects first"
        return self._spec

    @property
    def limits(self) -> Limits:
        """Bounds that requests are checked against."""
        assert self._limits is not None, "run() connects first"
        return self._limits

    async def run(self) -> None:
        """Connects, and connects again whenever the engine is gone, until it is cancelled."""
        while True:
            try:
                await self._live()
            except (OSError, RingError, UnavailableError) as error:
                log_event(logger, logging.WARNING, "no link to the engine", reason=str(error))
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _live(self) -> None:
        """One life of the engine."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connected.setblocking(False)
        with connected:
            await asyncio.get_running_loop().sock_connect(connected, self._address)
            handles = await take(connected)
            talk = await Talk.on(connected.dup())
        hearing = asyncio.create_task(_listen(talk))
        link = Link(handles, self._spin_seconds, broken=talk.hang_up)
        try:
            info = info_of(await talk.ask({"ask": "info"}))
            self._spec, self._limits, self._talk, self._link = info.spec, info.limits, talk, link
            self._changed(True)
            await hearing
        finally:
            self._talk = self._link = None
            link.close()
            self._in_flight.fail_all(gone())
            self._changed(False)
            hearing.cancel()
            talk.hang_up()

    def refuse_new(self) -> None:
        """Takes no new requests from now on."""
        self._in_flight.closed = True

    async def drain(self, grace: float) -> None:
        """Waits until the requests in flight are answered; after `grace` seconds they are refused."""
        await self._in_flight.drain(grace)

    def submit(self, request: Request, timeout: float) -> PendingAnswer:
        """As `Channel.submit`."""
        link = self._link
        queued, allowed = len(self._in_flight), self.limits.max_queued_requests
        if queued >= allowed:
            raise ResourceExhaustedError(f"queue: at most {allowed} requests may wait, {queued} do", Reason.OVERLOADED)
        if link is None:
            raise gone()
        pending = self._in_flight.open(request)
        ticket, now = next(self._tickets), pending.received
        pending.add_done_callback(lambda done: link.give_up(ticket) if done.cancelled() else None)
        link.send(Outgoing(ticket, pending, request, now, now + timeout))
        return pending


async def _listen(talk: Talk) -> None:
    """Until the engine is gone; it says nothing but answers."""
    async for _ in talk.heard():
        pass
