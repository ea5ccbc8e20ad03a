"""`blockdex.v1.IndexerService`: one method per RPC; the engine behind the channel does the work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from blockdex import __version__
from blockdex.errors import BlockdexError
from blockdex.rpc import convert
from blockdex.rpc.caller import REQUEST_ID_KEY, Context, RequestLog
from blockdex.rpc.status import DETAILS_KEY, as_blockdex_error, status_of
from blockdex.rpc.stream import StreamSession
from blockdex.transport.channel import Channel, PendingAnswer
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc

TRANSPORTS = ("grpc",)
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


class IndexerService(pb_grpc.IndexerServiceServicer):
    """Answers RPCs from a channel to the engine.

    Args:
        channel: the engine.
        log: told of every answered request and of streams.
    """

    def __init__(self, channel: Channel, log: RequestLog) -> None:
        self._channel = channel
        self._log = log
        self._sessions: set[StreamSession] = set()

    def finish_streams(self) -> None:
        """Has every stream end once what it has in flight is answered."""
        for session in self._sessions:
            session.finish()

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        """What the server is, holds and can do."""
        began, caller = time.monotonic(), self._log.caller_of(context)
        try:
            response = convert.info_response(await self._channel.info(), __version__, TRANSPORTS)
        except BlockdexError as error:
            self._log.answered("GetInfo", error.code.name, began, caller)
            await _abort(context, error, caller.request_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, caller.request_id),))
        self._log.answered("GetInfo", "OK", began, caller)
        return response

    async def OpenSequence(self, request: pb.OpenSequenceRequest, context: Context) -> Any:
        """Opens an empty sequence."""
        return await self._answer("OpenSequence", request, context)

    async def GetSequence(self, request: pb.GetSequenceRequest, context: Context) -> Any:
        """Lengths and revisions of a sequence."""
        return await self._answer("GetSequence", request, context)

    async def ForkSequence(self, request: pb.ForkSequenceRequest, context: Context) -> Any:
        """Opens a sequence as a prefix of another."""
        return await self._answer("ForkSequence", request, context)

    async def TruncateSequence(self, request: pb.TruncateSequenceRequest, context: Context) -> Any:
        """Cuts a sequence."""
        return await self._answer("TruncateSequence", request, context)

    async def CloseSequence(self, request: pb.CloseSequenceRequest, context: Context) -> Any:
        """Gives up a sequence."""
        return await self._answer("CloseSequence", request, context)

    async def AppendKeys(self, request: pb.AppendKeysRequest, context: Context) -> Any:
        """Writes index keys."""
        return await self._answer("AppendKeys", request, context)

    async def SelectBlocks(self, request: pb.SelectBlocksRequest, context: Context) -> Any:
        """Selects key blocks."""
        return await self._answer("SelectBlocks", request, context)

    async def AppendAndSelect(self, request: pb.AppendAndSelectRequest, context: Context) -> Any:
        """Writes index keys, then selects key blocks for the same tokens."""
        return await self._answer("AppendAndSelect", request, context)

    async def Stream(
        self, request_iterator: AsyncIterator[pb.StreamRequest], context: Context
    ) -> AsyncIterator[pb.StreamResponse]:
        """Any of the three token calls, many in flight."""
        began, caller = time.monotonic(), self._log.caller_of(context)
        try:
            caller.checked_tenant()
        except BlockdexError as error:
            await _abort(context, error, caller.request_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, caller.request_id),))
        session = StreamSession(self._channel, caller, request_iterator, self._log)
        self._sessions.add(session)
        self._log.stream_opened(caller)
        try:
            async for response in session.responses():
                yield response
        finally:
            self._sessions.discard(session)
            await session.close()
            self._log.stream_closed(caller, time.monotonic() - began, session.requests, session.errors)

    async def _answer(self, rpc: str, request: convert.WireRequest, context: Context) -> Any:
        began, caller = time.monotonic(), self._log.caller_of(context)
        channel = self._channel
        pending: PendingAnswer | None = None
        try:
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
