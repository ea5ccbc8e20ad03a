"""`blockdex.v1.IndexerService`: one method per RPC; the engine behind the channel does the work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from blockdex import __version__
from blockdex.errors import BlockdexError, InvalidArgumentError, Reason
from blockdex.rpc import convert
from blockdex.rpc.status import DETAILS_KEY, as_blockdex_error, status_of
from blockdex.rpc.stream import StreamSession
from blockdex.transport.channel import Channel
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc

Observe = Callable[[str, str, float], None]
"""Called once per answered request with the RPC's name, the code's name and the seconds it took."""

Context = grpc.aio.ServicerContext[Any, Any]

TENANT_KEY = "blockdex-tenant"
DEFAULT_TENANT = "default"
TRANSPORTS = ("grpc",)
_MAX_TENANT_CHARACTERS = 256
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


def tenant_of(context: Context) -> str:
    """The caller's identity as its transport proved it, else what its metadata says, else `default`.

    Raises:
        InvalidArgumentError: the metadata entry is empty or too long.
    """
    identities = context.peer_identities()
    if identities:
        return str(next(iter(identities)), "utf-8")
    for key, value in context.invocation_metadata() or ():
        if key == TENANT_KEY:
            if not 1 <= len(value) <= _MAX_TENANT_CHARACTERS:
                raise InvalidArgumentError(
                    f"{TENANT_KEY}: must have 1 to {_MAX_TENANT_CHARACTERS} characters, got {len(value)}",
                    Reason.INVALID_TENANT,
                )
            return str(value)
    return DEFAULT_TENANT


class IndexerService(pb_grpc.IndexerServiceServicer):
    """Answers RPCs from a channel to the engine.

    Args:
        channel: the engine.
        observe: told of every answered request.
    """

    def __init__(self, channel: Channel, observe: Observe) -> None:
        self._channel = channel
        self._observe = observe
        self._sessions: set[StreamSession] = set()

    def finish_streams(self) -> None:
        """Has every stream end once what it has in flight is answered."""
        for session in self._sessions:
            session.finish()

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        """What the server is, holds and can do."""
        began = time.monotonic()
        response = convert.info_response(self._channel.info(), __version__, TRANSPORTS)
        self._observe("GetInfo", "OK", time.monotonic() - began)
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
        try:
            tenant = tenant_of(context)
        except BlockdexError as error:
            await _abort(context, error)
        session = StreamSession(self._channel, tenant, request_iterator, self._observe)
        self._sessions.add(session)
        try:
            async for response in session.responses():
                yield response
        finally:
            self._sessions.discard(session)
            await session.close()

    async def _answer(self, rpc: str, request: convert.WireRequest, context: Context) -> Any:
        began = time.monotonic()
        try:
            channel = self._channel
            message = convert.message_of(channel.spec, channel.limits, tenant_of(context), request)
            answer = await channel.submit(message, self._timeout(context))
            response = convert.response_of(request, answer)
        except asyncio.CancelledError:
            self._observe(rpc, "CANCELLED", time.monotonic() - began)
            raise
        except Exception as fault:
            error = as_blockdex_error(fault, rpc)
            self._observe(rpc, error.code.name, time.monotonic() - began)
            await _abort(context, error)
        self._observe(rpc, "OK", time.monotonic() - began)
        return response

    def _timeout(self, context: Context) -> float:
        remaining = context.time_remaining()
        return self._channel.limits.max_wait_ms / 1000 if remaining is None else float(remaining)


async def _abort(context: Context, error: BlockdexError) -> None:
    details = (DETAILS_KEY, status_of(error).SerializeToString())
    await context.abort(_STATUS_CODES[int(error.code)], error.message, trailing_metadata=(details,))
