"""A stream to a real server from an asyncio client that has nothing but the generated stub."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc
from support.wire import TIMEOUT, Refusal, Wire, in_stream, refusal_of_status


class OpenStream:
    """One stream from an asyncio client.

    Attributes:
        events: what the server told beside its answers, in order, as far as it was read.
    """

    def __init__(self, call: Any) -> None:
        self.call = call
        self.events: list[pb.Event] = []

    async def send(self, request_id: int, request: Any, timeout_ms: int = 0) -> None:
        """Sends a request."""
        await asyncio.wait_for(self.call.write(in_stream(request_id, request, timeout_ms)), TIMEOUT)

    async def receive(self) -> pb.StreamResponse:
        """The next answer."""
        response = await self._read()
        assert isinstance(response, pb.StreamResponse), "the stream has ended"
        return response

    async def _read(self) -> object:
        while True:
            response = await asyncio.wait_for(self.call.read(), TIMEOUT)
            if not (isinstance(response, pb.StreamResponse) and response.WhichOneof("response") == "event"):
                return response
            self.events.append(response.event)

    async def refusal(self, request_id: int) -> Refusal:
        """What the next answer, which is that request's, refuses it with."""
        response = await self.receive()
        assert response.request_id == request_id
        assert response.WhichOneof("response") == "error"
        return refusal_of_status(response.error)

    async def cancel(self, request_id: int) -> None:
        """Gives a request up."""
        await self.send(0, pb.CancelRequest(request_id=request_id))

    async def ends(self) -> None:
        """Asserts that no answer is left and that the stream ended well."""
        assert await self._read() is grpc.aio.EOF
        assert await self.call.code() == grpc.StatusCode.OK


@asynccontextmanager
async def open_stream(tenant: Wire) -> AsyncIterator[OpenStream]:
    """Opens a stream for a tenant; what is still in flight at the end is given up."""
    async with grpc.aio.insecure_channel(tenant.address) as channel:
        call = pb_grpc.IndexerServiceStub(channel).Stream(metadata=tenant.metadata)
        yield OpenStream(call)
        call.cancel()
