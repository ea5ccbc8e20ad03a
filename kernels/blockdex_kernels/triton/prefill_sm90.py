"""Scores of runs of many queries on Hopper: a warpgroup for every 64 rows of a tile, all fed with keys by one warp.

Four warpgroups share what is read of the keys, and while one takes the maxima of its products the tensor cores work
for the others. Nothing is planned on the host, so that a CUDA graph holds a launch for any numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from blockdex_kernels.interface import Spans
from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.triton.launch import padded_runs, pdl_launch
from blockdex_kernels.triton.pages import Pages
from blockdex_kernels.triton.shares import TILE, needed_blocks, piece_of, share_of_program

_ROWS = gl.constexpr(64)
"""Rows of a warpgroup: what one instruction of its tensor cores takes."""
_KEY_BYTES = 128 << 10
"""Shared memory for keys that are under way."""
_SCORE_REGISTERS, _READ_REGISTERS = 112, 32
"""Of a thread that scores, and of one that reads keys."""

_read = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # The latter is its name in Triton 3.6.


@gluon.jit
def _wait_for_previous():
    """As `blockdex_kernels.triton.launch.wait_for_previous`."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _next_stage(stage, turn, STAGES: gl.constexpr):
    """The next place of the ring of keys, and how often, in parity, it has been used."""
    stage += 1
    if stage == STAGES:
        stage = 0
        turn ^= 1
    return stage, turn


@gluon.jit
def _read_keys(
    ring,
    runs,
    piece,
    cells,
    RUNS: gl.constexpr,
    INIT: gl.constexpr,
    PLACES: gl.constexpr,
    FORCED: gl.constexpr,
):
    """One warp has the blocks of the share read, one after another, each into the next place that is free."""
    keys, ready, read = ring
    starts, lengths, heads, run, _ = runs
    start, rows, tile, block, last, last_end, left = piece
    pages, layers, page_table, table_rows, table_stride, page_rows = cells
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK: gl.constexpr = keys.shape[1]
    stage = 0
    turn = 1
    more = True
    while more:
        layer = gl.load(layers + run)
        table_row = run
        if table_rows is not None:
            table_row = gl.load(table_rows + run)
        row = page_table + table_row.to(gl.int64) * table_stride + INIT
        while tile <= last:
            end = last_end
            if tile < last:
                end = needed_blocks(tile, start, rows, heads, BLOCK, PLACES, FORCED)
            page = gl.load(row + block, mask=block < end, other=0)
            while block < end:
                key = page * page_rows + layer * BLOCK
                block += 1
                page = gl.load(row + block, mask=block < end, other=0)
                arrives = ready.index(stage)
                mbarrier.wait(read.index(stage), turn)
                mbarrier.expect(arrives, pages.block_type.nbytes)
                _read(pages, [key, 0], arrives, keys.index(stage))
                stage, turn = _next_stage(stage, turn, STAGES)
            tile += 1
            block = 0
        more = left > 0
        if RUNS > 1:
            run += 1
            start, rows, tile, block, last, last_end, left = piece_of(
                run, 0, left, starts, lengths, heads, BLOCK, PLACES, FORCED
            )


@gluon.jit
def _pack_rows(packed, queries, unscales, row, first_row, rows, SCALED: gl.constexpr):
    """Has the tensor cores find a warpgroup's rows of a tile in shared memory, of the dtype of the keys.

    Rows are scaled into the range of e4m3 as `numbers.scale_to_e4m3` does; the chip's own conversion rounds as that
    one's does.
    """
    values, heads, stride_t, stride_h = queries
    DIM: gl.constexpr = packed.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [512 // DIM, DIM // 16], [4, 1], [1, 0])
    row += gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))
    inside = row < rows
    row += first_row
    at = (row // heads).to(gl.int64) * stride_t + (row % heads) * stride_h
    values = gl.load(values + at[:, None] + dim[None, :], mask=inside[:, None], other=0.0).to(gl.float32)
    if SCALED:
        magnitude = gl.abs(values)
        largest = gl.max(gl.where(magnitude < float("inf"), magnitude, 0.0), 1)
        exponent = largest.to(gl.int32, bitcast=True) >> 23
        shift = gl.where(largest == 0.0, 8, gl.minimum(134 - exponent, 126))
        values = values * ((127 + shift) << 23).to(gl.float32, bitcast=True)[:, None]
        gl.store(unscales + row, ((127 - shift) << 23).to(gl.float32, bitcast=True), mask=inside)
    packed.store(values.to(packed.dtype))
    hopper.fence_async_shared()


@gluon.jit
def _score_rows(
    warpgroup: gl.constexpr,
    ring,
    runs,
    piece,
    buffers,
    RUNS: gl.constexpr,
    INIT: gl.constexpr,
    PLACES: gl.constexpr,
    FORCED: gl.constexpr,
    SCALED: gl.constexpr,
):
    """A warpgroup scores its rows of every tile of the share: a maximum for each row and block."""
    keys, ready, read = ring
    starts, lengths, heads, run, first_row = runs
    start, rows, tile, block, last, last_end, left = piece
    packed, queries, scores, positions, unscales, width = buffers
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK: gl.constexpr = keys.shape[1]
    products_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 256 // keys.dtype.primitive_bitwidth]
    )
    # Four threads hold the products of a row between them, and here one of the row's maxima of four blocks each: these
    # are written at once, a fourth of the writes. Rows lie as in the layout of the products.
    quads: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [_ROWS, 4]
    )
    own_rows = packed.index(warpgroup)
    quad_row = warpgroup * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, quads))
    column = gl.arange(0, 4, layout=gl.SliceLayout(0, quads))
    # Only the tensor cores write the products, or else the assembler would have them wait.
    products = gl.zeros([_ROWS, BLOCK], gl.float32, products_layout)
    stage = 0
    turn = 0
    more = True
    while more:
        while tile <= last:
            end = last_end
            if tile < last:
                end = needed_blocks(tile, start, rows, heads, BLOCK, PLACES, FORCED)
            row = tile * TILE + quad_row
            inside = row < rows
            if (block == 0) & ((tile < last) | (end > 0)):
                gl.store(positions + first_row + row, start + row // heads, mask=inside)
            if block < end:
                _pack_rows(own_rows, queries, unscales, tile * TILE + warpgroup * _ROWS, first_row, rows, SCALED)
                target = scores + ((first_row + row).to(gl.int64) * width + INIT)[:, None] + column[None, :]
                begin = block
                maxima = gl.full([_ROWS, 4], float("-inf"), gl.float32, quads)
                while block < end:
                    mbarrier.wait(ready.index(stage), turn)
                    block_keys = keys.index(stage).permute((1, 0))
                    products = hopper.warpgroup_mma(own_rows, block_keys, products, use_acc=False, is_async=True)
                    products = hopper.warpgroup_mma_wait(0, [products])
                    mbarrier.arrive(read.index(stage), count=1)
                    stage, turn = _next_stage(stage, turn, STAGES)
                    best = gl.convert_layout(gl.max(products, 1), gl.SliceLayout(1, quads), assert_trivial=True)
                    maxima = gl.where((column == (block & 3))[None, :], best[:, None], maxima)
                    if ((block & 3) == 3) | (block + 1 == end):
                        four = block & -4
                        made = (four + column >= begin) & (four + column <= block)
                        gl.store(target + four, maxima, mask=inside[:, None] & made[None, :])
                    block += 1
            tile += 1
            block = 0
        more = left > 0
        if RUNS > 1:
            first_row += rows
            run += 1
            start, rows, tile, block, last, last_end, left = piece_of(
                run, 0, left, starts, lengths, heads, BLOCK, PLACES, FORCED
            )


# What changes from call to call must not ask for another variant of the kernel, compiled while an engine waits.
@gluon.jit(
    do_not_specialize=["num_runs", "num_rows", "heads", "query_heads", "table_stride"],
    do_not_specialize_on_alignment=["layers", "starts", "lengths", "page_table", "table_rows", "positions"],
)
def _prefill_scores_sm90_kernel(
    queries,
    pages,
    scores,
    positions,
    unscales,
    layers,
    starts,
    lengths,
    page_table,
    table_rows,
    num_runs,
    num_rows,
    heads,
    query_heads,
    page_rows,
    width,
    stride_t,
    stride_h,
    table_stride,
    RUNS: gl.constexpr,
    INIT: gl.constexpr,
    PLACES: gl.constexpr,
    FORCED: gl.constexpr,
    STAGES: gl.constexpr,
    SCALED: gl.constexpr,
    SCORE_REGISTERS: gl.constexpr,
    READ_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Every program scores an equal share of the blocks of all tiles of all runs: see `score_prefill`."""
    BLOCK: gl.constexpr = pages.block_type.shape[0]
    DIM: gl.constexpr = pages.block_type.shape[1]
    keys = gl.allocate_shared_memory(pages.dtype, [STAGES, BLOCK, DIM], pages.layout)
    packed = gl.allocate_shared_memory(pages.dtype, [4, _ROWS, DIM], pages.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(read.index(stage), count=4)
    if PDL:
        _wait_for_previous()
    if heads.dtype.is_ptr():
        heads = gl.load(heads)
    run, first_row, unit, left, all_rows = share_of_program(
        starts, lengths, num_runs, heads, RUNS, BLOCK, PLACES, FORCED
    )
    row = all_rows + gl.program_id(0) * 128 + gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    for skipped in range(0, num_rows - all_rows, gl.num_programs(0) * 128):
        gl.store(positions + skipped + row, -1, mask=skipped + row < num_rows)
    ring = (keys, ready, read)
    runs = (starts, lengths, heads, run, first_row)
    piece = piece_of(run, unit, left, starts, lengths, heads, BLOCK, PLACES, FORCED)
    buffers = (packed, (queries, query_heads, stride_t, stride_h), scores, positions, unscales, width)
    cells = (pages, layers, page_table, table_rows, table_stride, page_rows)
    gl.warp_specialize(
        [
            (_score_rows, (gl.constexpr(0), ring, runs, piece, buffers, RUNS, INIT, PLACES, FORCED, SCALED)),
            (_score_rows, (gl.constexpr(1), ring, runs, piece, buffers, RUNS, INIT, PLACES, FORCED, SCALED)),
            (_score_rows, (gl.constexpr(2), ring, runs, piece, buffers, RUNS, INIT, PLACES, FORCED, SCALED)),
            (_score_rows, (gl.constexpr(3), ring, runs, piece, buffers, RUNS, INIT, PLACES, FORCED, SCALED)),
            (_read_keys, (ring, runs, piece, cells, RUNS, INIT, PLACES, FORCED)),
        ],
        [4, 4, 4, 1],
        [SCORE_REGISTERS, SCORE_REGISTERS, SCORE_REGISTERS, READ_REGISTERS],
    )


@dataclass(frozen=True, slots=True)
class KeyTiles:
    """Pages as the kernel reads them.

    Attributes:
        descriptor: what tells the copy engine of rows of D elements, and of blocks as the tensor cores take them.
        page_rows: rows from one page to the next.
    """

    descriptor: TensorDescriptor
    page_rows: int

    @classmethod
    def of(cls, pages: Pages, spec: IndexSpec) -> KeyTiles | None:
        """Describes pages; None where keys are not scored as they lie there, or the indexer is another."""
        fits = spec.block_size == 128 and spec.head_dim == 128 and spec.local_blocks > 0
        if not pages.tma or pages.upcast or not fits:
            return None
        rows = pages.elements.view(-1, spec.head_dim)
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * rows.element_size(), rank=2)
        descriptor = TensorDescriptor.from_tensor(rows, [spec.block_size, spec.head_dim], layout)
        return cls(descriptor, pages.page_stride // spec.head_dim)


def score_prefill(
    queries: torch.Tensor,
    spans: Spans,
    heads: int | torch.Tensor,
    pages: KeyTiles,
    spec: IndexSpec,
    scores: torch.Tensor,
    positions: torch.Tensor,
    unscales: torch.Tensor | None,
    *,
    every_block: bool,
    programs: int,
    pdl: bool,
) -> None:
    """Scores the blocks of runs of many queries, in one launch whose shape depends on no number on the device.

    Args:
        queries: `[T, H, D]`, any floating-point dtype and strides.
        spans: the runs; only the tensors on the device are read.
        heads: H; or int32 `[1]` on the device, where the queries are rows, `[N, 1, D]`, and each token has so many.
        pages: the keys.
        spec: the indexer.
        scores: float32 `[T * H, width]`, written where a query ranks a block by its score; width is at least that of
            the page table.
        positions: int32 `[T * H]`, written: each row's position, -1 beyond the last run.
        unscales: float32 `[T * H]`, written for fp8 keys where something is scored: what undoes the queries' scale.
        every_block: whether scores are wanted even where all candidates find a place.
        programs: how many share the work: one a multiprocessor.
        pdl: whether to launch as a programmatic dependent.
    """
    if queries.stride(2) != 1:
        queries = queries.contiguous()
    forced = spec.init_blocks + spec.local_blocks
    num_runs = len(spans.lengths)
    block_bytes = pages.descriptor.base.element_size() * spec.block_size * spec.head_dim
    _prefill_scores_sm90_kernel[(programs,)](
        queries,
        pages.descriptor,
        scores,
        positions,
        unscales if unscales is not None else scores,
        spans.layers,
        spans.starts,
        spans.lengths,
        spans.page_table,
        spans.table_rows,
        num_runs,
        len(positions),
        heads,
        queries.shape[1],
        pages.page_rows,
        scores.shape[1],
        *queries.stride()[:2],
        spans.page_table.stride(0),
        RUNS=1 if num_runs == 1 else padded_runs(num_runs),
        INIT=spec.init_blocks,
        PLACES=0 if every_block else spec.topk - forced,
        FORCED=forced,
        STAGES=_KEY_BYTES // block_bytes,
        SCALED=unscales is not None,
        SCORE_REGISTERS=_SCORE_REGISTERS,
        READ_REGISTERS=_READ_REGISTERS,
        PDL=pdl,
        num_warps=4,
        **pdl_launch(pdl),
    )
