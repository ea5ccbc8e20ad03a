"""Pools for asyncio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal, Unpack, overload

from blockdex.client.arguments import PoolAppendAndSelectArguments, PoolSelectArguments, spans_of
from blockdex.client.core import Core
from blockdex.client.pool import Pool
from blockdex.client.requests import NO_QUERIES, Arguments, Integers
from blockdex.client.tensors import Array


class AsyncPool:
    """A pool of an `AsyncClient`: `Pool` with `await`, each method included.

    Attributes:
        pool_id: unique among the pools of its tenant.
    """

    def __init__(self, core: Core, run: Callable[..., Awaitable[Any]], pool_id: int) -> None:
        self.pool_id = pool_id
        self._core = core
        self._run = run
        # Its selections return what `run` does: here, something to await.
        self._selections: Any = Pool(core, run, pool_id)

    async def set_page_tables(
        self,
        rows: Integers,
        page_ids: Integers,
        *,
        first_blocks: Integers = 0,
        counts: Integers | None = None,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Writes cells: all of them, or, on any error, none."""
        await self._run(timeout, self._core.set_page_tables, self.pool_id, rows, first_blocks, counts, page_ids, epoch)

    async def close(self, *, epoch: int | None = None, timeout: float | None = None) -> None:
        """Gives up the pool and its pages, once nothing reads them; closing what is closed already is fine."""
        await self._run(timeout, self._core.close_pool, self.pool_id, epoch)

    async def append_keys(
        self,
        layer: int,
        *,
        rows: Integers,
        starts: Integers,
        lengths: Integers | None = None,
        keys: Array,
        revision: int = 0,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Writes index keys of one layer into the pages of rows: all of them, or, on any error, none."""
        spans: Arguments = spans_of(layer, rows, lengths, starts, revision, epoch)
        await self._run(timeout, self._core.append_keys, (*spans, keys, *NO_QUERIES, False, self.pool_id, "blocks"))

    @overload
    async def select_blocks(
        self, layer: int, *, queries: Array, return_scores: Literal[False] = ..., **others: Unpack[PoolSelectArguments]
    ) -> Array: ...

    @overload
    async def select_blocks(
        self, layer: int, *, queries: Array, return_scores: Literal[True, "raw"], **others: Unpack[PoolSelectArguments]
    ) -> tuple[Array, Array]: ...

    async def select_blocks(self, layer: int, **arguments: Any) -> Any:
        """Selects the key blocks that each query reads."""
        return await self._selections.select_blocks(layer, **arguments)

    @overload
    async def append_and_select(
        self,
        layer: int,
        *,
        queries: Array,
        return_scores: Literal[False] = ...,
        **others: Unpack[PoolAppendAndSelectArguments],
    ) -> Array: ...

    @overload
    async def append_and_select(
        self,
        layer: int,
        *,
        queries: Array,
        return_scores: Literal[True, "raw"],
        **others: Unpack[PoolAppendAndSelectArguments],
    ) -> tuple[Array, Array]: ...

    async def append_and_select(self, layer: int, **arguments: Any) -> Any:
        """`append_keys`, then `select_blocks`, for the same tokens: what an engine does once a layer."""
        return await self._selections.append_and_select(layer, **arguments)
