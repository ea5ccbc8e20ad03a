"""Scores of runs of many queries: rows (query, head) by keys on the tensor cores, a maximum for each row and block."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.tools.tensor_descriptor import TensorDescriptor

from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.triton.launch import pdl_launch, wait_for_previous
from blockdex_kernels.triton.numbers import scale_to_e4m3, to_float
from blockdex_kernels.triton.pages import Pages, load_block
from blockdex_kernels.triton.runs import Runs

ITEM_FIELDS = tl.constexpr(9)

_LEAST_RANGE = 16
"""Blocks that a program scores, about, where there are enough of them."""
_MOST_ROUNDS = 8
"""Programs that a multiprocessor runs one after the other."""

RUN_NUMBERS = 8
"""int32 numbers that describe a run which is planned on the device: see `plan_run`."""


# What changes from call to call must not ask for another variant of a kernel, compiled while an engine waits: callers
# that hold some of the heads share a read with any others.
@triton.jit(do_not_specialize=["num_rows", "heads"])
def _cast_queries_kernel(
    queries,
    rows,
    unscales,
    num_rows,
    heads,
    stride_t,
    stride_h,
    stride_d,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Packs queries of any dtype and strides as rows of what is scored."""
    wait_for_previous(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    dim = tl.arange(0, DIM)
    at = (row // heads).to(tl.int64) * stride_t + (row % heads) * stride_h
    values = to_float(tl.load(queries + at[:, None] + dim[None, :] * stride_d, mask=inside[:, None], other=0))
    if SCALED:
        values, undo = scale_to_e4m3(values)
        tl.store(unscales + row, undo, mask=inside)
    tl.store(
        rows + row.to(tl.int64)[:, None] * DIM + dim[None, :], values.to(rows.dtype.element_ty), mask=inside[:, None]
    )


@triton.jit
def _load_rows(rows, first, end, ROWS: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        return rows.load([first, 0])
    else:
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
        return tl.load(rows + at, mask=(row < end)[:, None], other=0.0)


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["page_table", "positions"])
def _prefill_scores_kernel(
    rows,
    pages,
    scores,
    positions,
    items,
    page_table,
    page_stride,
    width,
    table_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program scores a tile of 2 * ROWS rows of one run against a range of its blocks: see `score_prefill`."""
    wait_for_previous(PDL)
    item = items + tl.program_id(0) * ITEM_FIELDS
    first = tl.load(item)
    end = tl.load(item + 1)
    shift = tl.load(item + 2)
    run = tl.load(item + 3)
    layer = tl.load(item + 4)
    begin = tl.load(item + 5)
    stop = tl.load(item + 6)
    masked_stop = tl.load(item + 7)
    heads = tl.load(item + 8)

    upper = first + tl.arange(0, ROWS)
    lower = upper + ROWS
    upper_position = (upper + shift) // heads
    lower_position = (lower + shift) // heads
    tl.store(positions + upper, upper_position, mask=upper < end)
    tl.store(positions + lower, lower_position, mask=lower < end)
    cells = page_table + run.to(tl.int64) * table_stride
    upper_scores = scores + upper.to(tl.int64) * width
    lower_scores = scores + lower.to(tl.int64) * width
    if UPCAST == 0 and begin < stop:
        upper_rows = _load_rows(rows, first, end, ROWS, DIM, TMA)
        lower_rows = _load_rows(rows, first + ROWS, end, ROWS, DIM, TMA)
        # The tensor cores work on one half while the maxima of the other are taken: each iteration takes those of the
        # lower half of the block before. The first block is peeled off, so that accumulators are only ever written by
        # the tensor cores; otherwise the assembler runs them one after the other.
        keys = load_block(pages, tl.load(cells + begin), layer, page_stride, BLOCK, DIM, UPCAST, TMA)
        upper_products = tl.dot(upper_rows, tl.trans(keys))
        tl.store(upper_scores + begin, tl.max(upper_products, 1), mask=upper < end)
        products = tl.dot(lower_rows, tl.trans(keys))
        page = tl.load(cells + begin + 1, mask=begin + 1 < stop, other=0)
        for block in tl.range(begin + 1, stop, num_stages=STAGES):
            keys = load_block(pages, page, layer, page_stride, BLOCK, DIM, UPCAST, TMA)
            page = tl.load(cells + block + 1, mask=block + 1 < stop, other=0)
            upper_products = tl.dot(upper_rows, tl.trans(keys))
            lower_max = tl.max(products, 1)
            products = tl.dot(lower_rows, tl.trans(keys))
            tl.store(upper_scores + block, tl.max(upper_products, 1), mask=upper < end)
            tl.store(lower_scores + block - 1, lower_max, mask=lower < end)
        tl.store(lower_scores + stop - 1, tl.max(products, 1), mask=lower < end)
        begin = stop
    # Blocks that some query sees in part, which there are only where the last visible block is not forced; and all of
    # them where keys are upcast: those pass through shared memory that the next block's overwrite.
    for block in tl.range(begin, tl.maximum(stop, masked_stop), num_stages=1):
        keys = load_block(pages, tl.load(cells + block), layer, page_stride, BLOCK, DIM, UPCAST, TMA)
        key_position = block * BLOCK + tl.arange(0, BLOCK)
        for half in tl.static_range(2):
            half_rows = _load_rows(rows, first + half * ROWS, end, ROWS, DIM, TMA)
            products = tl.dot(half_rows, tl.trans(keys))
            row = lower if half else upper
            if MASKED:
                position = lower_position if half else upper_position
                products = tl.where(key_position[None, :] <= position[:, None], products, float("-inf"))
            tl.store((lower_scores if half else upper_scores) + block, tl.max(products, 1), mask=row < end)


@triton.jit
def _plan_run_kernel(
    numbers,
    items,
    positions,
    num_items,
    num_rows,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    PLACES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program plans some of the items, and marks some of the rows as padding: see `plan_run`."""
    wait_for_previous(PDL)
    layer = tl.load(numbers)
    start = tl.load(numbers + 1)
    heads = tl.maximum(tl.load(numbers + 5), 1)
    end = tl.load(numbers + 2) * heads
    tiles = tl.maximum(tl.load(numbers + 3), 1)
    ranges = tl.load(numbers + 4)
    number = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    tl.store(positions + number, tl.full([AT_ONCE], -1, tl.int32), mask=number < num_rows)
    # Neighbours in time share their keys.
    nth = number // tiles
    first = number % tiles * TILE
    visible = (start + (tl.minimum(first + TILE, end) - 1) // heads) // BLOCK + 1
    needed_end = tl.maximum(visible - LOCAL, INIT)
    needed_end = tl.where(needed_end - INIT <= PLACES, INIT, needed_end)
    whole_end = needed_end
    if LOCAL == 0:
        whole_end = tl.minimum(tl.maximum((start + first // heads + 1) // BLOCK, INIT), needed_end)
    blocks = whole_end - INIT
    used = nth < ranges  # None is where there are no tokens, as before a graph's first replay.
    ranges = tl.maximum(ranges, 1)
    last = nth + 1 == ranges
    item = items + number * ITEM_FIELDS
    inside = number < num_items
    tl.store(item, first, mask=inside)
    tl.store(item + 1, tl.where(used, end, 0), mask=inside)
    tl.store(item + 2, start * heads + tl.zeros_like(number), mask=inside)
    tl.store(item + 3, tl.zeros_like(number), mask=inside)
    tl.store(item + 4, layer + tl.zeros_like(number), mask=inside)
    tl.store(item + 5, tl.where(used, INIT + blocks * nth // ranges, 0), mask=inside)
    tl.store(item + 6, tl.where(used, INIT + blocks * (nth + 1) // ranges, 0), mask=inside)
    tl.store(item + 7, tl.where(last, needed_end, 0), mask=inside)
    tl.store(item + 8, heads + tl.zeros_like(number), mask=inside)


def cut(runs: Runs, heads: int, spec: IndexSpec, *, tile: int, programs: int, every_block: bool) -> NDArray[np.int32]:
    """Cuts runs into tiles of rows, and the blocks of the tiles into ranges about equally long.

    Args:
        runs: whose packed rows the tiles cover, from row 0.
        heads: rows of a token.
        spec: the indexer.
        tile: rows of a tile.
        programs: how many run at once.
        every_block: whether scores are wanted even where all candidates find a place.

    Returns:
        Int32 `[N, 9]`, a row for each program: first row, end of the run's rows, what to add to a row and divide by the
        heads to get its position, row of the page table, layer, first block, end of the blocks that no row ranks in
        part, end of those that some row does (or 0), heads.
    """
    run_rows = runs.lengths.astype(np.int64) * heads
    first_rows = np.cumsum(run_rows) - run_rows
    tiles = -(-run_rows // tile)
    run = np.repeat(np.arange(len(tiles)), tiles)
    nth = np.arange(len(run)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = first_rows[run] + nth * tile
    end = (first_rows + run_rows)[run]
    shift = (runs.starts * heads - first_rows)[run]
    first_position = (first + shift) // heads
    last_position = (np.minimum(first + tile, end) - 1 + shift) // heads
    visible = last_position // spec.block_size + 1
    needed_end = np.maximum(visible - spec.local_blocks, spec.init_blocks)
    places = spec.topk - spec.init_blocks - spec.local_blocks
    if not every_block:
        needed_end = np.where(needed_end - spec.init_blocks <= places, spec.init_blocks, needed_end)
    whole_end = needed_end
    if spec.local_blocks == 0:
        # Otherwise no query ranks a block that it sees in part.
        whole_end = np.clip((first_position + 1) // spec.block_size, spec.init_blocks, needed_end)
    blocks = whole_end - spec.init_blocks
    # Few enough that each gets a long run of blocks, many enough that the last to end does not end much later.
    rounds = np.clip(blocks.sum() // (programs * _LEAST_RANGE), 1, _MOST_ROUNDS)
    size = max(-(-int(blocks.sum()) // int(programs * rounds)), 1)
    ranges = np.maximum(-(-blocks // size), 1)
    of = np.repeat(np.arange(len(ranges)), ranges)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(ranges) - ranges, ranges)
    begin = spec.init_blocks + blocks[of] * nth // ranges[of]
    stop = spec.init_blocks + blocks[of] * (nth + 1) // ranges[of]
    masked_stop = np.where(nth + 1 == ranges[of], needed_end[of], 0)
    table_rows, layers = runs.rows[run[of]], runs.layers[run[of]]
    every_heads = np.full_like(begin, heads)
    columns = (first[of], end[of], shift[of], table_rows, layers, begin, stop, masked_stop, every_heads)
    items = np.stack(columns, axis=1).astype(np.int32)
    # Neighbours in time share their keys.
    return items[np.argsort(begin, kind="stable")]


def split(rows: int, blocks: int, *, tile: int, programs: int) -> tuple[int, int]:
    """How one run is cut, as `cut` does it, in numbers: its tiles, and the ranges of blocks of each.

    Args:
        rows: of the run, tokens times heads.
        blocks: that its last row sees.
        tile: rows of a tile.
        programs: how many run at once.
    """
    tiles = -(-rows // tile)
    most = max(min(_MOST_ROUNDS * programs // tiles, blocks // _LEAST_RANGE), 1)
    # All ranges take about as long: the best are as many as keep all programs busy in the last round too.
    counts = range(most, most // 2, -1)
    return tiles, max(counts, key=lambda ranges: tiles * ranges / -(-tiles * ranges // programs))


def max_items(rows: int, *, tile: int, programs: int) -> int:
    """Most items that a run of so many rows is split into."""
    return max(_MOST_ROUNDS * programs, -(-rows // tile))


def plan_run(
    numbers: torch.Tensor,
    items: torch.Tensor,
    positions: torch.Tensor,
    spec: IndexSpec,
    *,
    tile: int,
    pdl: bool,
) -> None:
    """Plans one run on the device, so that a CUDA graph can hold its launch: what `cut` does on the host.

    Args:
        numbers: int32 `[RUN_NUMBERS]`: layer, start, tokens, tiles, ranges (as `split` says), heads, and nothing.
        items: int32 `[max_items, 9]`, written: those of the run, and behind them some that do nothing.
        positions: int32 `[rows]`, written: -1, what those of padding stay.
        spec: the indexer.
        tile: rows of a tile.
        pdl: whether to launch as a programmatic dependent.
    """
    at_once = 256
    _plan_run_kernel[(triton.cdiv(max(len(items), len(positions)), at_once),)](
        numbers,
        items,
        positions,
        len(items),
        len(positions),
        TILE=tile,
        BLOCK=spec.block_size,
        INIT=spec.init_blocks,
        LOCAL=spec.local_blocks,
        PLACES=spec.topk - spec.init_blocks - spec.local_blocks,
        AT_ONCE=at_once,
        PDL=pdl,
        num_warps=4,
        **pdl_launch(pdl),
    )


def cast_queries(queries: torch.Tensor, rows: torch.Tensor, unscales: torch.Tensor | None, *, pdl: bool) -> None:
    """Packs queries as rows of what is scored, in one launch.

    Args:
        queries: `[T, H, D]`, any dtype and strides.
        rows: `[T * H, D]`, bfloat16, or uint8 that holds e4m3; written.
        unscales: float32 `[T * H]`, written where rows are scaled into the fp8 range: what undoes it. Or None.
        pdl: whether to launch as a programmatic dependent.
    """
    num_rows, dim = rows.shape
    at_once = 16
    _cast_queries_kernel[(triton.cdiv(num_rows, at_once),)](
        queries.view(torch.uint8) if queries.dtype == torch.float8_e4m3fn else queries,
        rows,
        unscales if unscales is not None else rows,
        num_rows,
        queries.shape[1],
        *queries.stride(),
        DIM=dim,
        ROWS=at_once,
        SCALED=unscales is not None,
        PDL=pdl,
        num_warps=4,
        **pdl_launch(pdl),
    )


def score_prefill(
    rows: torch.Tensor,
    page_table: torch.Tensor,
    pages: Pages,
    spec: IndexSpec,
    items: torch.Tensor,
    scores: torch.Tensor,
    positions: torch.Tensor,
    *,
    tile: int,
    warps: int,
    stages: int,
    pdl: bool,
) -> None:
    """Scores the blocks of runs of many queries, in one launch.

    Args:
        rows: `[T * H, D]`, contiguous, of the dtype that the pages are scored in.
        page_table: int32 `[R, max_blocks]`.
        pages: the keys.
        spec: the indexer.
        items: int32 `[N, 9]` on the device, as `cut` returns them.
        scores: float32 `[T * H, width]`, written where a query ranks a block by its score, and beyond that anything.
        positions: int32 `[T * H]`, written: each row's position.
        tile: rows of a tile, as the items were cut; a multiple of 2.
        warps: of a program.
        stages: blocks of keys that a program has room for.
        pdl: whether to launch as a programmatic dependent.
    """
    argument = TensorDescriptor.from_tensor(rows, [tile // 2, rows.shape[1]]) if pages.tma else rows
    _prefill_scores_kernel[(len(items),)](
        argument,
        pages.argument,
        scores,
        positions,
        items,
        page_table,
        pages.page_stride,
        scores.shape[1],
        page_table.stride(0),
        ROWS=tile // 2,
        BLOCK=spec.block_size,
        DIM=rows.shape[1],
        MASKED=spec.local_blocks == 0,
        UPCAST=pages.upcast,
        TMA=pages.tma,
        PDL=pdl,
        STAGES=stages,
        num_warps=warps,
        **pdl_launch(pdl),
    )
