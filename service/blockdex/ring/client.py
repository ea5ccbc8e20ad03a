"""The channel to an engine in another process, seen from a frontend's asyncio loop."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import blockdex._native as native
from blockdex.contract.errors import BlockdexError, Reason, ResourceExhaustedError, UnavailableError
from blockdex.contract.messages import Answer, Info, Limits, Request
from blockdex.contract.stats import SECONDS_BUCKETS
from blockdex.logs import log_event
from blockdex.ring import codec
from blockdex.ring.channel import SHORT_RPCS, Asker, CameTo, GivenUp, InFlight, PendingAnswer, not_done_within
from blockdex.ring.control_channel import ControlChannel
from blockdex.ring.engine_reports import RemoteReports, gone, info_of
from blockdex.ring.handshake import Handles, silence, take
from blockdex.ring.layout import ANSWER_STRUCT, AnswerSlot
from blockdex.ring.segment import RingError
from blockdex.ring.selector import RingSelector
from blockdex_kernels import IndexSpec

logger = logging.getLogger(__name__)

ROOM_SECONDS = 2.0
"""Longest that a request waits for room in shared memory before it is refused as OVERLOADED."""

_AGAIN_SECONDS = 0.02

_LONGEST_SECONDS = 1e9
"""A deadline has 63 bits of nanoseconds; gRPC's may lie 11,000 years ahead."""

_ALONE_SECONDS = 0.0001
"""How long the loop waits for the only request in flight: a decode of a few sequences is done well within it."""

Timed = Callable[[str, list[int], float], None]
"""Told of answers on the short way: an RPC, how many fell into each of `SECONDS_BUCKETS`, and their seconds in all."""


class Spinning(NamedTuple):
    """The selector of the channel's loop, and the seconds for which it looks, after a request or an answer."""

    selector: RingSelector
    seconds: float


@dataclass(eq=False, slots=True)
class Outgoing:
    """A request to send the long way; its ticket is 0 until it is sent."""

    pending: PendingAnswer
    request: Request
    deadline: float
    ticket: int = 0


class Link:
    """The rings to one life of the engine; ends with it.

    What is sent the short way is written by the compiled part, whole; only what it leaves comes here as messages.
    Once a request waits for room, all others wait behind it.

    Args:
        handles: what the engine has handed out.
        broken: called once the engine has written what cannot be.
        spinning: as `RingChannel` takes it.
    """

    def __init__(self, handles: Handles, broken: Callable[[], None], spinning: Spinning | None) -> None:
        self._handles = handles
        self._segment = handles.segment
        self._broken = broken
        self._spinning = spinning
        self._loop = asyncio.get_running_loop()
        self._ring = native.Link(handles.segment.memory, handles.engine_bell, spinning.seconds if spinning else 0.0)
        self._outbox: deque[Outgoing] = deque()
        self._cancels: deque[int] = deque()
        self._waits_for_room = False
        self._closed = False
        self._loop.add_reader(handles.client_bell, self._woken)
        if spinning is not None:
            spinning.selector.watch(self._ring, handles.client_bell)
        self._look()

    def open_short_way(self, info: Info, slow_seconds: float) -> None:
        """Takes requests the short way from now on, within the bounds of an engine."""
        spec, limits = info.spec, info.limits
        self._ring.open_short_way(
            num_layers=spec.num_layers,
            num_heads=spec.num_index_heads,
            head_dim=spec.head_dim,
            max_sequence_tokens=spec.max_sequence_tokens,
            max_spans=limits.max_spans,
            max_message_bytes=limits.max_message_bytes,
            max_waiting=limits.max_queued_requests,
            slow_seconds=slow_seconds,
            time_bounds=SECONDS_BUCKETS,
        )

    def close(self) -> None:
        """Tells of what the engine has answered, and lets go of everything; what is on its way stays unanswered."""
        self._look()
        self._closed = True
        if self._spinning is not None:
            self._spinning.selector.forget()
        self._loop.remove_reader(self._handles.client_bell)
        self._handles.close()

    @property
    def on_short_way(self) -> int:
        """Requests that took the short way and are not answered."""
        return self._ring.on_short_way

    def send_message(self, asker: Asker, rpc: int, tenant: str, timeout: float, message: bytes) -> bool:
        """As `Channel.send`."""
        return not self._outbox and self._ring.send(asker, rpc, tenant, timeout, message)

    def look(self) -> None:
        """As `Channel.look`."""
        spinning = self._spinning
        if spinning is not None and self._ring.await_alone(spinning.selector.fileno(), _ALONE_SECONDS):
            self._look()

    def send(self, outgoing: Outgoing) -> None:
        """Sends a request as soon as there is room; refuses it as OVERLOADED if that takes `ROOM_SECONDS`."""
        self._outbox.append(outgoing)
        if len(self._outbox) == 1:
            self._flush()
        self._flush_later()

    def withdraw(self, outgoing: Outgoing) -> None:
        """Tells the engine that nobody waits for a request any more; it is not sent if it was not."""
        if outgoing.ticket and not self._closed:
            self._cancel(outgoing.ticket)

    def awaits(self, asker: Asker, number: int) -> bool:
        """As `Channel.awaits`."""
        return self._ring.awaits(asker, number)

    def give_up(self, asker: Asker, number: int) -> GivenUp | None:
        """As `Channel.give_up`."""
        taken = self._ring.give_up(asker, number)
        if taken is None:
            return None
        self._cancel(taken[-1])
        return _given_up(taken)

    def give_up_all(self, asker: Asker) -> list[GivenUp]:
        """As `Channel.give_up_all`."""
        taken = self._ring.give_up_all(asker)
        for *_, ticket in taken:
            self._cancel(ticket)
        return [_given_up(each) for each in taken]

    def fail_all(self, error: BlockdexError) -> None:
        """Refuses all requests on the short way."""
        for asker, number, rpc, received, _ in self._ring.give_up_all(None):
            asker.failed(number, SHORT_RPCS[rpc], received / 1e9, error, None)

    def tell_times(self, timed: Timed) -> None:
        """Tells of the answers on the short way since the last time."""
        for rpc, (counts, seconds) in zip(SHORT_RPCS, self._ring.take_times(), strict=False):
            if any(counts):
                timed(rpc, counts, seconds)

    def _cancel(self, ticket: int) -> None:
        self._cancels.append(ticket)
        self._flush()
        self._flush_later()

    def _flush(self) -> None:
        """Writes what there is room for: cancellations, which make some, and then requests in their order."""
        while self._cancels and self._ring.cancel(self._cancels[0]):
            self._cancels.popleft()
        published = False
        while self._outbox:
            first = self._outbox[0]
            if not first.pending.done():
                place = self._ring.claim(first.pending, codec.request_bytes(first.request))
                if place is None:
                    break
                first.ticket, slot, offset = place
                received, deadline = first.pending.received, first.deadline
                codec.write_request(self._segment, slot, offset, first.ticket, first.request, received, deadline)
                published = True
            self._outbox.popleft()
        if published:
            self._ring.publish()

    def _flush_later(self) -> None:
        # The engine tells of answers, but not of slots that it has emptied: who waits for one looks again.
        if (self._outbox or self._cancels) and not self._waits_for_room:
            self._waits_for_room = True
            self._loop.call_later(_AGAIN_SECONDS, self._flush_again)

    def _flush_again(self) -> None:
        self._waits_for_room = False
        if self._closed:
            return
        self._flush()
        too_late = time.monotonic() - ROOM_SECONDS
        while self._outbox and self._outbox[0].pending.received < too_late:
            self._refuse(self._outbox.popleft())
        # Who has gone holds no tensors; there may be many of them while the engine takes nothing.
        self._outbox = deque(outgoing for outgoing in self._outbox if not outgoing.pending.done())
        self._flush_later()

    def _refuse(self, outgoing: Outgoing) -> None:
        if not outgoing.pending.done():
            segment, wanted = self._segment, codec.request_bytes(outgoing.request)
            room = f"{wanted} bytes and a slot among {segment.request_arena_bytes} and {segment.request_slots}"
            outgoing.pending.set_exception(
                ResourceExhaustedError(f"queue: waited {ROOM_SECONDS:g} s for {room}", Reason.OVERLOADED)
            )

    def _woken(self) -> None:
        # A selector that looks by itself tells of answers for which nobody rang.
        silence(self._handles.client_bell)
        self._look()

    def _look(self) -> None:
        """Takes the answers that are there, until there are none and the bell will ring for the next."""
        try:
            while taken := self._ring.take():
                for asker, number, response, rest in taken:
                    if rest is None:
                        asker.answered(number, response)
                    else:
                        self._tell(asker, number, response, rest)
                if self._outbox or self._cancels:
                    self._flush()
        except ValueError:
            self._is_broken()

    def _tell(self, asker: Asker | PendingAnswer, number: int, response: bytes | None, rest: native.Rest) -> None:
        try:
            _tell(asker, number, response, rest)
        except ValueError:
            # Others are told still; who asked the long way is when the link ends.
            self._is_broken()
            if not isinstance(asker, PendingAnswer):
                rpc, received, *_ = rest
                asker.failed(number, SHORT_RPCS[rpc], received / 1e9, gone(), None)

    def _is_broken(self) -> None:
        logger.exception("the link to the engine broke")
        self._broken()


def _given_up(taken: native.Taken) -> GivenUp:
    _, number, rpc, received, _ = taken
    return GivenUp(number, SHORT_RPCS[rpc], received / 1e9)


def _tell(asker: Asker | PendingAnswer, number: int, response: bytes | None, rest: native.Rest) -> None:
    """Tells of an answer of which there is more to say than its response."""
    rpc, received, slot, payload = rest
    numbers = AnswerSlot._make(ANSWER_STRUCT.unpack(slot))
    came_to = CameTo(codec.phase_of(numbers), codec.stage_seconds_of(numbers))
    if isinstance(asker, PendingAnswer):
        if not asker.done():
            asker.phase, asker.stage_seconds = came_to
            _resolve(asker, codec.read_answer(numbers, np.frombuffer(payload, np.uint8)))
    elif response is not None:
        asker.answered(number, response)
        asker.was_slow(number, SHORT_RPCS[rpc], received / 1e9, came_to)
    else:
        error = codec.read_answer(numbers, np.frombuffer(payload, np.uint8))
        assert isinstance(error, BlockdexError)
        asker.failed(number, SHORT_RPCS[rpc], received / 1e9, error, came_to)


def _resolve(pending: PendingAnswer, answer: Answer | BlockdexError) -> None:
    if isinstance(answer, BlockdexError):
        pending.set_exception(answer)
    else:
        pending.set_result(answer)


def _untimed(rpc: str, counts: list[int], seconds: float) -> None:
    """Nobody counts."""
    del rpc, counts, seconds


class RingChannel(RemoteReports):
    """`Channel` to an engine in another process, through all its lives; made and used on one asyncio loop.

    Args:
        address: where the engine listens for frontends.
        changed: called with whether the engine is there, whenever that changes.
        slow_seconds: an asker is told of requests on the short way that take longer.
        timed: told of the answers on the short way by `tell_times`, and when a link ends.
        spinning: looks for answers and requests before the loop sleeps; without it that sleeps at once.
    """

    def __init__(
        self,
        address: str,
        *,
        changed: Callable[[bool], None],
        slow_seconds: float = 1.0,
        timed: Timed = _untimed,
        spinning: Spinning | None = None,
    ) -> None:
        super().__init__(lambda: self._talk)
        self._address = address
        self._changed = changed
        self._slow_seconds = slow_seconds
        self._timed = timed
        self._spinning = spinning
        self._in_flight = InFlight()
        self._talk: ControlChannel | None = None
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
            handles, talk = await _begin(connected)
        hearing = asyncio.create_task(_listen(talk))
        link = Link(handles, talk.hang_up, self._spinning)
        try:
            info = info_of(await talk.ask({"ask": "info"}))
            link.open_short_way(info, self._slow_seconds)
            self._spec, self._limits, self._talk, self._link = info.spec, info.limits, talk, link
            self._changed(True)
            await hearing
        finally:
            self._talk = self._link = None
            link.close()
            link.tell_times(self._timed)
            link.fail_all(gone())
            self._in_flight.fail_all(gone())
            self._changed(False)
            hearing.cancel()
            talk.hang_up()

    def refuse_new(self) -> None:
        """Takes no new requests from now on."""
        self._in_flight.closed = True

    async def drain(self, grace: float) -> None:
        """Waits until the requests in flight are answered; after `grace` seconds they are refused."""
        await asyncio.gather(self._in_flight.drain(grace), self._drain_short_way(grace))

    async def _drain_short_way(self, grace: float) -> None:
        deadline = time.monotonic() + grace
        while (link := self._link) and link.on_short_way:
            if time.monotonic() > deadline:
                link.fail_all(not_done_within(grace))
            await asyncio.sleep(_AGAIN_SECONDS)

    def tell_times(self) -> None:
        """Tells of the answers on the short way since the last time."""
        if link := self._link:
            link.tell_times(self._timed)

    def send(self, asker: Asker, rpc: int, tenant: str, timeout: float, message: bytes) -> bool:
        """As `Channel.send`."""
        link = self._link
        return (
            link is not None and not self._in_flight.closed and link.send_message(asker, rpc, tenant, timeout, message)
        )

    def look(self) -> None:
        """As `Channel.look`."""
        if link := self._link:
            link.look()

    def awaits(self, asker: Asker, number: int) -> bool:
        """As `Channel.awaits`."""
        return self._link is not None and self._link.awaits(asker, number)

    def give_up(self, asker: Asker, number: int) -> GivenUp | None:
        """As `Channel.give_up`."""
        return None if self._link is None else self._link.give_up(asker, number)

    def give_up_all(self, asker: Asker) -> list[GivenUp]:
        """As `Channel.give_up_all`."""
        return [] if self._link is None else self._link.give_up_all(asker)

    def submit(self, request: Request, timeout: float) -> PendingAnswer:
        """As `Channel.submit`."""
        link = self._link
        queued = len(self._in_flight) + (0 if link is None else link.on_short_way)
        if queued >= (allowed := self.limits.max_queued_requests):
            raise ResourceExhaustedError(f"queue: at most {allowed} requests may wait, {queued} do", Reason.OVERLOADED)
        if link is None:
            raise gone()
        pending = self._in_flight.open(request)
        outgoing = Outgoing(pending, request, pending.received + min(timeout, _LONGEST_SECONDS))
        pending.add_done_callback(lambda done: link.withdraw(outgoing) if done.cancelled() else None)
        link.send(outgoing)
        return pending


async def _begin(connected: socket.socket) -> tuple[Handles, ControlChannel]:
    """What the engine hands out, and the conversation beside it."""
    handles = await take(connected)
    try:
        return handles, await ControlChannel.on(connected.dup())
    except BaseException:
        handles.close()
        raise


async def _listen(talk: ControlChannel) -> None:
    """Until the engine is gone; it says nothing but answers."""
    async for _ in talk.heard():
        pass
