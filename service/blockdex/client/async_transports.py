"""How the asyncio client's calls reach the server: one RPC each, or together on a stream."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc

from blockdex.client.call import Call
from blockdex.client.core import Core
from blockdex.client.failures import another, error_of_call, error_of_stream
from blockdex.client.frames import answer_of, cancel_of, closed, event_of, milliseconds_of, number_of, response_of
from blockdex.client.paths import STREAM_PATH, UNARY_PATHS
from blockdex.contract.errors import BlockdexError, DeadlineExceededError, Reason, UnavailableError


class AsyncTransport(Protocol):
    """Sends calls; belongs to the loop of its first one."""

    async def send(self, call: Call[Any]) -> Any:
        """What the response to one attempt holds.

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
        self._methods: dict[str, Any] = {}

    @property
    def channel(self) -> grpc.aio.Channel:
        """Made by the first call: a channel belongs to the loop that it is made on."""
        if self._channel is None:
            self._channel = self._core.endpoint.aio_channel()
            self._methods = {rpc: self._channel.unary_unary(path) for rpc, path in UNARY_PATHS.items()}
        return self._channel

    async def send(self, call: Call[Any]) -> Any:
        """What the response to one attempt holds."""
        if self._closed:
            raise closed()
        _ = self.channel
        rpc = call.kind.rpc
        method = self._methods[rpc]
        try:
            answer: bytes = await method(call.request.message(), timeout=call.remaining(), metadata=self._core.metadata)
        except grpc.RpcError as failure:
            raise error_of_call(failure, f"{rpc} at {self._core.address}") from failure
        except asyncio.CancelledError:
            # gRPC says of a closed channel that its callers were cancelled; they were not.
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise closed() from None
            raise
        return response_of(call.kind, answer, self._core.codec)

    async def close(self) -> None:
        """Ends what is in flight and closes the channel."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()


class AsyncStreamTransport:
    """Calls share one stream, reopened by the next call after it broke; what the server says of itself does not."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._unary = AsyncUnaryTransport(core)
        self._closed = False
        self._exchange: _Exchange | None = None

    async def send(self, call: Call[Any]) -> Any:
        """What the response to one attempt holds."""
        if not call.kind.field:
            return await self._unary.send(call)
        if self._closed:
            raise closed()
        if self._exchange is None or self._exchange.broken:
            self._exchange = _Exchange(self._unary.channel, self._core)
        return await self._exchange.send(call)

    async def close(self) -> None:
        """Ends what is in flight, then stream and channel."""
        self._closed = True
        if self._exchange is not None:
            await self._exchange.close()
        await self._unary.close()


class _Exchange:
    """One stream, from its opening until it breaks. A task reads the answers and sets each caller's future.

    The server reads no further than as many requests as it allows unanswered, and so would not see behind them that one
    of them was cancelled. So no more are sent; the others wait here, where cancelling drops them.
    """

    def __init__(self, channel: grpc.aio.Channel, core: Core) -> None:
        self.broken = False
        self._core = core
        self._address = core.address
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._request_ids = itertools.count(1)
        self._allowed = 0
        self._unsent: OrderedDict[int, bytes] = OrderedDict()
        self._unanswered: set[int] = set()
        self._cancelled: deque[int] = deque()
        self._something_to_send = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        method: Any = channel.stream_stream(STREAM_PATH)
        self._responses = method(self._requests(), metadata=core.metadata)
        self._reader = self._loop.create_task(self._read(), name="blockdex-stream")

    async def send(self, call: Call[Any]) -> Any:
        assert call.ledger is not None
        timeout = call.remaining()
        self._allowed = call.ledger.info.limits.max_stream_requests
        request_id = next(self._request_ids)
        future = self._waiting[request_id] = self._loop.create_future()
        self._unsent[request_id] = call.request.frame(request_id, milliseconds_of(timeout))
        self._something_to_send.set()
        alarm = self._loop.call_later(timeout, _expire, future, call)
        try:
            return answer_of(call.kind, await future, self._core.codec)
        except (asyncio.CancelledError, DeadlineExceededError):
            self._give_up(request_id)
            raise
        finally:
            alarm.cancel()
            del self._waiting[request_id]

    async def close(self) -> None:
        self._closing = True
        self._responses.cancel()
        await self._reader

    def _give_up(self, request_id: int) -> None:
        self._unsent.pop(request_id, None)
        if request_id in self._unanswered:
            self._cancelled.append(request_id)
            self._something_to_send.set()

    async def _requests(self) -> AsyncIterator[bytes]:
        while not self.broken:
            if self._cancelled:
                yield cancel_of(self._cancelled.popleft())
            elif self._unsent and len(self._unanswered) < self._allowed:
                request_id, frame = self._unsent.popitem(last=False)
                self._unanswered.add(request_id)
                yield frame
            else:
                self._something_to_send.clear()
                await self._something_to_send.wait()

    async def _read(self) -> None:
        end: BlockdexError = UnavailableError(f"{self._address} ended it", Reason.UNREACHABLE)
        try:
            async for frame in self._responses:
                number = number_of(frame)
                if not number:
                    self._core.take_up(*event_of(frame))
                    continue
                self._unanswered.discard(number)
                if self._unsent:
                    self._something_to_send.set()
                future = self._waiting.get(number)
                if future is not None and not future.done():
                    future.set_result(frame)
        except grpc.RpcError as failure:
            end = error_of_call(failure, self._address)
        except BlockdexError as failure:
            end = failure
            self._responses.cancel()
        except asyncio.CancelledError:
            if not self._closing:
                raise
        finally:
            self.broken = True
            failed = closed() if self._closing else error_of_stream(end)
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(another(failed))
            self._something_to_send.set()


def _expire(future: asyncio.Future[bytes], call: Call[Any]) -> None:
    if not future.done():
        future.set_exception(call.late())
