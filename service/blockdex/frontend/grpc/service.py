"""`blockdex.v1.IndexerService`: one method per RPC; the engine behind the channel does the work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc

from blockdex.contract.errors import BlockdexError
from blockdex.contract.limits import check_epoch
from blockdex.contract.messages import Info
from blockdex.contract.version import VERSION
from blockdex.frontend.grpc import convert
from blockdex.frontend.grpc.call_context import REQUEST_ID_KEY, Caller, Context, RequestLog
from blockdex.frontend.grpc.status import DETAILS_KEY, as_blockdex_error, status_of
from blockdex.frontend.grpc.stream import StreamSession
from blockdex.ring.channel import TOKEN_RPCS, CameTo, Channel, PendingAnswer
from blockdex.v1 import indexer_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["IndexerService"]
TRANSPORTS = ("grpc",)
_REQUESTS: dict[str, type[convert.TokenWireRequest]] = {
    "AppendKeys": pb.AppendKeysRequest,
    "SelectBlocks": pb.SelectBlocksRequest,
    "AppendAndSelect": pb.AppendAndSelectRequest,
}
_Report = TypeVar("_Report", pb.GetInfoResponse, pb.GetStatsResponse)
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


class ShortCall(asyncio.Future[bytes]):
    """A unary RPC on the short way, as `Asker`; cancelled where its caller is gone."""

    def __init__(self, caller: Caller, log: RequestLog) -> None:
        super().__init__()
        self._caller = caller
        self._log = log

    def answered(self, number: int, response: bytes) -> None:
        """As `Asker.answered`."""
        del number
        if not self.done():
            self.set_result(response)

    def was_slow(self, number: int, rpc: str, began: float, came_to: CameTo) -> None:
        """As `Asker.was_slow`."""
        del number
        self._log.was_slow(rpc, "OK", (began, time.monotonic()), self._caller, came_to)

    def failed(self, number: int, rpc: str, began: float, error: BlockdexError, came_to: CameTo | None) -> None:
        """As `Asker.failed`."""
        del number
        if not self.done():
            self._log.answered(rpc, error.code.name, began, self._caller, came_to)
            self.set_exception(error)


class IndexerService:
    """Answers RPCs from a channel to the engine.

    Args:
        channel: the engine.
        log: told of every answered request and of streams.
    """

    def __init__(self, channel: Channel, log: RequestLog) -> None:
        self._channel = channel
        self._log = log
        self._sessions: set[StreamSession] = set()

    def handlers(self) -> grpc.GenericRpcHandler:
        """The methods by their names. Token calls come and go as bytes, the others as messages."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(getattr(self, name)) for name in TOKEN_RPCS
        }
        handlers["Stream"] = grpc.stream_stream_rpc_method_handler(self.Stream)
        for method in SERVICE.methods:
            if method.name not in handlers:
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                    getattr(self, method.name),
                    request_deserializer=getattr(pb, method.input_type.name).FromString,
                    response_serializer=getattr(pb, method.output_type.name).SerializeToString,
                )
        return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)

    def tell(self, event: pb.Event) -> None:
        """Tells every stream of an event."""
        for session in self._sessions:
            session.tell(event)

    def finish_streams(self) -> None:
        """Has every stream end once what it has in flight is answered."""
        for session in self._sessions:
            session.finish()

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        """What the server is, holds and can do."""

        async def answer(info: Info) -> pb.GetInfoResponse:
            return convert.info_response(info, VERSION, TRANSPORTS)

        return await self._report("GetInfo", request.header, context, answer)

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        """What the server did since it started."""

        async def answer(info: Info) -> pb.GetStatsResponse:
            return convert.stats_response(info.epoch, (await self._channel.stats()).totals())

        return await self._report("GetStats", request.header, context, answer)

    async def OpenSequences(self, request: pb.OpenSequencesRequest, context: Context) -> Any:
        """Opens empty sequences."""
        return await self._answer("OpenSequences", request, context, self._log.caller_of(context))

    async def GetSequence(self, request: pb.GetSequenceRequest, context: Context) -> Any:
        """Lengths and revisions of a sequence."""
        return await self._answer("GetSequence", request, context, self._log.caller_of(context))

    async def ForkSequence(self, request: pb.ForkSequenceRequest, context: Context) -> Any:
        """Opens a sequence as a prefix of another."""
        return await self._answer("ForkSequence", request, context, self._log.caller_of(context))

    async def TruncateSequence(self, request: pb.TruncateSequenceRequest, context: Context) -> Any:
        """Cuts a sequence."""
        return await self._answer("TruncateSequence", request, context, self._log.caller_of(context))

    async def CloseSequences(self, request: pb.CloseSequencesRequest, context: Context) -> Any:
        """Gives up sequences."""
        return await self._answer("CloseSequences", request, context, self._log.caller_of(context))

    async def AppendKeys(self, message: bytes, context: Context) -> bytes:
        """Writes index keys."""
        return await self._answer_tokens(0, message, context)

    async def SelectBlocks(self, message: bytes, context: Context) -> bytes:
        """Selects key blocks."""
        return await self._answer_tokens(1, message, context)

    async def AppendAndSelect(self, message: bytes, context: Context) -> bytes:
        """Writes index keys, then selects key blocks for the same tokens."""
        return await self._answer_tokens(2, message, context)

    async def Stream(self, requests: object, context: Context) -> None:
        """Any of the calls on sequences and their tokens, many in flight."""
        began, caller = time.monotonic(), self._log.caller_of(context)
        try:
            caller.checked_tenant()
        except BlockdexError as error:
            await _abort(context, error, caller.request_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, caller.request_id),))
        session = StreamSession(self._channel, caller, self._log)
        self._sessions.add(session)
        self._log.stream_opened(caller)
        try:
            await session.run()
            if refusal := session.refusal:
                self._log.answered("Stream", refusal.code.name, began, caller)
                await _abort(context, refusal, caller.request_id)
        finally:
            self._sessions.discard(session)
            await session.close()
            self._log.stream_closed(caller, time.monotonic() - began, session.requests, session.errors)

    async def _report(
        self, rpc: str, header: pb.RequestHeader, context: Context, answer: Callable[[Info], Awaitable[_Report]]
    ) -> _Report:
        """Answers what is asked about the server itself."""
        began, caller = time.monotonic(), self._log.caller_of(context)
        try:
            convert.check_header(header)
            info = await self._channel.info()
            check_epoch(header.epoch, info.epoch)
            response = await answer(info)
        except BlockdexError as error:
            self._log.answered(rpc, error.code.name, began, caller)
            await _abort(context, error, caller.request_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, caller.request_id),))
        self._log.answered(rpc, "OK", began, caller)
        return response

    async def _answer_tokens(self, rpc: int, message: bytes, context: Context) -> bytes:
        """Answers a token RPC, which comes and goes as bytes: by the short way where that takes it."""
        caller = self._log.caller_of(context)
        call = ShortCall(caller, self._log)
        if self._log.traces or not self._channel.send(call, rpc, caller.tenant, self._timeout(context), message):
            response = await self._answer(TOKEN_RPCS[rpc], message, context, caller)
            return bytes(response.SerializeToString())
        self._channel.look()
        try:
            response = await call
        except asyncio.CancelledError:
            if given_up := self._channel.give_up(call, 0):
                self._log.answered(given_up.rpc, "CANCELLED", given_up.began, caller)
            raise
        except BlockdexError as error:
            await _abort(context, error, caller.request_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, caller.request_id),))
        return response

    async def _answer(self, rpc: str, asked: convert.WireRequest | bytes, context: Context, caller: Caller) -> Any:
        began, channel = time.monotonic(), self._channel
        pending: PendingAnswer | None = None
        try:
            request = convert.parsed(_REQUESTS[rpc], asked) if isinstance(asked, bytes) else asked
            message = convert.message_of(channel.spec, channel.limits, caller.checked_tenant(), request)
            pending = channel.submit(message, self._timeout(context))
            response = convert.response_of(request, await pending)
        except asyncio.CancelledError:
            self._log.answered(rpc, "CANCELLED", began, caller, pending)
            raise
        except Exception as fault:
            error = as_blockdex_error(fault, rpc, caller.request_id)
            self._log.answered(rpc, error.code.name, began, caller, pending)
            await _abort(context, error, caller.request_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, caller.request_id),))
        self._log.answered(rpc, "OK", began, caller, pending)
        return response

    def _timeout(self, context: Context) -> float:
        remaining = context.time_remaining()
        return self._channel.limits.max_wait_ms / 1000 if remaining is None else float(remaining)


async def _abort(context: Context, error: BlockdexError, request_id: str) -> NoReturn:
    details = (DETAILS_KEY, status_of(error).SerializeToString())
    trailing = (details, (REQUEST_ID_KEY, request_id))
    await context.abort(_STATUS_CODES[int(error.code)], error.message, trailing_metadata=trailing)
