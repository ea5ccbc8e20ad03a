"""How the asyncio client's calls reach the server: one RPC each, or data calls together on a stream."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc

from blockdex.client.call import Call
from blockdex.client.core import CHANNEL_OPTIONS, Core
from blockdex.client.failures import another, error_of_call, error_of_stream
from blockdex.client.frames import answer_of, cancel_of, closed, frame_of
from blockdex.errors import BlockdexError, DeadlineExceededError, Reason, UnavailableError
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1.indexer_pb2_grpc import IndexerServiceStub


class AsyncTransport(Protocol):
    """Sends calls; belongs to the loop of its first one."""

    async def send(self, call: Call[Any]) -> Any:
        """The response to one attempt.

        Raises:
            BlockdexError: the attempt failed.
        """
        ...

    async def close(self) -> None:
        """Ends what is in flight and lets go of the connection."""
        ...


class AsyncUnaryTransport:
    """Every call is an RPC of its own."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._closed = False
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None

    @property
    def stub(self) -> Any:
        """The server's methods. Made by the first call: a channel belongs to the loop that it is made on."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._core.address, options=CHANNEL_OPTIONS)
            self._stub = IndexerServiceStub(self._channel)
        return self._stub

    async def send(self, call: Call[Any]) -> Any:
        """The response to one attempt."""
        if self._closed:
            raise closed()
        method = getattr(self.stub, call.rpc)
        try:
            return await method(call.request, timeout=call.remaining(), metadata=self._core.metadata)
        except grpc.RpcError as failure:
            raise error_of_call(failure, f"{call.rpc} at {self._core.address}") from failure
        except asyncio.CancelledError:
            # gRPC says of a closed channel that its callers were cancelled; they were not.
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise closed() from None
            raise

    async def close(self) -> None:
        """Ends what is in flight and closes the channel."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()


class AsyncStreamTransport:
    """Data calls share one stream, reopened by the next call after it broke; the others are RPCs of their own."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._unary = AsyncUnaryTransport(core)
        self._closed = False
        self._exchange: _Exchange | None = None

    async def send(self, call: Call[Any]) -> Any:
        """The response to one attempt."""
        if call.envelope is None:
            return await self._unary.send(call)
        if self._closed:
            raise closed()
        if self._exchange is None or self._exchange.broken:
            self._exchange = _Exchange(self._unary.stub.Stream, self._core)
        return await self._exchange.send(call)

    async def close(self) -> None:
        """Ends what is in flight, then stream and channel."""
        self._closed = True
        if self._exchange is not None:
            await self._exchange.close()
        await self._unary.close()


class _Exchange:
    """One stream, from its opening until it breaks. A task reads the answers and sets each caller's future."""

    def __init__(self, open_stream: Callable[..., Any], core: Core) -> None:
        self.broken = False
        self._address = core.address
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._request_ids = itertools.count(1)
        self._outbox: asyncio.Queue[pb.StreamRequest | None] = asyncio.Queue()
        self._waiting: dict[int, asyncio.Future[pb.StreamResponse]] = {}
        self._responses = open_stream(self._requests(), metadata=core.metadata)
        self._reader = self._loop.create_task(self._read(), name="blockdex-stream")

    async def send(self, call: Call[Any]) -> Any:
        timeout = call.remaining()
        request_id = next(self._request_ids)
        future = self._waiting[request_id] = self._loop.create_future()
        self._outbox.put_nowait(frame_of(call, request_id, timeout))
        alarm = self._loop.call_later(timeout, _expire, future, call)
        try:
            return answer_of(await future)
        except (asyncio.CancelledError, DeadlineExceededError):
            self._outbox.put_nowait(cancel_of(request_id))
            raise
        finally:
            alarm.cancel()
            del self._waiting[request_id]

    async def close(self) -> None:
        self._closing = True
        self._responses.cancel()
        await self._reader

    async def _requests(self) -> AsyncIterator[pb.StreamRequest]:
        while (frame := await self._outbox.get()) is not None:
            # A caller that has gone while its request was queued here leaves nothing to send.
            if frame.request_id in self._waiting or frame.HasField("cancel"):
                yield frame

    async def _read(self) -> None:
        end: BlockdexError = UnavailableError(f"{self._address} ended it", Reason.UNREACHABLE)
        try:
            async for frame in self._responses:
                future = self._waiting.get(frame.request_id)
                if future is not None and not future.done():
                    future.set_result(frame)
        except grpc.RpcError as failure:
            end = error_of_call(failure, self._address)
        except asyncio.CancelledError:
            if not self._closing:
                raise
        finally:
            self.broken = True
            failed = closed() if self._closing else error_of_stream(end)
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(another(failed))
            self._outbox.put_nowait(None)


def _expire(future: asyncio.Future[pb.StreamResponse], call: Call[Any]) -> None:
    if not future.done():
        future.set_exception(call.late())
