"""Keys into pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockdex_kernels.interface import RUN_APPENDS, Spans
from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.triton.launch import padded_runs, pdl_launch, wait_for_previous
from blockdex_kernels.triton.numbers import float_to_e4m3, to_float


@triton.jit(
    do_not_specialize=["num_runs", "num_tokens", "table_stride"],
    do_not_specialize_on_alignment=["layers", "starts", "lengths", "page_table", "table_rows", "flags"],
)
def _append_kernel(
    keys,
    pages,
    layers,
    starts,
    lengths,
    page_table,
    table_rows,
    flags,
    num_runs,
    num_tokens,
    page_stride,
    stride_t,
    stride_d,
    table_stride,
    RUNS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    APPENDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program writes a few consecutive tokens: see `append`."""
    wait_for_previous(PDL)
    run = tl.arange(0, RUNS)
    length = tl.load(lengths + run, mask=run < num_runs, other=0)
    start = tl.load(starts + run, mask=run < num_runs, other=0)
    end = tl.cumsum(length, 0)
    shift = start + length - end
    first = tl.program_id(0) * TOKENS
    token = first + tl.arange(0, TOKENS)
    own = tl.sum((end[None, :] <= token[:, None]).to(tl.int32), 1)
    inside = (token < num_tokens) & (own < num_runs)
    if flags is not None:
        inside = inside & ((tl.load(flags + own, mask=inside, other=0) & APPENDS) != 0)
    position = token + tl.sum(tl.where(run[None, :] == own[:, None], shift[None, :], 0), 1)
    row = own
    if table_rows is not None:
        row = tl.load(table_rows + own, mask=inside, other=0)
    page = tl.load(page_table + row.to(tl.int64) * table_stride + position // BLOCK, mask=inside, other=0)
    layer = tl.load(layers + own, mask=inside, other=0)
    key = page.to(tl.int64) * page_stride + (layer * BLOCK + position % BLOCK) * DIM
    dim = tl.arange(0, DIM)
    at = token.to(tl.int64)[:, None] * stride_t + dim[None, :] * stride_d
    values = to_float(tl.load(keys + at, mask=inside[:, None], other=0))
    if pages.dtype.element_ty == tl.uint8:
        values = float_to_e4m3(values)
    else:
        values = values.to(pages.dtype.element_ty)
    tl.store(pages + key[:, None] + dim[None, :], values, mask=inside[:, None])


def append(keys: torch.Tensor, spans: Spans, pages: torch.Tensor, spec: IndexSpec, *, pdl: bool) -> None:
    """Writes packed keys of many runs and layers into pages, cast to their dtype, in one launch.

    Args:
        keys: `[T, D]`, any float dtype and strides.
        spans: where they go; rows with length 0 are padding.
        pages: `[num_pages, L, block_size, D]`, each dense, at any distance of each other; uint8 holds e4m3.
        spec: the indexer.
        pdl: whether to launch as a programmatic dependent.
    """
    num_tokens, dim = keys.shape
    runs = padded_runs(len(spans.lengths))
    tokens = 16 if runs <= 512 else 4  # Each of a program's tokens is compared with every run.
    _append_kernel[(triton.cdiv(num_tokens, tokens),)](
        keys.view(torch.uint8) if keys.dtype == torch.float8_e4m3fn else keys,
        pages,
        spans.layers,
        spans.starts,
        spans.lengths,
        spans.page_table,
        spans.table_rows,
        spans.flags,
        len(spans.lengths),
        num_tokens,
        pages.stride(0),
        *keys.stride(),
        spans.page_table.stride(0),
        RUNS=runs,
        TOKENS=tokens,
        BLOCK=spec.block_size,
        DIM=dim,
        APPENDS=RUN_APPENDS,
        PDL=pdl,
        num_warps=4,
        **pdl_launch(pdl),
    )
