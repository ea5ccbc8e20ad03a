"""Pools for threads: pages that an engine numbers, under page tables that it manages itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

from blockdex.client.arguments import PoolAppendAndSelectArguments, PoolSelectArguments, spans_of
from blockdex.client.core import Core
from blockdex.client.requests import NO_QUERIES, Arguments, Ids, Integers, Scores
from blockdex.client.tensors import Array
from blockdex.contract.messages import Order


class Pool:
    """A pool of a `Client`, which makes it: `create_pool` sets one aside, `pool` is one that is there already.

    A pool has pages, which the engine numbers from 0, and a table of rows, one for each sequence that the engine runs
    at a time. A cell of a row says which page holds a block. The engine fills cells with `set_page_tables` as its own
    block tables change, and names rows where other calls name sequences.

    There are no lengths: a call may begin at any position, and a query reads all positions up to its own. So what lies
    in the pages is the engine's business: prefixes that rows share, tokens that were drafted and rejected, rows and
    pages that are used again. A call that needs a cell which was never set fails (PAGE_NOT_SET) before it writes
    anything.

    A revision is one number of the pool and layer. Each append carries the next one; every rank of an engine may send
    the same append with the same revision, of which the first is written and the others are done already. A selection
    waits for its revision.

    What came before `set_page_tables` reads the old cells, what comes after the new ones; a prefill that is on its way
    is waited for. Every method raises the exceptions of `blockdex.contract.errors`.

    Attributes:
        pool_id: unique among the pools of its tenant.
    """

    def __init__(self, core: Core, run: Callable[..., Any], pool_id: int) -> None:
        self.pool_id = pool_id
        self._core = core
        self._run = run

    def set_page_tables(
        self,
        rows: Integers,
        page_ids: Integers,
        *,
        first_blocks: Integers = 0,
        counts: Integers | None = None,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Writes cells: all of them, or, on any error, none.

        Args:
            rows: `[N]`; one may be named more than once, and later runs of cells win.
            page_ids: `[sum of counts]`, the pool's page numbers, run after run; or `[N, count]`.
            first_blocks: `[N]`, block of each run's first cell, or one for all.
            counts: `[N]`, cells of each run; None = equally many.
            epoch: None = the one that the client knows, 0 = any.
            timeout: seconds; None = the client's.
        """
        self._run(timeout, self._core.set_page_tables, self.pool_id, rows, first_blocks, counts, page_ids, epoch)

    def close(self, *, epoch: int | None = None, timeout: float | None = None) -> None:
        """Gives up the pool and its pages, once nothing reads them; closing what is closed already is fine."""
        self._run(timeout, self._core.close_pool, self.pool_id, epoch)

    def append_keys(
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
        """Writes index keys of one layer into the pages of rows: all of them, or, on any error, none.

        Args:
            layer: 0 to L-1.
            rows: `[N]`, no two alike.
            starts: `[N]`, position of the first token of each.
            lengths: `[N]`, tokens of each; may be left out for a single row. T is their sum.
            keys: `[T, D]`, row after row: numpy or torch, bfloat16, float16, float32 or float8_e4m3fn.
            revision: of the pool and layer; 0 = unchecked.
            epoch: None = the one that the client knows, 0 = any.
            timeout: seconds; None = the client's.
        """
        spans: Arguments = spans_of(layer, rows, lengths, starts, revision, epoch)
        self._run(timeout, self._core.append_keys, (*spans, keys, *NO_QUERIES, False, self.pool_id, "blocks"))

    @overload
    def select_blocks(
        self,
        layer: int,
        *,
        queries: Array,
        return_scores: Literal[False] = ...,
        **others: Unpack[PoolSelectArguments],
    ) -> Array: ...

    @overload
    def select_blocks(
        self, layer: int, *, queries: Array, return_scores: Literal[True, "raw"], **others: Unpack[PoolSelectArguments]
    ) -> tuple[Array, Array]: ...

    def select_blocks(
        self,
        layer: int,
        *,
        rows: Integers,
        starts: Integers,
        lengths: Integers | None = None,
        queries: Any,
        order: Order = "ascending",
        return_scores: Scores = False,
        ids: Ids = "blocks",
        revision: int = 0,
        first_head: int = 0,
        num_heads: int = 0,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Selects the key blocks that each query reads.

        Args:
            layer: 0 to L-1.
            rows: `[N]`, no two alike.
            starts: `[N]`, position of the first query of each.
            lengths: `[N]`, queries of each; may be left out for a single row. T is their sum.
            queries: `[T, num_heads, D]`, row after row, as `keys` of `append_keys` otherwise.
            order: of a row of the answer, as in `Client.select_blocks`.
            return_scores: as in `Client.select_blocks`.
            ids: `blocks`: positions of the blocks inside their rows; `pages`: the numbers of the pool's pages that hold
                them, each where its block id would stand.
            revision: of the pool and layer, which is waited for until the timeout; 0 = whatever is there.
            first_head: first head that `queries` holds.
            num_heads: heads that `queries` holds; 0 = all from `first_head`.
            epoch: None = the one that the client knows, 0 = any.
            timeout: seconds; None = the client's.

        Returns:
            int32 `[T, num_heads, topk]`, -1 in unused places at the end of a row; with `return_scores` also float32
            scores of that shape. Of the kind of `queries`, and on their device.
        """
        spans: Arguments = spans_of(layer, rows, lengths, starts, revision, epoch)
        selection = (queries, first_head, num_heads, order, return_scores, False)
        arguments = (*spans, None, *selection, False, self.pool_id, ids)
        return self._run(timeout, self._core.select_blocks, arguments, queries, return_scores, None)

    @overload
    def append_and_select(
        self,
        layer: int,
        *,
        queries: Array,
        return_scores: Literal[False] = ...,
        **others: Unpack[PoolAppendAndSelectArguments],
    ) -> Array: ...

    @overload
    def append_and_select(
        self,
        layer: int,
        *,
        queries: Array,
        return_scores: Literal[True, "raw"],
        **others: Unpack[PoolAppendAndSelectArguments],
    ) -> tuple[Array, Array]: ...

    def append_and_select(
        self,
        layer: int,
        *,
        rows: Integers,
        starts: Integers,
        lengths: Integers | None = None,
        keys: Any,
        queries: Any,
        order: Order = "ascending",
        return_scores: Scores = False,
        ids: Ids = "blocks",
        revision: int = 0,
        first_head: int = 0,
        num_heads: int = 0,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> Any:
        """`append_keys`, then `select_blocks`, for the same tokens: what an engine does once a layer.

        Arguments and answer are theirs; the queries are those of the tokens appended.
        """
        spans: Arguments = spans_of(layer, rows, lengths, starts, revision, epoch)
        selection = (queries, first_head, num_heads, order, return_scores, False)
        arguments = (*spans, keys, *selection, False, self.pool_id, ids)
        return self._run(timeout, self._core.append_and_select, arguments, queries, return_scores, None)
