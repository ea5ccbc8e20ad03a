"""A step's numbers, keys and queries onto the device: out of pinned memory, or from wherever they lie on a device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockdex_kernels.triton.launch import pdl_launch, wait_for_previous
from blockdex_kernels.triton.numbers import e4m3_to_float

BF16, FP16, FP32, FP8_E4M3 = (tl.constexpr(number) for number in range(1, 5))
"""Dtypes in the last four bits of an address."""

_ROWS, _WORDS = 16, 1024


@triton.jit
def _to_bf16(value, odd):
    """float32 to the bits of bf16 as int16, to nearest, or to odd where it is rounded once more afterwards."""
    bits = value.to(tl.int32, bitcast=True)
    cut = (bits >> 16) & 0xFFFF
    nearest = ((bits + 0x7FFF + (cut & 1)) >> 16) & 0xFFFF
    to_odd = cut | ((bits & 0xFFFF) != 0).to(tl.int32)
    rounded = tl.where(odd, to_odd, nearest)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, cut | 0x40, rounded).to(tl.int16)


@triton.jit
def _load_row(address, dim, wanted, dtype: tl.constexpr):
    """Elements of rows at addresses, which are multiples of 16."""
    begin = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
    return tl.load(begin[:, None] + dim[None, :], mask=wanted[:, None], other=0)


@triton.jit
def _load_elsewhere(values, source, odd, dim):
    """`values`, but for rows that have an address: those are loaded from there, as bf16."""
    address = source & -16
    dtype = (source & 15).to(tl.int32)
    values = tl.where((dtype == BF16)[:, None], _load_row(address, dim, dtype == BF16, tl.int16), values)
    if tl.max(dtype, 0) > BF16:
        half = _load_row(address, dim, dtype == FP16, tl.float16).to(tl.float32)
        values = tl.where((dtype == FP16)[:, None], _to_bf16(half, odd), values)
        single = _load_row(address, dim, dtype == FP32, tl.float32)
        values = tl.where((dtype == FP32)[:, None], _to_bf16(single, odd), values)
        eighth = e4m3_to_float(_load_row(address, dim, dtype == FP8_E4M3, tl.uint8))
        values = tl.where((dtype == FP8_E4M3)[:, None], _to_bf16(eighth, odd), values)
    return values


@triton.jit(do_not_specialize=["num_columns", "num_rows", "num_keys", "num_targets"])
def _stage_kernel(
    columns,
    columns_there,
    rows,
    rows_there,
    sources,
    targets,
    targets_there,
    num_columns,
    num_rows,
    num_keys,
    num_targets,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    ODD_KEYS: tl.constexpr,
    ODD_QUERIES: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first programs bring a few rows each, the last ones the words of the columns and of the targets."""
    wait_for_previous(PDL)
    num_row_programs = (num_rows + ROWS - 1) // ROWS
    program = tl.program_id(0)
    if program < num_row_programs:
        row = program * ROWS + tl.arange(0, ROWS)
        inside = row < num_rows
        dim = tl.arange(0, DIM)
        at = row[:, None] * DIM + dim[None, :]
        # Both at once: what comes from the host is long on its way.
        source = tl.load(sources + row, mask=inside, other=0)
        values = tl.load(rows + at, mask=inside[:, None], other=0)
        if tl.max(source & 15, 0) > 0:
            odd = tl.where(row < num_keys, ODD_KEYS, ODD_QUERIES)[:, None]
            values = _load_elsewhere(values, source, odd, dim)
        tl.store(rows_there + at, values, mask=inside[:, None])
    else:
        word = (program - num_row_programs) * WORDS + tl.arange(0, WORDS)
        column = tl.load(columns + word, mask=word < num_columns, other=0)
        target = tl.load(targets + word, mask=word < num_targets, other=0)
        tl.store(columns_there + word, column, mask=word < num_columns)
        tl.store(targets_there + word, target, mask=word < num_targets)


def stage(
    host: torch.Tensor,
    there: torch.Tensor,
    *,
    num_columns: int,
    rows_at: int,
    num_keys: int,
    num_queries: int,
    num_brought: int,
    dim: int,
    odd_keys: bool,
    odd_queries: bool,
    pdl: bool,
) -> torch.Tensor:
    """Brings a step onto the device, in one launch.

    Args:
        host: uint8, pinned, where a device is: int32 numbers `[num_columns]`; from `rows_at` on, which is a multiple of
            16, bf16 rows of keys and of queries `[num_keys + num_queries, dim]`; behind these the addresses of as many
            rows, uint64: where one is not 0, that row is read from there instead, in the dtype (1 bf16, 2 fp16, 3 fp32,
            4 fp8 e4m3) that its last four bits say; behind these what is only brought along, uint64 `[num_brought]`.
        there: uint8 on the device, written as `host` lies, rows in bf16 all; the addresses are left out.
        num_columns: see `host`.
        rows_at: see `host`.
        num_keys: see `host`.
        num_queries: see `host`.
        num_brought: see `host`.
        dim: see `host`.
        odd_keys: whether keys that are not exact in bf16 are rounded to odd, not to nearest.
        odd_queries: the same of queries.
        pdl: whether to launch as a programmatic dependent.

    Returns:
        int64 `[num_brought]` in `there`: what was brought along.
    """
    num_rows = num_keys + num_queries
    addresses_at = rows_at + 2 * dim * num_rows
    targets_at = addresses_at + 8 * num_rows
    end = targets_at + 8 * num_brought
    rows_there = there[rows_at:addresses_at].view(torch.int16)
    targets_there = there[targets_at:end].view(torch.int64)
    programs = triton.cdiv(num_rows, _ROWS) + triton.cdiv(max(num_columns, num_brought), _WORDS)
    _stage_kernel[(programs,)](
        host[: 4 * num_columns].view(torch.int32),
        there[: 4 * num_columns].view(torch.int32),
        host[rows_at:addresses_at].view(torch.int16),
        rows_there,
        host[addresses_at:targets_at].view(torch.int64),
        host[targets_at:end].view(torch.int64),
        targets_there,
        num_columns,
        num_rows,
        num_keys,
        num_brought,
        DIM=dim,
        ROWS=_ROWS,
        WORDS=_WORDS,
        ODD_KEYS=odd_keys,
        ODD_QUERIES=odd_queries,
        PDL=pdl,
        num_warps=4,
        **pdl_launch(pdl),
    )
    return targets_there
