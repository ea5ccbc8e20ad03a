"""One bidirectional stream: many requests in flight, each answered as it finishes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from blockdex.errors import BlockdexError, CancelledError, InvalidArgumentError, Reason
from blockdex.rpc import convert
from blockdex.rpc.caller import Caller, RequestLog
from blockdex.rpc.status import as_blockdex_error, status_of
from blockdex.transport.channel import Channel, PendingAnswer
from blockdex.v1 import indexer_pb2 as pb

_RPCS = {"append_keys": "AppendKeys", "select_blocks": "SelectBlocks", "append_and_select": "AppendAndSelect"}


class StreamSession:
    """The requests of one stream.

    A reading task takes requests off the wire and hands them to the channel; `responses` yields the answers. When
    `max_stream_requests` are unanswered or unwritten the reading pauses, and the wire holds the client back.

    Args:
        channel: the engine.
        caller: whose sequences the requests name.
        requests: what comes off the wire.
        log: told of every answered request, as `Stream/AppendKeys` and so on.

    Attributes:
        requests: requests so far, cancellations not counted.
        errors: how many of them were not answered OK.
    """

    def __init__(
        self,
        channel: Channel,
        caller: Caller,
        requests: AsyncIterator[pb.StreamRequest],
        log: RequestLog,
    ) -> None:
        self.requests = 0
        self.errors = 0
        self._channel = channel
        self._caller = caller
        self._requests = requests
        self._log = log
        self._in_flight: dict[int, PendingAnswer] = {}
        self._outbox: asyncio.Queue[pb.StreamResponse | None] = asyncio.Queue()
        self._places = asyncio.Semaphore(channel.limits.max_stream_requests)
        self._no_more = False
        self._reader = asyncio.create_task(self._read())

    async def responses(self) -> AsyncIterator[pb.StreamResponse]:
        """The answers, as they finish; ends when no more requests come and none is in flight."""
        while not (self._no_more and not self._in_flight and self._outbox.empty()):
            response = await self._outbox.get()
            if response is not None:
                self._places.release()
                yield response

    def finish(self) -> None:
        """Ends the stream once what is in flight is answered."""
        self._no_more = True
        self._outbox.put_nowait(None)

    async def close(self) -> None:
        """Gives up whatever is still in flight; the peer is gone or has all its answers."""
        self._reader.cancel()
        for future in list(self._in_flight.values()):
            future.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        try:
            async for request in self._requests:
                if request.WhichOneof("request") == "cancel":
                    self._cancel(request.cancel.request_id)
                    continue
                await self._places.acquire()
                self._begin(request)
        finally:
            self.finish()

    def _cancel(self, request_id: int) -> None:
        if future := self._in_flight.get(request_id):
            future.cancel()

    def _begin(self, request: pb.StreamRequest) -> None:
        began = time.monotonic()
        kind = request.WhichOneof("request")
        rpc = f"Stream/{_RPCS[kind]}" if kind else "Stream"
        self.requests += 1
        try:
            if request.request_id in self._in_flight:
                raise InvalidArgumentError(
                    f"request_id: {request.request_id} is in flight already", Reason.DUPLICATE_REQUEST_ID
                )
            if kind is None:
                raise InvalidArgumentError(f"request {request.request_id}: is empty", Reason.EMPTY_REQUEST)
            body = getattr(request, kind)
            channel, tenant = self._channel, self._caller.tenant
            message = convert.message_of(channel.spec, channel.limits, tenant, body)
            timeout_ms = request.timeout_ms or channel.limits.max_wait_ms
            future = channel.submit(message, timeout_ms / 1000)
        except Exception as error:
            self._fail(request.request_id, rpc, error, began)
            return
        self._in_flight[request.request_id] = future
        future.add_done_callback(lambda _: self._end(request.request_id, kind, body, future, began))

    def _end(
        self,
        request_id: int,
        kind: str,
        body: convert.TokenWireRequest,
        future: PendingAnswer,
        began: float,
    ) -> None:
        del self._in_flight[request_id]
        rpc = f"Stream/{_RPCS[kind]}"
        if future.cancelled():
            cancelled = CancelledError(f"request {request_id}: cancelled by its caller", Reason.CANCELLED)
            self._fail(request_id, rpc, cancelled, began, future)
            return
        if fault := future.exception():
            self._fail(request_id, rpc, fault, began, future)
            return
        answered: dict[str, Any] = {kind: convert.response_of(body, future.result())}
        self._outbox.put_nowait(pb.StreamResponse(request_id=request_id, **answered))
        self._log.answered(rpc, "OK", began, self._caller, future, request_id)

    def _fail(
        self, request_id: int, rpc: str, fault: BaseException, began: float, future: PendingAnswer | None = None
    ) -> None:
        error: BlockdexError = as_blockdex_error(fault, rpc, f"{self._caller.request_id}/{request_id}")
        self._outbox.put_nowait(pb.StreamResponse(request_id=request_id, error=status_of(error)))
        self.errors += 1
        self._log.answered(rpc, error.code.name, began, self._caller, future, request_id)
