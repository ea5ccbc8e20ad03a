"""One bidirectional stream: many requests in flight, each answered as it finishes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import grpc

from blockdex.contract.errors import BlockdexError, CancelledError, InvalidArgumentError, Reason
from blockdex.frontend.grpc import convert
from blockdex.frontend.grpc.call_context import Caller, RequestLog
from blockdex.frontend.grpc.status import as_blockdex_error, status_of
from blockdex.ring.channel import STREAM, CameTo, Channel, PendingAnswer
from blockdex.v1 import indexer_pb2 as pb

STREAM_RPCS = {
    "append_keys": "AppendKeys",
    "select_blocks": "SelectBlocks",
    "append_and_select": "AppendAndSelect",
    "open_sequences": "OpenSequences",
    "get_sequence": "GetSequence",
    "fork_sequence": "ForkSequence",
    "truncate_sequence": "TruncateSequence",
    "close_sequences": "CloseSequences",
}
"""The RPCs that requests of a stream are as, by their fields."""


_MOST_EVENTS = 1024


class StreamSession:
    """The requests of one stream.

    A reading task takes requests off the wire and hands them to the channel; `run` writes the answers. When
    `max_stream_requests` are unanswered or unwritten the reading pauses, and the wire holds the client back. Bytes take
    the channel's short way as they are. What that leaves is read here, and so is, while it is in flight, all behind it.

    Args:
        channel: the engine.
        caller: whose sequences the requests name, and whose RPC the bytes come from and go to.
        log: told of every request that did not go well on the short way, as `Stream/AppendKeys` and so on.

    Attributes:
        requests: requests so far, cancellations not counted.
        errors: how many of them were not answered OK.
        refusal: what ended the stream, where that was a message which is none.
    """

    def __init__(self, channel: Channel, caller: Caller, log: RequestLog) -> None:
        self.requests = 0
        self.errors = 0
        self.refusal: InvalidArgumentError | None = None
        self._channel = channel
        self._caller = caller
        self._log = log
        self._traces = log.traces
        limits = channel.limits
        self._allowed = limits.max_stream_requests
        self._longest_wait = limits.max_wait_ms / 1000
        self._unwritten = 0
        self._outbox: deque[bytes] = deque()
        self._events: deque[bytes] = deque(maxlen=_MOST_EVENTS)
        self._long_way: dict[int, PendingAnswer] = {}
        self._no_more = False
        self._something_to_write: asyncio.Future[None] | None = None
        self._place: asyncio.Future[None] | None = None
        self._reader = asyncio.create_task(self._read())

    async def run(self) -> None:
        """Writes events, and the answers as they finish, until no more requests come and none is in flight."""
        write, outbox, events = self._caller.context.write, self._outbox, self._events
        while True:
            while events:
                await write(events.popleft())
            while outbox:
                await write(outbox.popleft())
                self._unwritten -= 1
                if self._place is not None:
                    _wake(self._place)
            if events:
                continue
            if self._no_more and not self._unwritten:
                return
            self._something_to_write = asyncio.get_running_loop().create_future()
            await self._something_to_write
            self._something_to_write = None

    def tell(self, event: pb.Event) -> None:
        """Tells the peer of an event; of too many for a peer that does not read, the oldest are dropped."""
        if not self._no_more:
            self._events.append(pb.StreamResponse(event=event).SerializeToString())
            self._wake_writer()

    def finish(self) -> None:
        """Ends the stream once what is in flight is answered."""
        self._no_more = True
        self._wake_writer()

    async def close(self) -> None:
        """Gives up whatever is still in flight; the peer is gone or has all its answers."""
        self._reader.cancel()
        for number, rpc, began in self._channel.give_up_all(self):
            self._cancelled(number, rpc, began, None)
        for pending in list(self._long_way.values()):
            pending.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    def answered(self, number: int, response: bytes) -> None:
        """As `Asker.answered`."""
        del number
        self._outbox.append(response)
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._something_to_write is not None:
            _wake(self._something_to_write)

    def was_slow(self, number: int, rpc: str, began: float, came_to: CameTo) -> None:
        """As `Asker.was_slow`."""
        self._log.was_slow(rpc, "OK", (began, time.monotonic()), self._caller, came_to, number)

    def failed(
        self, number: int, rpc: str, began: float, error: BaseException, came_to: PendingAnswer | CameTo | None
    ) -> None:
        """As `Asker.failed`, and for what else goes wrong."""
        known: BlockdexError = as_blockdex_error(error, rpc, f"{self._caller.request_id}/{number}")
        self.errors += 1
        self._log.answered(rpc, known.code.name, began, self._caller, came_to, number)
        self.answered(number, pb.StreamResponse(request_id=number, error=status_of(known)).SerializeToString())

    async def _read(self) -> None:
        channel, tenant = self._channel, self._caller.tenant
        read, send, look = self._caller.context.read, channel.send, channel.look
        try:
            while (message := await read()) is not grpc.aio.EOF:
                if self._unwritten >= self._allowed:
                    await self._has_place(message)
                if self._traces or self._long_way or not send(self, STREAM, tenant, self._longest_wait, message):
                    self._begin(convert.parsed(pb.StreamRequest, message))
                else:
                    self.requests += 1
                    self._unwritten += 1
                    look()
                    if self._outbox:
                        # What is answered already is written before anything else is read.
                        await asyncio.sleep(0)
        except InvalidArgumentError as error:
            # Whose answer that would be nobody knows: those before are answered, and then the stream says it.
            self.refusal = error
        finally:
            self.finish()

    async def _has_place(self, message: bytes) -> None:
        """Waits until a request may be in flight; a cancellation, which takes no place, does not wait."""
        if convert.parsed(pb.StreamRequest, message).WhichOneof("request") == "cancel":
            return
        while self._unwritten >= self._allowed:
            self._place = asyncio.get_running_loop().create_future()
            await self._place
        self._place = None

    def _begin(self, request: pb.StreamRequest) -> None:
        """Sends a request the long way, or does what else it asks for."""
        began, number, kind = time.monotonic(), request.request_id, request.WhichOneof("request")
        if kind == "cancel":
            self._cancel(request.cancel.request_id)
            return
        rpc = _rpc(kind) if kind else "Stream"
        self.requests += 1
        self._unwritten += 1
        try:
            if number in self._long_way or self._channel.awaits(self, number):
                raise InvalidArgumentError(f"request_id: {number} is in flight already", Reason.DUPLICATE_REQUEST_ID)
            if kind is None:
                raise InvalidArgumentError(f"request {number}: is empty", Reason.EMPTY_REQUEST)
            body = getattr(request, kind)
            channel = self._channel
            message = convert.message_of(channel.spec, channel.limits, self._caller.tenant, body)
            timeout = request.timeout_ms / 1000 if request.timeout_ms else self._longest_wait
            pending = channel.submit(message, timeout)
        except Exception as error:
            self.failed(number, rpc, began, error, None)
            return
        self._long_way[number] = pending
        pending.add_done_callback(lambda _: self._end(number, kind, body, pending, began))

    def _end(self, number: int, kind: str, body: convert.WireRequest, pending: PendingAnswer, began: float) -> None:
        del self._long_way[number]
        rpc = _rpc(kind)
        if pending.cancelled():
            self._cancelled(number, rpc, began, pending)
        elif error := pending.exception():
            self.failed(number, rpc, began, error, pending)
        else:
            response: dict[str, Any] = {kind: convert.response_of(body, pending.result())}
            self._log.answered(rpc, "OK", began, self._caller, pending, number)
            self.answered(number, pb.StreamResponse(request_id=number, **response).SerializeToString())

    def _cancel(self, number: int) -> None:
        if pending := self._long_way.get(number):
            pending.cancel()
        elif given_up := self._channel.give_up(self, number):
            self._cancelled(number, given_up.rpc, given_up.began, None)

    def _cancelled(self, number: int, rpc: str, began: float, pending: PendingAnswer | None) -> None:
        error = CancelledError(f"request {number}: cancelled by its caller", Reason.CANCELLED)
        self.failed(number, rpc, began, error, pending)


def _rpc(kind: str) -> str:
    return f"Stream/{STREAM_RPCS[kind]}"


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
