"""The channel to an engine, in this process or another, seen from a frontend's asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import blockdex._native as native
from blockdex.contract.errors import (
    BlockdexError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
    error_of,
    shutting_down,
)
from blockdex.contract.messages import Info, Limits, SequenceRequest
from blockdex.contract.stats import SECONDS_BUCKETS
from blockdex.logs import log_event
from blockdex.ring import codec
from blockdex.ring.caller import RPCS, Caller, CameTo, GivenUp
from blockdex.ring.control_channel import ControlChannel
from blockdex.ring.engine_reports import RemoteReports, gone
from blockdex.ring.events import Event, NewEpoch, SequencesEvicted, event_of
from blockdex.ring.handshake import Handles, silence, take
from blockdex.ring.layout import ANSWER_STRUCT, IS_STATE, AnswerSlot
from blockdex.ring.segment import RingError
from blockdex.ring.selector import RingSelector

logger = logging.getLogger(__name__)

_AGAIN_SECONDS = 0.02

_ALONE_SECONDS = 0.0001
"""How long the loop waits for the only request in flight: a decode of a few sequences is done well within it."""

Timed = Callable[[str, list[int], float], None]
"""Told of good answers: an RPC, how many fell into each of `SECONDS_BUCKETS`, and their seconds in all."""


class Spinning(NamedTuple):
    """The selector of the channel's loop, and the seconds for which it looks, after a request or an answer."""

    selector: RingSelector
    seconds: float


class ClientLink:
    """The rings to one life of the engine; ends with it.

    Args:
        handles: what the engine has handed out; closed with the link.
        info: what the engine is.
        broken: called once the engine has written what cannot be.
        tell_seconds: callers are told how answers that took longer spent their time.
        spinning: as `RingChannel` takes it.

    Raises:
        RingError: what was handed out is none of a ring.
    """

    def __init__(
        self,
        handles: Handles,
        info: Info,
        broken: Callable[[], None],
        tell_seconds: float,
        spinning: Spinning | None,
    ) -> None:
        self._handles = handles
        self._broken = broken
        self._spinning = spinning
        self._loop = asyncio.get_running_loop()
        try:
            self._ring = native.ClientLink(
                handles.segment.memory,
                handles.engine_bell,
                num_heads=info.spec.num_index_heads,
                max_spans=info.limits.max_spans,
                max_message_bytes=info.limits.max_message_bytes,
                max_waiting=info.limits.max_queued_requests,
                tell_seconds=tell_seconds,
                num_rpcs=len(RPCS),
                time_bounds=SECONDS_BUCKETS,
                spin_seconds=spinning.seconds if spinning else 0.0,
            )
        except ValueError as error:
            raise RingError(str(error)) from None
        self._room_seconds = info.limits.max_queue_ms / 1000
        self._flushing: asyncio.Handle | None = None
        self._sleepers: dict[str, deque[asyncio.Future[None]]] = {}
        self._closed = False
        self._loop.add_reader(handles.client_bell, self._woken)
        if spinning is not None:
            spinning.selector.watch(self._ring, handles.client_bell)
        self._look()

    def close(self) -> None:
        """Tells of what the engine has answered, and lets go of everything; what is on its way stays unanswered."""
        self._look()
        self._closed = True
        self._ring.close()
        if self._flushing is not None:
            self._flushing.cancel()
        if self._spinning is not None:
            self._spinning.selector.forget()
        self._loop.remove_reader(self._handles.client_bell)
        self._handles.close()
        self._wake_sleepers(1 << 30)

    @property
    def waiting(self) -> int:
        """Requests that are not answered."""
        return self._ring.waiting

    def may_begin(self, tenant: str, size: int) -> bool:
        """As `RingChannel.may_begin`."""
        return self._closed or self._ring.may_begin(tenant, size)

    async def share_freed(self, tenant: str) -> bool:
        """As `RingChannel.share_freed`."""
        sleeper = self._loop.create_future()
        self._sleepers.setdefault(tenant, deque()).append(sleeper)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(sleeper, self._room_seconds)
        return sleeper.done() and not sleeper.cancelled()

    def send(self, caller: Caller, rpc: int, tenant: str, timeout: float, message: bytes) -> bool:
        """As `RingChannel.send`."""
        became = self._ring.send(caller, rpc, tenant, timeout, message)
        if became != native.SENT:
            if became == native.UNUSUAL:
                return False
            self._not_sent(caller, became)
        return True

    def send_sequence(self, caller: Caller, number: int, rpc: str, request: SequenceRequest, timeout: float) -> bool:
        """As `RingChannel.send_sequence`."""
        fields = codec.sequence_fields(request)
        became = self._ring.send_sequence(
            caller,
            number,
            RPCS.index(rpc),
            request.tenant,
            timeout,
            fields.kind,
            request.epoch,
            fields.sequence_id,
            fields.child_id,
            fields.number,
            fields.num_spans,
            fields.columns,
        )
        if became != native.SENT:
            self._not_sent(caller, became)
        return isinstance(became, int)

    def look(self) -> None:
        """As `RingChannel.look`."""
        spinning = self._spinning
        if spinning is not None and self._ring.await_alone(spinning.selector.fileno(), _ALONE_SECONDS):
            self._look()

    def give_up(self, caller: Caller, number: int) -> GivenUp | None:
        """As `RingChannel.give_up`."""
        taken = self._ring.give_up(caller, number)
        self._flush_soon()
        self._wake_sleepers()
        return None if taken is None else _given_up(taken)

    def give_up_all(self, caller: Caller) -> list[GivenUp]:
        """As `RingChannel.give_up_all`."""
        taken = self._ring.give_up_all(caller)
        self._flush_soon()
        self._wake_sleepers()
        return [_given_up(each) for each in taken]

    def fail_all(self, error: BlockdexError) -> None:
        """Refuses all that is not answered."""
        for taken in self._ring.give_up_all(None):
            _refuse(taken, error)

    def tell_times(self, timed: Timed) -> None:
        """Tells of the answers since the last time."""
        for rpc, (counts, seconds) in zip(RPCS, self._ring.take_times(), strict=True):
            if any(counts):
                timed(rpc, counts, seconds)

    def _not_sent(self, caller: Caller, became: int | native.Refusal) -> None:
        """A request waits for room, or was refused."""
        if isinstance(became, int):
            self._flush_soon()
            return
        rpc, number, code, reason, text = became
        message, *metadata = text.split("\n")
        error = error_of(code, message, reason, dict(each.split("=") for each in metadata))
        caller.failed(number, RPCS[rpc], time.monotonic(), error, None)

    def _flush_soon(self) -> None:
        if self._flushing is None and not self._closed:
            self._flushing = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Sends what there is room for, a slice of what is long, and comes back for the rest."""
        if self._flushing is not None:
            self._flushing.cancel()
        left = self._ring.flush()
        if left == native.NOTHING_LEFT:
            self._flushing = None
        elif left == native.MORE_TO_COPY:
            self._flushing = self._loop.call_soon(self._flush)
        else:
            # The engine tells of answers, but not of slots that it has emptied: who waits for one looks again.
            self._flushing = self._loop.call_later(_AGAIN_SECONDS, self._flush)
            self._refuse_overdue()

    def _refuse_overdue(self) -> None:
        segment = self._handles.segment
        among = f"among {segment.request_arena_bytes} and {segment.request_slots}"
        for taken in self._ring.overdue(self._room_seconds):
            room = f"{taken[-1]} bytes and a slot {among}"
            words = f"queue: waited {self._room_seconds:g} s for {room}"
            _refuse(taken, ResourceExhaustedError(words, Reason.OVERLOADED))

    def _woken(self) -> None:
        # A selector that looks by itself tells of answers for which nobody rang.
        silence(self._handles.client_bell)
        self._look()

    def _look(self) -> None:
        """Takes the answers that are there, until there are none and the bell will ring for the next."""
        answers = 0
        try:
            while taken := self._ring.take():
                answers += len(taken)
                for caller, number, response, rest in taken:
                    if rest is None:
                        caller.answered(number, response)
                    else:
                        self._tell(caller, number, response, rest)
                if self._flushing is not None:
                    self._flush()
        except ValueError:
            self._is_broken()
        self._wake_sleepers(answers)

    def _wake_sleepers(self, answers: int = 1) -> None:
        """Wakes who waits for their tenant's share, of each tenant as many as there were answers, and one at least."""
        for tenant, sleepers in list(self._sleepers.items()):
            for _ in range(max(answers, 1)):
                if not sleepers or not self.may_begin(tenant, 0):
                    break
                sleeper = sleepers.popleft()
                if not sleeper.done():
                    sleeper.set_result(None)
            if not sleepers:
                del self._sleepers[tenant]

    def _tell(self, caller: Caller, number: int, response: bytes | None, rest: native.Rest) -> None:
        try:
            _tell(caller, number, response, rest)
        except ValueError:
            # Others are told still.
            self._is_broken()
            rpc, received, *_ = rest
            caller.failed(number, RPCS[rpc], received / 1e9, gone(), None)

    def _is_broken(self) -> None:
        logger.exception("the link to the engine broke")
        self._broken()


def _given_up(taken: native.Taken) -> GivenUp:
    _, number, rpc, received, layer, spans, tokens, _ = taken
    return GivenUp(number, RPCS[rpc], CameTo(received / 1e9, layer=layer, spans=spans, tokens=tokens))


def _refuse(taken: native.Taken, error: BlockdexError) -> None:
    caller: Caller = taken[0]
    number, rpc, came_to = _given_up(taken)
    caller.failed(number, rpc, came_to.received, error, came_to)


def _tell(caller: Caller, number: int, response: bytes | None, rest: native.Rest) -> None:
    """Tells of an answer of which there is more to say than its response."""
    rpc, received, slot, payload, *tokens = rest
    numbers = AnswerSlot._make(ANSWER_STRUCT.unpack(slot))
    came_to = CameTo(received / 1e9, codec.phase_of(numbers), codec.stage_seconds_of(numbers), *tokens)
    if response is not None:
        caller.answered(number, response)
        caller.took(number, RPCS[rpc], came_to)
        return
    contents = np.frombuffer(payload, np.uint8)
    if numbers.code:
        caller.failed(number, RPCS[rpc], came_to.received, codec.read_error(numbers, contents), came_to)
    elif numbers.flags & IS_STATE:
        caller.changed(number, codec.read_state(numbers, contents))
        caller.took(number, RPCS[rpc], came_to)
    else:
        raise ValueError(f"answer: it is none to {RPCS[rpc]}")


def _untimed(rpc: str, counts: list[int], seconds: float) -> None:
    """Nobody counts."""
    del rpc, counts, seconds


class RingChannel(RemoteReports):
    """The engine behind its rings, through all its lives; made and used on one asyncio loop, which no call blocks.

    Args:
        address: where the engine listens for frontends.
        changed: called with whether the engine is there, whenever that changes.
        tell_seconds: callers are told how requests that took longer spent their time.
        timed: told of good answers by `tell_times`, and when a link ends.
        spinning: looks for answers and requests before the loop sleeps; without it that sleeps at once.
    """

    def __init__(
        self,
        address: str,
        *,
        changed: Callable[[bool], None],
        tell_seconds: float = 1.0,
        timed: Timed = _untimed,
        spinning: Spinning | None = None,
    ) -> None:
        super().__init__(lambda: self._control)
        self._address = address
        self._changed = changed
        self._tell_seconds = tell_seconds
        self._timed = timed
        self._spinning = spinning
        self._refuses_new = False
        self._control: ControlChannel | None = None
        self._link: ClientLink | None = None
        self._limits: Limits | None = None
        self._told: Callable[[Event], None] = lambda _: None
        self._epoch = 0
        self._new_epoch = 0

    @property
    def limits(self) -> Limits:
        """Bounds that requests must keep."""
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
            handles, control = await _begin(connected)
        self._new_epoch = 0
        hearing = asyncio.create_task(self._listen(control))
        try:
            link = await self._open(handles, control)
            try:
                self._changed(True)
                await hearing
            finally:
                self._control = self._link = None
                link.close()
                link.tell_times(self._timed)
                link.fail_all(gone())
                self._changed(False)
        finally:
            hearing.cancel()
            control.hang_up()

    async def _open(self, handles: Handles, control: ControlChannel) -> ClientLink:
        """The link of what was handed out, once the engine has said what it is."""
        try:
            info = await RemoteReports(lambda: control).info()
            link = ClientLink(handles, info, control.hang_up, self._tell_seconds, self._spinning)
        except BaseException:
            handles.close()
            raise
        self._limits, self._control, self._link = info.limits, control, link
        # What it has told since it answered is newer.
        self._take_epoch(self._new_epoch or info.epoch)
        return link

    async def _listen(self, control: ControlChannel) -> None:
        """Until the engine is gone; beside answers it tells events."""
        async for words in control.heard():
            match event_of(words):
                case NewEpoch(epoch):
                    self._new_epoch = epoch
                    self._take_epoch(epoch)
                case SequencesEvicted() as evicted:
                    self._told(evicted)

    def _take_epoch(self, epoch: int) -> None:
        if self._epoch not in {0, epoch}:
            self._told(NewEpoch(epoch))
        self._epoch = epoch

    def tell_events(self, told: Callable[[Event], None]) -> None:
        """Has someone told of every event of the engine from now on, a new epoch of another engine included."""
        self._told = told

    def refuse_new(self) -> None:
        """Takes no new requests from now on."""
        self._refuses_new = True

    async def drain(self, grace: float) -> None:
        """Waits until the requests in flight are answered; after `grace` seconds they are refused."""
        deadline = time.monotonic() + grace
        while (link := self._link) and link.waiting:
            if time.monotonic() > deadline:
                link.fail_all(shutting_down(f"the request was not done within {grace:g} s"))
            await asyncio.sleep(_AGAIN_SECONDS)

    def tell_times(self) -> None:
        """Tells of the answers since the last time."""
        if link := self._link:
            link.tell_times(self._timed)

    def check(self) -> None:
        """Refuses what cannot be sent now.

        Raises:
            UnavailableError: the server is shutting down (SHUTTING_DOWN), or the engine gone (UNREACHABLE).
        """
        if self._refuses_new:
            raise shutting_down("takes no new requests")
        if self._link is None:
            raise gone()

    def may_begin(self, tenant: str, size: int) -> bool:
        """Whether a tenant's share lets it have one more request in flight, of so many bytes; else it is OVERLOADED."""
        return self._link is None or self._link.may_begin(tenant, size)

    async def share_freed(self, tenant: str) -> bool:
        """Waits until a request of a tenant is answered, for `Limits.max_queue_ms` at most; whether one was."""
        return self._link is not None and await self._link.share_freed(tenant)

    def send(self, caller: Caller, rpc: int, tenant: str, timeout: float, message: bytes) -> bool:
        """Sends a token request as it came off the wire.

        What no slot can carry is refused before this returns, and so is one too many (OVERLOADED). A request waits for
        room in shared memory for `Limits.max_queue_ms`; those of one caller take effect in the order sent.

        Args:
            caller: who is told of the answer; no two of its requests in flight have the same number.
            rpc: which of `TOKEN_RPCS` the message is the request of, or `STREAM`.
            tenant: whose sequences it names; `check_tenant` has nothing against it.
            timeout: seconds until the engine drops it with DEADLINE_EXCEEDED, where the message says none itself.
            message: as it came off the wire.

        Returns:
            False where nothing came of it: `check` says why, or protobuf has to read it first, since it is written in
            an unusual way, is no such message, or, of a stream, is no token request.
        """
        link = self._link
        if link is None or self._refuses_new:
            return False
        return link.send(caller, rpc, tenant, timeout, message)

    def send_sequence(self, caller: Caller, number: int, rpc: str, request: SequenceRequest, timeout: float) -> bool:
        """Sends a request about sequences; otherwise as `send`.

        Args:
            caller: as in `send`.
            number: the caller's own name for it.
            rpc: its name among `RPCS`.
            request: what to do; its tenant has been checked.
            timeout: seconds.

        Returns:
            False where it was refused, which the caller has been told.

        Raises:
            UnavailableError: as `check`.
        """
        self.check()
        assert self._link is not None
        return self._link.send_sequence(caller, number, rpc, request, timeout)

    def look(self) -> None:
        """Tells the callers of the answers that are there, after a moment if the only request in flight has none yet.

        To be called once a request was sent: where it is alone, its answer then has come before the loop could have
        turned. It holds the loop up while there is nothing else to do, for a tenth of a millisecond at most.
        """
        if link := self._link:
            link.look()

    def give_up(self, caller: Caller, number: int) -> GivenUp | None:
        """Gives up a request, of whose answer its caller is not told; None where there is no such one in flight."""
        return None if self._link is None else self._link.give_up(caller, number)

    def give_up_all(self, caller: Caller) -> list[GivenUp]:
        """Gives up all requests of a caller."""
        return [] if self._link is None else self._link.give_up_all(caller)


async def _begin(connected: socket.socket) -> tuple[Handles, ControlChannel]:
    """What the engine hands out, and the control channel beside it."""
    handles = await take(connected)
    try:
        return handles, await ControlChannel.on(connected.dup())
    except BaseException:
        handles.close()
        raise
