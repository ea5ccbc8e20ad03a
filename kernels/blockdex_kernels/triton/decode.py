"""Scores of runs of few queries: the keys of a run are read once for all its queries and heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockdex_kernels.interface import RUN_SELECTS, RUN_WANTS_SCORES, Spans
from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.triton.launch import padded_runs, pdl_launch, wait_for_previous
from blockdex_kernels.triton.numbers import scale_to_e4m3, to_float
from blockdex_kernels.triton.pages import Pages, load_block

MAX_COLUMNS = 128
"""Most rows (queries times heads) of a run that one read of its keys serves."""


@triton.jit
def _load_queries(
    queries,
    first_token,
    skipped,
    num_rows,
    heads,
    stride_t,
    stride_h,
    stride_d,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
):
    """float32 `[COLUMNS, DIM]`: rows (query, head) from one of a token's on, zero beyond `num_rows`."""
    column = tl.arange(0, COLUMNS)
    row = skipped + column
    at = (first_token + row // heads).to(tl.int64) * stride_t + (row % heads) * stride_h
    at = at[:, None] + tl.arange(0, DIM)[None, :] * stride_d
    return to_float(tl.load(queries + at, mask=(column < num_rows)[:, None], other=0))


@triton.jit
def _maxima(rows, keys, block, position, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """float32 `[COLUMNS]`: the greatest product of each row with the keys, those behind its position left out.

    The tensor cores take 64 rows of their first operand at least: the keys where there are fewer queries than that.
    """
    key_position = block * BLOCK + tl.arange(0, BLOCK)
    if COLUMNS >= 64:
        products = tl.dot(rows, tl.trans(keys))
        if MASKED:
            products = tl.where(key_position[None, :] <= position[:, None], products, float("-inf"))
        return tl.max(products, 1)
    else:
        products = tl.dot(keys, tl.trans(rows))
        if MASKED:
            products = tl.where(key_position[:, None] <= position[None, :], products, float("-inf"))
        return tl.max(products, 0)


@triton.jit
def _add(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5


@triton.jit
def _only(own, a, b, c, d, e, f):
    """The one element of each of six int32 vectors, in one reduction."""
    return tl.reduce(
        (
            tl.where(own, a, 0),
            tl.where(own, b, 0),
            tl.where(own, c, 0),
            tl.where(own, d, 0),
            tl.where(own, e, 0),
            tl.where(own, f, 0),
        ),
        0,
        _add,
    )


@triton.jit
def _share(
    lengths,
    starts,
    flags,
    num_runs,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    ALL: tl.constexpr,
    SELECTS: tl.constexpr,
    SCORES: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Which blocks are the program's, where those of all runs are laid end to end: from `at` to `stop`.

    Also the length, start and flags of every run, the blocks of it that are scored, and the last of them in the line.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    run = tl.arange(0, RUNS)
    length = tl.load(lengths + run, mask=run < num_runs, other=0, cache_modifier=CACHE)
    start = tl.load(starts + run, mask=run < num_runs, other=0, cache_modifier=CACHE)
    flag = tl.full([RUNS], SELECTS, tl.int32)
    if flags is not None:
        flag = tl.load(flags + run, mask=run < num_runs, other=0, cache_modifier=CACHE)
    # Blocks that some query of the run ranks: what is forced for all needs no score.
    visible = tl.where((length > 0) & ((flag & SELECTS) != 0), (start + length - 1) // BLOCK + 1, 0)
    needed = tl.maximum(visible - LOCAL - INIT, 0)
    if not ALL:
        # Nor does anything where all candidates find a place.
        needed = tl.where(needed > PLACES, needed, 0)
    # Who wants scores gets them of every block.
    needed = tl.where((flag & SCORES) != 0, visible, needed)
    needed_end = tl.cumsum(needed, 0)
    total = tl.max(needed_end, 0)
    share = total // num_programs
    longer = total - share * num_programs
    at = program * share + tl.minimum(program, longer)
    stop = at + share + (program < longer).to(tl.int32)
    return at, stop, length, start, flag, needed, needed_end


@triton.jit
def _fetch(addresses):
    """Asks for the cache lines at some addresses to come into the L2 cache; nobody waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _fetch_ahead(
    keys,
    layers,
    starts,
    lengths,
    page_table,
    table_rows,
    flags,
    num_runs,
    page_stride,
    last_cell,
    table_stride,
    table_cells,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PLACES: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    ALL: tl.constexpr,
    SELECTS: tl.constexpr,
    SCORES: tl.constexpr,
):
    """Has the program's first block of keys brought into the L2 cache, while the kernel before still runs.

    That one may yet write what is read here. So nothing that is read is kept, numbers are brought within bounds before
    they are an address, and the L1 cache, which would not see what is written, is passed by.
    """
    at, stop, _, _, flag, needed, needed_end = _share(
        lengths, starts, flags, num_runs, RUNS, BLOCK, PLACES, INIT, LOCAL, ALL, SELECTS, SCORES, ".cg"
    )
    if at < stop:
        one = tl.minimum(tl.sum((needed_end <= at).to(tl.int32), 0), num_runs - 1)
        run = tl.arange(0, RUNS)
        scored = tl.sum(tl.where(run == one, flag, 0), 0) & SCORES
        block = at - tl.sum(tl.where(run < one, needed, 0), 0) + tl.where(scored != 0, 0, INIT)
        row = one
        if table_rows is not None:
            row = tl.load(table_rows + one, cache_modifier=".cg")
        place = tl.minimum(tl.maximum(row.to(tl.int64) * table_stride + block, 0), table_cells - 1)
        page = tl.load(page_table + place, cache_modifier=".cg")
        layer = tl.load(layers + one, cache_modifier=".cg")
        cell = page.to(tl.int64) * page_stride + layer * (BLOCK * DIM)
        cell = tl.minimum(tl.maximum(cell, 0), last_cell)
        LINE: tl.constexpr = 128 * 8 // keys.dtype.element_ty.primitive_bitwidth  # keys' elements in a cache line
        _fetch((keys + cell + tl.arange(0, BLOCK * DIM // LINE) * LINE).to(tl.int64))


@triton.jit
def _score_rest(
    pages,
    cells,
    layer,
    rows,
    target,
    position,
    written,
    first_block,
    last_block,
    page_stride,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
    TMA: tl.constexpr,
):
    """Scores the few blocks at a run's end that some of its queries see in part."""
    for block in tl.range(first_block, last_block, num_stages=1):
        keys = load_block(pages, tl.load(cells + block), layer, page_stride, BLOCK, DIM, UPCAST, TMA)
        tl.store(target + block, _maxima(rows, keys, block, position, COLUMNS, BLOCK, True), mask=written)


@triton.jit
def _store_both(positions, wants, token, position, wanted, written):
    """Stores tokens' positions and whether they want scores, where anything asks for that."""
    tl.store(positions + token, position, mask=written)
    if wants is not None:
        tl.store(wants + token, wanted, mask=written)


@triton.jit
def _store_padding(positions, wants, token):
    """Stores that a token is nobody's."""
    tl.store(positions + token, -1)
    if wants is not None:
        tl.store(wants + token, 0)


# What changes from call to call must not ask for another variant of the kernel, compiled while an engine waits.
@triton.jit(
    do_not_specialize=["num_runs", "num_tokens", "heads", "table_stride", "table_cells"],
    do_not_specialize_on_alignment=[
        "layers",
        "starts",
        "lengths",
        "page_table",
        "table_rows",
        "flags",
        "positions",
        "wants",
    ],
)
def _decode_scores_kernel(
    queries,
    pages,
    keys,
    scores,
    positions,
    wants,
    unscales,
    layers,
    starts,
    lengths,
    page_table,
    table_rows,
    flags,
    num_runs,
    num_tokens,
    heads,
    page_stride,
    last_cell,
    width,
    stride_t,
    stride_h,
    stride_d,
    table_stride,
    table_cells,
    RUNS: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PLACES: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    ALL: tl.constexpr,
    SELECTS: tl.constexpr,
    SCORES: tl.constexpr,
    KEY: tl.constexpr,
    SCALED: tl.constexpr,
    UPCAST: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every program scores an equal share of the blocks of all runs, laid end to end: see `score_decode`."""
    if PDL:
        _fetch_ahead(
            keys,
            layers,
            starts,
            lengths,
            page_table,
            table_rows,
            flags,
            num_runs,
            page_stride,
            last_cell,
            table_stride,
            table_cells,
            RUNS,
            BLOCK,
            DIM,
            PLACES,
            INIT,
            LOCAL,
            ALL,
            SELECTS,
            SCORES,
        )
    wait_for_previous(PDL)
    skipped = tl.program_id(1) * COLUMNS  # rows of each run, that other programs score
    at, stop, length, start, flag, needed, needed_end = _share(
        lengths, starts, flags, num_runs, RUNS, BLOCK, PLACES, INIT, LOCAL, ALL, SELECTS, SCORES, ""
    )
    run = tl.arange(0, RUNS)
    row_end = tl.cumsum(length, 0)
    column = tl.arange(0, COLUMNS)
    while at < stop:
        one = tl.sum((needed_end <= at).to(tl.int32), 0)
        own_end, own_needed, own_row_end, own_length, own_start, own_flag = _only(
            run == one, needed_end, needed, row_end, length, start, flag
        )
        row = one
        if table_rows is not None:
            row = tl.load(table_rows + one)
        cells = page_table + row.to(tl.int64) * table_stride
        scored = (own_flag & SCORES) != 0
        skipped_blocks = tl.where(scored, 0, INIT)
        first_block = at - (own_end - own_needed) + skipped_blocks
        at = tl.minimum(stop, own_end)
        last_block = at - (own_end - own_needed) + skipped_blocks
        # Blocks that some query sees in part need a mask; where these are forced, they are scored for who wants scores.
        whole = last_block
        if LOCAL > 0:
            whole = tl.where(scored, tl.minimum(last_block, (own_start + 1) // BLOCK), last_block)
            whole = tl.maximum(whole, first_block)
        first_token = own_row_end - own_length
        first_row = first_token.to(tl.int64) * heads + skipped
        num_rows = own_length * heads - skipped
        if num_rows > 0:
            page = tl.load(cells + first_block)
            layer = tl.load(layers + one)
            rows = _load_queries(
                queries, first_token, skipped, num_rows, heads, stride_t, stride_h, stride_d, COLUMNS, DIM
            )
            if SCALED:
                rows, undo = scale_to_e4m3(rows)
                tl.store(unscales + first_row + column, undo, mask=column < num_rows)
                rows = rows.to(KEY, bitcast=True)
            else:
                rows = rows.to(KEY)
            target = scores + (first_row + column) * width
            position = own_start + (skipped + column) // heads
            for block in tl.range(first_block, whole, num_stages=STAGES):
                own_keys = load_block(pages, page, layer, page_stride, BLOCK, DIM, UPCAST, TMA)
                page = tl.load(cells + block + 1, mask=block + 1 < last_block, other=0)
                best = _maxima(rows, own_keys, block, position, COLUMNS, BLOCK, LOCAL == 0)
                # Keys stream through the L2 cache and push out what is written beside them, a few bytes at a time, and
                # memory loses more time turning from reads to writes than the bytes take: scores shall stay.
                tl.store(target + block, best, mask=column < num_rows, eviction_policy="evict_last")
            if LOCAL > 0:
                _score_rest(
                    pages,
                    cells,
                    layer,
                    rows,
                    target,
                    position,
                    column < num_rows,
                    whole,
                    last_block,
                    page_stride,
                    COLUMNS,
                    BLOCK,
                    DIM,
                    UPCAST,
                    TMA,
                )

    # Each token's position, for the ranking: programs take the runs in turn, and the rows that belong to none.
    if skipped == 0:
        program = tl.program_id(0)
        num_programs = tl.num_programs(0)
        for one in tl.range(program, num_runs, num_programs):
            _, _, own_row_end, own_length, own_start, own_flag = _only(
                run == one, needed_end, needed, row_end, length, start, flag
            )
            token = tl.arange(0, QUERIES)
            own_position = tl.where((own_flag & SELECTS) != 0, own_start + token, -1)
            _store_both(
                positions, wants, own_row_end - own_length + token, own_position, own_flag & SCORES, token < own_length
            )
        for token in tl.range(tl.max(row_end, 0) + program, num_tokens, num_programs):
            _store_padding(positions, wants, token)


def score_decode(
    queries: torch.Tensor,
    spans: Spans,
    max_length: int,
    pages: Pages,
    spec: IndexSpec,
    scores: torch.Tensor,
    positions: torch.Tensor,
    wants: torch.Tensor | None,
    unscales: torch.Tensor | None,
    *,
    every_block: bool,
    programs: int,
    warps: int,
    stages: int,
    pdl: bool,
) -> None:
    """Scores the blocks of runs of few queries, in one launch whose shape depends on no number on the device.

    Args:
        queries: `[T, H, D]`, any strides.
        spans: the runs; rows with length 0 are padding. Only the tensors on the device are read.
        max_length: no run is longer.
        pages: the keys.
        spec: the indexer.
        scores: float32 `[T * H, width]`, written where a query ranks a block by its score; width is at least that of
            the page table.
        positions: int32 `[T]`, written: each token's position, -1 beyond the last run and where a run does not select.
        wants: int32 `[T]`, written: whether each token's run wants scores; None where nothing asks for that.
        unscales: float32 `[T * H]`, written for an fp8 cache scored natively: what undoes the queries' scale.
        every_block: whether all that is ranked is scored, even where all candidates find a place.
        programs: how many share the blocks.
        warps: of a program.
        stages: blocks of keys that a program has room for.
        pdl: whether to launch as a programmatic dependent.
    """
    num_tokens, heads, dim = queries.shape
    columns = min(max(triton.next_power_of_2(heads * max_length), 16), MAX_COLUMNS)
    chunks = triton.cdiv(heads * max_length, columns)
    _decode_scores_kernel[(programs, chunks)](
        queries.view(torch.uint8) if queries.dtype == torch.float8_e4m3fn else queries,
        pages.argument,
        pages.elements,
        scores,
        positions,
        wants,
        unscales if unscales is not None else scores,
        spans.layers,
        spans.starts,
        spans.lengths,
        spans.page_table,
        spans.table_rows,
        spans.flags,
        len(spans.lengths),
        num_tokens,
        heads,
        pages.page_stride,
        len(pages.elements) - spec.block_size * dim,
        scores.shape[1],
        *queries.stride(),
        spans.page_table.stride(0),
        (len(spans.page_table) - 1) * spans.page_table.stride(0) + spans.page_table.shape[1],
        RUNS=padded_runs(len(spans.lengths)),
        QUERIES=max(triton.next_power_of_2(max_length), 16),
        COLUMNS=columns,
        BLOCK=spec.block_size,
        DIM=dim,
        PLACES=spec.topk - spec.init_blocks - spec.local_blocks,
        INIT=spec.init_blocks,
        LOCAL=spec.local_blocks,
        ALL=every_block,
        SELECTS=RUN_SELECTS,
        SCORES=RUN_WANTS_SCORES,
        KEY=pages.scored,
        SCALED=unscales is not None,
        UPCAST=pages.upcast,
        TMA=pages.tma,
        PDL=pdl,
        STAGES=stages,
        # Converting keys, or so many queries, takes registers.
        num_warps=2 * warps if pages.upcast or columns >= MAX_COLUMNS else warps,
        **pdl_launch(pdl),
    )
