"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Unpack, overload

from blockdex.client.answers import Info, SequenceState
from blockdex.client.arguments import AppendAndSelectArguments, SelectArguments
from blockdex.client.async_pool import AsyncPool
from blockdex.client.async_ring_transport import AsyncRingTransport
from blockdex.client.async_transports import AsyncStreamTransport, AsyncTransport, AsyncUnaryTransport
from blockdex.client.call import Call, Result
from blockdex.client.core import DEFAULT_TIMEOUT, Core
from blockdex.client.device_channels import ChannelOptions, open_channel, reopen_channel
from blockdex.client.endpoint import TLS, Endpoint, Token
from blockdex.client.forking import is_forked
from blockdex.client.ledger import Ledger
from blockdex.client.requests import NO_POOL, NO_QUERIES, Integers, Scores
from blockdex.client.shared_regions import SharedRegion, new_region, no_regions
from blockdex.client.tensors import Array
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import Order, Totals

if TYPE_CHECKING:
    from blockdex.device_channel.channel import DeviceChannel

Arguments = ParamSpec("Arguments")

_TRANSPORTS: dict[str, Callable[[Core], AsyncTransport]] = {
    "ring": AsyncRingTransport,
    "stream": AsyncStreamTransport,
    "unary": AsyncUnaryTransport,
}


class AsyncClient:
    """A blockdex server, for asyncio: `Client` with `await`.

    A client belongs to the loop of its first call, whose tasks may share it; another loop may not use it. Cancelling a
    task gives up its request, whose outcome is then unknown.

    Its calls share one stream, so that those on one sequence take effect in the order they were made. Everything else
    is as `Client` says, each method included.
    """

    def __init__(
        self,
        address: str,
        *,
        tenant: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        transport: Literal["ring", "stream", "unary"] = "stream",
        tls: TLS | bool | None = None,
        token: Token | None = None,
    ) -> None:
        if transport not in _TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(_TRANSPORTS)}, got {transport!r}")
        self._core = Core(Endpoint(address, tls, token), tenant, timeout)
        self.transport = transport
        self.why = ""
        self.channel_device: str | None = None
        self._transport = _TRANSPORTS[transport](self._core)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Fails what is in flight, and every later call, with `CancelledError`. Sequences stay open."""
        if not is_forked():
            await self._transport.close()

    async def info(self, *, timeout: float | None = None) -> Info:
        """What the server is, holds and can do, asked anew."""
        return (await self._complete(self._core.get_info(self._core.deadline(timeout)))).info

    async def stats(self, *, timeout: float | None = None) -> Totals:
        """What the server did since it started."""
        return await self._complete(self._core.get_stats(self._core.deadline(timeout)))

    async def device_channel(self, **options: Unpack[ChannelOptions]) -> DeviceChannel:
        """A channel of its own to a server on the same host; its calls return at once, and are not awaited."""
        return await asyncio.to_thread(partial(open_channel, self._core, await self.info(), **options))

    async def reopen_channel(self, channel: DeviceChannel) -> None:
        """Opens a channel again that is dead, after a restart of the server, say: captured graphs stay valid."""
        await asyncio.to_thread(reopen_channel, self._core, await self.info(), channel)

    async def share(self, num_bytes: int, *, device: str | None = None, timeout: float | None = None) -> SharedRegion:
        """New memory that the server reads and writes where it lies: keys, queries and `out` in it are not copied."""
        ring, deadline = self._ring(), self._core.deadline(timeout)
        region = new_region(num_bytes, device)
        self._core.share(region)
        try:
            await ring.update_regions((await self._ledger(deadline)).info, deadline)
        except BaseException:
            self._core.release(region)
            raise
        return region

    async def release(self, region: SharedRegion, *, timeout: float | None = None) -> None:
        """Shares a region no more; the server has given it back when this returns."""
        ring, deadline = self._ring(), self._core.deadline(timeout)
        self._core.release(region)
        await ring.update_regions((await self._ledger(deadline)).info, deadline)

    async def open_sequence(
        self, sequence_id: int, *, lease_seconds: int = 0, epoch: int | None = None, timeout: float | None = None
    ) -> None:
        """Opens an empty sequence."""
        await self._run(timeout, self._core.open_sequences, sequence_id, lease_seconds, epoch)

    async def open_sequences(
        self,
        sequences: Integers,
        *,
        lease_seconds: Integers = 0,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Opens empty sequences, all or, on any error, none."""
        await self._run(timeout, self._core.open_sequences, sequences, lease_seconds, epoch)

    async def get_sequence(
        self, sequence_id: int, *, epoch: int | None = None, timeout: float | None = None
    ) -> SequenceState:
        """Length and revision of every layer; settles what the client does not know."""
        return await self._run(timeout, self._core.get_sequence, sequence_id, epoch)

    async def fork_sequence(
        self, parent_id: int, child_id: int, length: int, *, epoch: int | None = None, timeout: float | None = None
    ) -> tuple[int, ...]:
        """Opens a child that starts as the first `length` tokens of its parent; the answer is its length by layer."""
        return await self._run(timeout, self._core.fork_sequence, parent_id, child_id, length, epoch)

    async def truncate_sequence(
        self, sequence_id: int, length: int, *, epoch: int | None = None, timeout: float | None = None
    ) -> tuple[int, ...]:
        """Cuts every layer to at most `length` tokens; the answer is the length by layer."""
        return await self._run(timeout, self._core.truncate_sequence, sequence_id, length, epoch)

    async def close_sequence(self, sequence_id: int, *, epoch: int | None = None, timeout: float | None = None) -> None:
        """Gives up a sequence; closing what is closed already is fine."""
        await self._run(timeout, self._core.close_sequences, sequence_id, epoch)

    async def close_sequences(
        self, sequences: Integers, *, epoch: int | None = None, timeout: float | None = None
    ) -> None:
        """Gives up sequences, no two alike; closing what is closed already is fine."""
        await self._run(timeout, self._core.close_sequences, sequences, epoch)

    async def create_pool(
        self,
        pool_id: int,
        *,
        num_pages: int,
        num_rows: int,
        max_blocks: int,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> AsyncPool:
        """Sets pages aside that the caller numbers, and a table of rows that name them: see `Pool`."""
        await self._run(timeout, self._core.create_pool, pool_id, num_pages, num_rows, max_blocks, epoch)
        return self.pool(pool_id)

    def pool(self, pool_id: int) -> AsyncPool:
        """A pool that is there already: created by another rank of the engine, say. Asks the server nothing."""
        return AsyncPool(self._core, self._run, self._core.pool_id(pool_id))

    async def append_keys(
        self,
        layer: int,
        *,
        sequences: Integers,
        lengths: Integers | None = None,
        keys: Array,
        starts: Integers | None = None,
        revisions: Integers | None = None,
        rollback: bool = False,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Writes index keys of one layer for one or many sequences: all of them, or, on any error, none."""
        arguments = (layer, sequences, lengths, starts, revisions, epoch, keys, *NO_QUERIES, rollback, *NO_POOL)
        await self._run(timeout, self._core.append_keys, arguments)

    @overload
    async def select_blocks(
        self,
        layer: int,
        *,
        queries: Array,
        return_scores: Literal[False] = ...,
        **others: Unpack[SelectArguments],
    ) -> Array: ...

    @overload
    async def select_blocks(
        self, layer: int, *, queries: Array, return_scores: Literal[True, "raw"], **others: Unpack[SelectArguments]
    ) -> tuple[Array, Array]: ...

    async def select_blocks(
        self,
        layer: int,
        *,
        sequences: Integers,
        lengths: Integers | None = None,
        queries: Any,
        starts: Integers | None = None,
        order: Order = "ascending",
        return_scores: Scores = False,
        revisions: Integers | None = None,
        first_head: int = 0,
        num_heads: int = 0,
        wait_for_keys: bool = False,
        out: Any = None,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Selects the key blocks that each query reads."""
        selection = (queries, first_head, num_heads, order, return_scores, wait_for_keys)
        arguments = (layer, sequences, lengths, starts, revisions, epoch, None, *selection, False, *NO_POOL)
        return await self._run(timeout, self._core.select_blocks, arguments, queries, return_scores, out)

    @overload
    async def append_and_select(
        self,
        layer: int,
        *,
        queries: Array,
        return_scores: Literal[False] = ...,
        **others: Unpack[AppendAndSelectArguments],
    ) -> Array: ...

    @overload
    async def append_and_select(
        self,
        layer: int,
        *,
        queries: Array,
        return_scores: Literal[True, "raw"],
        **others: Unpack[AppendAndSelectArguments],
    ) -> tuple[Array, Array]: ...

    async def append_and_select(
        self,
        layer: int,
        *,
        sequences: Integers,
        lengths: Integers | None = None,
        keys: Any,
        queries: Any,
        starts: Integers | None = None,
        order: Order = "ascending",
        return_scores: Scores = False,
        revisions: Integers | None = None,
        first_head: int = 0,
        num_heads: int = 0,
        rollback: bool = False,
        out: Any = None,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> Any:
        """`append_keys`, then `select_blocks`, for the same tokens: what an engine does once a layer.

        Arguments and answer are theirs; the queries are those of the tokens appended.
        """
        selection = (queries, first_head, num_heads, order, return_scores, False)
        arguments = (layer, sequences, lengths, starts, revisions, epoch, keys, *selection, rollback, *NO_POOL)
        return await self._run(timeout, self._core.append_and_select, arguments, queries, return_scores, out)

    def _ring(self) -> AsyncRingTransport:
        if not isinstance(self._transport, AsyncRingTransport):
            raise no_regions(self.transport)
        return self._transport

    async def _run(
        self,
        timeout: float | None,
        build: Callable[Concatenate[Ledger, float, Arguments], Call[Result]],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        deadline = self._core.deadline(timeout)
        return await self._complete(build(await self._ledger(deadline), deadline, *args, **kwargs))

    async def _ledger(self, deadline: float) -> Ledger:
        ledger = self._core.ledger
        return await self._complete(self._core.get_info(deadline)) if ledger is None else ledger

    async def _complete(self, call: Call[Result]) -> Result:
        try:
            while True:
                try:
                    response = await self._transport.send(call)
                except BlockdexError as error:
                    await asyncio.sleep(call.retry_after(error))
                else:
                    return call.finish(response)
        except BaseException as failure:
            call.failed(failure)
            raise
