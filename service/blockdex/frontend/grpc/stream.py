"""One bidirectional stream: many requests in flight, each answered as it finishes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import grpc

from blockdex.contract.errors import BlockdexError, CancelledError, InternalError, InvalidArgumentError, Reason
from blockdex.contract.messages import SequenceState
from blockdex.frontend.grpc import convert
from blockdex.frontend.grpc.call_context import CallContext, RequestLog
from blockdex.frontend.grpc.status import as_blockdex_error, status_of
from blockdex.frontend.grpc.turns import Turns
from blockdex.ring.caller import STREAM, CameTo
from blockdex.ring.client import RingChannel
from blockdex.v1 import indexer_pb2 as pb

_TOKEN_RPCS = {
    "append_keys": "Stream/AppendKeys",
    "select_blocks": "Stream/SelectBlocks",
    "append_and_select": "Stream/AppendAndSelect",
}
_SEQUENCE_RPCS = {
    "open_sequences": "Stream/OpenSequences",
    "get_sequence": "Stream/GetSequence",
    "fork_sequence": "Stream/ForkSequence",
    "truncate_sequence": "Stream/TruncateSequence",
    "close_sequences": "Stream/CloseSequences",
    "create_pool": "Stream/CreatePool",
    "set_page_tables": "Stream/SetPageTables",
    "close_pool": "Stream/ClosePool",
}
STREAM_RPCS = _TOKEN_RPCS | _SEQUENCE_RPCS
"""What requests of a stream are, by their fields."""

_MOST_EVENTS = 1024
_LONGEST_CANCEL = 1024
"""Bytes; what is longer is none, so that no tensor is read to find out."""


class StreamSession:
    """The requests of one stream.

    A reading task takes requests off the wire and hands them to the channel; `run` writes the answers. When
    `max_stream_requests` are unanswered or unwritten, or the tenant's share of the room for requests is used up, the
    reading pauses, and the wire holds the client back. It is the
    `Caller` of its requests; their bytes go to the channel as they are, and what that does not read is read here.

    Args:
        channel: the engine.
        call: whose RPC the bytes come from and go to.
        tenant: whose sequences the requests name.
        log: told of every request that did not go well, as `Stream/AppendKeys` and so on.
        turns: of the loop.

    Attributes:
        call: as above.
        tenant: as above.
        requests: requests so far, cancellations not counted.
        errors: how many of them were not answered OK.
        refusal: what ended the stream: a message which is none, or a caller who is not known any more.
    """

    def __init__(self, channel: RingChannel, call: CallContext, tenant: str, log: RequestLog, turns: Turns) -> None:
        self.call = call
        self.tenant = tenant
        self.requests = 0
        self.errors = 0
        self.refusal: BlockdexError | None = None
        self._channel = channel
        self._log = log
        self._turns = turns
        limits = channel.limits
        self._allowed = limits.max_stream_requests
        self._longest_wait = limits.max_wait_ms / 1000
        self._unwritten = 0
        self._outbox: deque[bytes] = deque()
        self._events: deque[bytes] = deque(maxlen=_MOST_EVENTS)
        self._about_sequences: dict[int, tuple[str, convert.SequenceWireRequest]] = {}
        self._no_more = False
        self._something_to_write: asyncio.Future[None] | None = None
        self._place: asyncio.Future[None] | None = None
        self._reader = asyncio.create_task(self._read())

    async def run(self) -> None:
        """Writes events, and the answers as they finish, until no more requests come and none is in flight."""
        write, outbox, events = self.call.context.write, self._outbox, self._events
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

    def tell(self, event: bytes) -> None:
        """Sends an event's bytes; of too many for a peer that does not read, the oldest are dropped."""
        if not self._no_more:
            self._events.append(event)
            self._wake_writer()

    def finish(self) -> None:
        """Ends the stream once what is in flight is answered."""
        self._no_more = True
        self._wake_writer()

    def refuse(self, error: BlockdexError) -> None:
        """Reads no more, and ends the stream so once what is in flight is answered."""
        self.refusal = error
        self._reader.cancel()

    async def close(self) -> None:
        """Gives up whatever is still in flight; the peer is gone or has all its answers."""
        self._reader.cancel()
        for number, rpc, came_to in self._channel.give_up_all(self):
            self._cancelled(number, rpc, came_to)
        await asyncio.gather(self._reader, return_exceptions=True)

    def answered(self, number: int, response: bytes) -> None:
        """As `Caller.answered`."""
        del number
        self._outbox.append(response)
        self._wake_writer()

    def changed(self, number: int, state: SequenceState) -> None:
        """As `Caller.changed`."""
        kind, request = self._about_sequences.pop(number)
        response: dict[str, Any] = {kind: convert.sequence_response(request, state)}
        self.answered(number, pb.StreamResponse(request_id=number, **response).SerializeToString())

    def took(self, number: int, rpc: str, came_to: CameTo) -> None:
        """As `Caller.took`."""
        self._log.took(rpc, "OK", came_to.received, self.call, came_to, number)

    def failed(self, number: int, rpc: str, began: float, error: BlockdexError, came_to: CameTo | None) -> None:
        """As `Caller.failed`."""
        if came_to is not None:
            # Else it was refused before it was sent, perhaps for having another one's number.
            self._about_sequences.pop(number, None)
        self.errors += 1
        self._log.answered(rpc, error, began, self.call, came_to, number)
        self.answered(number, pb.StreamResponse(request_id=number, error=status_of(error)).SerializeToString())

    def _wake_writer(self) -> None:
        if self._something_to_write is not None:
            _wake(self._something_to_write)

    async def _read(self) -> None:
        channel, tenant = self._channel, self.tenant
        read, send, look, may_go = self.call.context.read, channel.send, channel.look, self._turns.may_go
        try:
            while (message := await read()) is not grpc.aio.EOF:
                if not may_go(tenant):
                    await self._turns.wait(tenant)
                if self._unwritten >= self._allowed or not channel.may_begin(tenant, len(message)):
                    await self._has_place(message)
                if send(self, STREAM, tenant, self._longest_wait, message):
                    self.requests += 1
                    self._unwritten += 1
                    look()
                    if self._outbox:
                        # What is answered already is written before anything else is read.
                        await asyncio.sleep(0)
                else:
                    self._read_again(convert.parsed(pb.StreamRequest, message))
        except InvalidArgumentError as error:
            # Whose answer that would be nobody knows: those before are answered, and then the stream says it.
            self.refusal = error
        finally:
            self.finish()

    async def _has_place(self, message: bytes) -> None:
        """Waits until a request may be in flight; a cancellation, which takes no place, does not wait."""
        size, kind = len(message), None
        if size <= _LONGEST_CANCEL:
            kind = convert.parsed(pb.StreamRequest, message).WhichOneof("request")
        while kind != "cancel":
            if self._unwritten >= self._allowed:
                self._place = asyncio.get_running_loop().create_future()
                await self._place
                self._place = None
            elif self._channel.may_begin(self.tenant, size) or not await self._channel.share_freed(self.tenant):
                return

    def _read_again(self, request: pb.StreamRequest) -> None:
        """Does what a request asks for that the channel has not read."""
        began, number, kind = time.monotonic(), request.request_id, request.WhichOneof("request")
        if kind == "cancel":
            if given_up := self._channel.give_up(self, request.cancel.request_id):
                self._cancelled(*given_up)
            return
        rpc = STREAM_RPCS[kind] if kind else "Stream"
        self.requests += 1
        self._unwritten += 1
        try:
            self._channel.check()
            if kind is None:
                raise InvalidArgumentError(f"request {number}: is empty", Reason.EMPTY_REQUEST)
            self._send_again(kind, request)
        except Exception as fault:
            error = as_blockdex_error(fault, rpc, f"{self.call.request_id}/{number}")
            self.failed(number, rpc, began, error, None)

    def _send_again(self, kind: str, request: pb.StreamRequest) -> None:
        channel, body, tenant = self._channel, getattr(request, kind), self.tenant
        if kind in _TOKEN_RPCS:
            convert.check_header(body.header)
            if not channel.send(self, STREAM, tenant, self._longest_wait, convert.usual(request)):
                raise InternalError(f"{kind}: cannot be read as protobuf wrote it", Reason.INTERNAL)
            return
        message = convert.sequence_request(tenant, channel.limits.max_spans, body)
        timeout = request.timeout_ms / 1000 if request.timeout_ms else self._longest_wait
        number = request.request_id
        if channel.send_sequence(self, number, _SEQUENCE_RPCS[kind], message, timeout):
            self._about_sequences[number] = kind, body

    def _cancelled(self, number: int, rpc: str, came_to: CameTo) -> None:
        error = CancelledError(f"request {number}: cancelled by its caller", Reason.CANCELLED)
        self.failed(number, rpc, came_to.received, error, came_to)


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
