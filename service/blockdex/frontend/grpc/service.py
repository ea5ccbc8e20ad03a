"""`blockdex.v1.IndexerService`: one method per RPC; the engine behind the channel does the work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from blockdex.contract.access import Identity, Right, unauthenticated
from blockdex.contract.credentials import Credentials
from blockdex.contract.errors import BlockdexError, CancelledError, InternalError, Reason
from blockdex.contract.limits import check_epoch
from blockdex.contract.messages import Info, SequenceState
from blockdex.contract.version import VERSION
from blockdex.frontend.grpc import convert
from blockdex.frontend.grpc.call_context import CallContext, RequestLog, call_of
from blockdex.frontend.grpc.parsing import checked
from blockdex.frontend.grpc.status import REQUEST_ID_KEY, Context, as_blockdex_error, refuse
from blockdex.frontend.grpc.stream import StreamSession
from blockdex.frontend.grpc.turns import Turns
from blockdex.ring.caller import TOKEN_RPCS, CameTo
from blockdex.ring.client import RingChannel
from blockdex.ring.events import Event, NewEpoch, SequencesEvicted
from blockdex.v1 import indexer_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["IndexerService"]
_TOKEN_REQUESTS: tuple[type[convert.TokenWireRequest], ...] = (
    pb.AppendKeysRequest,
    pb.SelectBlocksRequest,
    pb.AppendAndSelectRequest,
)
_Report = TypeVar("_Report", pb.GetInfoResponse, pb.GetStatsResponse)


class UnaryCall(asyncio.Future[Any]):
    """One unary RPC, as `Caller`: its response's bytes, or a sequence's state; cancelled where its peer is gone."""

    def __init__(self, call: CallContext, log: RequestLog) -> None:
        super().__init__()
        self._call = call
        self._log = log

    def answered(self, number: int, response: bytes) -> None:
        """As `Caller.answered`."""
        del number
        if not self.done():
            self.set_result(response)

    def changed(self, number: int, state: SequenceState) -> None:
        """As `Caller.changed`."""
        del number
        if not self.done():
            self.set_result(state)

    def took(self, number: int, rpc: str, came_to: CameTo) -> None:
        """As `Caller.took`."""
        del number
        self._log.took(rpc, "OK", came_to.received, self._call, came_to)

    def failed(self, number: int, rpc: str, began: float, error: BlockdexError, came_to: CameTo | None) -> None:
        """As `Caller.failed`."""
        del number
        if not self.done():
            self._log.answered(rpc, error, began, self._call, came_to)
            self.set_exception(error)


class IndexerService:
    """Answers RPCs from a channel to the engine.

    Args:
        channel: the engine.
        log: told of every answered request and of streams.
    """

    def __init__(self, channel: RingChannel, log: RequestLog) -> None:
        self._channel = channel
        self._log = log
        self._turns = Turns()
        self._sessions: set[StreamSession] = set()
        channel.tell_events(self._pass_on)

    def handlers(self) -> grpc.GenericRpcHandler:
        """The methods by their names. Token calls and streams come and go as bytes, the others as messages."""
        received, sent = self._log.received, self._log.sent
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(getattr(self, name), received, sent) for name in TOKEN_RPCS
        }
        handlers["Stream"] = grpc.stream_stream_rpc_method_handler(self.Stream, received, sent)
        for method in SERVICE.methods:
            if method.name not in handlers:
                handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
                    getattr(self, method.name),
                    request_deserializer=partial(_parsed, getattr(pb, method.input_type.name), received),
                    response_serializer=lambda response: sent(response.SerializeToString()),
                )
                handlers[method.name] = checked(method.name, handler, self._log, is_counted=True)
        return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)

    def tell(self, event: pb.Event, tenant: str | None = None) -> None:
        """Tells every stream of an event, or those of one tenant."""
        message = pb.StreamResponse(event=event).SerializeToString()
        for session in self._sessions:
            if tenant in {None, session.tenant}:
                session.tell(message)

    def _pass_on(self, event: Event) -> None:
        match event:
            case SequencesEvicted(tenant, ids):
                self.tell(pb.Event(sequences_evicted=pb.SequencesEvicted(sequence_ids=ids)), tenant)
            case NewEpoch(epoch):
                self.tell(pb.Event(new_epoch=pb.NewEpoch(epoch=epoch)))

    def take_up(self, credentials: Credentials) -> None:
        """Knows callers by others from now on; streams of who is not known any more end."""
        self._log.credentials = credentials
        for session in self._sessions:
            try:
                tenant = call_of(session.call.context, credentials).tenant()
                if tenant != session.tenant:
                    raise unauthenticated(f"the caller as {session.tenant!r} any more")
            except BlockdexError as error:
                session.refuse(error)

    def finish_streams(self) -> None:
        """Has every stream end once what it has in flight is answered."""
        for session in self._sessions:
            session.finish()

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse | None:
        """What the server is, holds and can do."""

        async def answer(info: Info, identity: Identity) -> pb.GetInfoResponse:
            return convert.info_response(info, VERSION, totals=identity.has(Right.METRICS))

        return await self._report("GetInfo", request.header, context, answer)

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse | None:
        """What the server did since it started."""

        async def answer(info: Info, identity: Identity) -> pb.GetStatsResponse:
            identity.check(Right.METRICS)
            return convert.stats_response(info.epoch, (await self._channel.stats()).totals())

        return await self._report("GetStats", request.header, context, answer)

    async def OpenSequences(self, request: pb.OpenSequencesRequest, context: Context) -> Any:
        """Opens empty sequences."""
        return await self._change("OpenSequences", request, context)

    async def GetSequence(self, request: pb.GetSequenceRequest, context: Context) -> Any:
        """Lengths and revisions of a sequence."""
        return await self._change("GetSequence", request, context)

    async def ForkSequence(self, request: pb.ForkSequenceRequest, context: Context) -> Any:
        """Opens a sequence as a prefix of another."""
        return await self._change("ForkSequence", request, context)

    async def TruncateSequence(self, request: pb.TruncateSequenceRequest, context: Context) -> Any:
        """Cuts a sequence."""
        return await self._change("TruncateSequence", request, context)

    async def CloseSequences(self, request: pb.CloseSequencesRequest, context: Context) -> Any:
        """Gives up sequences."""
        return await self._change("CloseSequences", request, context)

    async def CreatePool(self, request: pb.CreatePoolRequest, context: Context) -> Any:
        """Sets pages aside that an engine numbers."""
        return await self._change("CreatePool", request, context)

    async def SetPageTables(self, request: pb.SetPageTablesRequest, context: Context) -> Any:
        """Writes cells of a pool's table."""
        return await self._change("SetPageTables", request, context)

    async def ClosePool(self, request: pb.ClosePoolRequest, context: Context) -> Any:
        """Gives up a pool."""
        return await self._change("ClosePool", request, context)

    async def AppendKeys(self, message: bytes, context: Context) -> bytes:
        """Writes index keys."""
        return await self._token_call(0, message, context)

    async def SelectBlocks(self, message: bytes, context: Context) -> bytes:
        """Selects key blocks."""
        return await self._token_call(1, message, context)

    async def AppendAndSelect(self, message: bytes, context: Context) -> bytes:
        """Writes index keys, then selects key blocks for the same tokens."""
        return await self._token_call(2, message, context)

    async def Stream(self, requests: object, context: Context) -> None:
        """Any of the calls on sequences and their tokens, many in flight."""
        began, call = time.monotonic(), self._log.call_of(context)
        try:
            tenant = call.tenant()
        except BlockdexError as error:
            self._log.answered("Stream", error, began, call)
            refuse(context, error, call.request_id)
            return
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        session = StreamSession(self._channel, call, tenant, self._log, self._turns)
        self._sessions.add(session)
        self._log.stream_opened(call)
        try:
            await session.run()
            if refusal := session.refusal:
                self._log.answered("Stream", refusal, began, call)
                refuse(context, refusal, call.request_id)
        finally:
            self._sessions.discard(session)
            await session.close()
            self._log.stream_closed(call, time.monotonic() - began, session.requests, session.errors)

    async def _report(
        self,
        rpc: str,
        header: pb.RequestHeader,
        context: Context,
        answer: Callable[[Info, Identity], Awaitable[_Report]],
    ) -> _Report | None:
        """Answers what is asked about the server itself."""
        began, call = time.monotonic(), self._log.call_of(context)
        try:
            identity = call.identity()
            convert.check_header(header)
            await self._turn(identity.tenant)
            info = await self._channel.info()
            check_epoch(header.epoch, info.epoch)
            response = await answer(info, identity)
        except BlockdexError as error:
            self._log.answered(rpc, error, began, call)
            refuse(context, error, call.request_id)
            return None
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        self._log.answered(rpc, None, began, call)
        return response

    async def _token_call(self, rpc: int, message: bytes, context: Context) -> bytes:
        """Answers a token RPC, which comes and goes as bytes."""

        def send(caller: UnaryCall, tenant: str, timeout: float) -> None:
            send = self._channel.send
            if not send(caller, rpc, tenant, timeout, message):
                self._channel.check()
                request = convert.parsed(_TOKEN_REQUESTS[rpc], message)
                convert.check_header(request.header)
                if not send(caller, rpc, tenant, timeout, convert.usual(request)):
                    raise InternalError(f"{TOKEN_RPCS[rpc]}: cannot be read as protobuf wrote it", Reason.INTERNAL)
            self._channel.look()

        response: bytes | None = await self._answer(TOKEN_RPCS[rpc], send, context)
        return response or b""

    async def _change(
        self, rpc: str, request: convert.SequenceWireRequest, context: Context
    ) -> convert.SequenceWireResponse | None:
        """Answers an RPC about sequences or pools."""

        def send(caller: UnaryCall, tenant: str, timeout: float) -> None:
            message = convert.sequence_request(tenant, self._channel.limits.max_spans, request)
            self._channel.send_sequence(caller, 0, rpc, message, timeout)

        state = await self._answer(rpc, send, context)
        return None if state is None else convert.sequence_response(request, state)

    async def _answer(self, rpc: str, send: Callable[[UnaryCall, str, float], None], context: Context) -> Any:
        """Sends a request and waits for its answer; what goes wrong ends the call."""
        began, call = time.monotonic(), self._log.call_of(context)
        caller = UnaryCall(call, self._log)
        try:
            tenant = call.tenant()
            await self._turn(tenant)
            send(caller, tenant, self._timeout(context))
        except Exception as fault:
            caller.failed(0, rpc, began, as_blockdex_error(fault, rpc, call.request_id), None)
        try:
            answer = await caller
        except asyncio.CancelledError:
            if given_up := self._channel.give_up(caller, 0):
                error = CancelledError(f"{rpc}: cancelled by its caller", Reason.CANCELLED)
                self._log.answered(rpc, error, began, call, given_up.came_to)
            raise
        except BlockdexError as error:
            refuse(context, error, call.request_id)
            error.__traceback__ = None  # which would keep this frame, and what it holds
            return None
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        return answer

    async def _turn(self, tenant: str) -> None:
        if not self._turns.may_go(tenant):
            await self._turns.wait(tenant)

    def _timeout(self, context: Context) -> float:
        remaining = context.time_remaining()
        return self._channel.limits.max_wait_ms / 1000 if remaining is None else float(remaining)


def _parsed(kind: type[Message], received: Callable[[bytes], bytes], message: bytes) -> Message:
    return kind.FromString(received(message))
