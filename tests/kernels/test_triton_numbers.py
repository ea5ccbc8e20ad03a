"""Numbers inside the Triton kernels, bit by bit against torch."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from blockdex_kernels.casts import cast_keys, scale_to_fp8
from blockdex_kernels.triton.numbers import e4m3_to_float, float_to_e4m3, ordered, scale_to_e4m3, to_float
from support.triton_device import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

AT_ONCE = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _encode(source, target, N: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(target + at, float_to_e4m3(to_float(tl.load(source + at))))


@triton.jit  # type: ignore[untyped-decorator]
def _decode(source, target, N: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    at = tl.arange(0, N)
    tl.store(target + at, e4m3_to_float(tl.load(source + at)))


@triton.jit  # type: ignore[untyped-decorator]
def _scale(source, target, undos, N: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.arange(0, N)
    at = row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    codes, undo = scale_to_e4m3(tl.load(source + at))
    tl.store(target + at, codes)
    tl.store(undos + row, undo)


@triton.jit  # type: ignore[untyped-decorator]
def _order(source, target, N: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    at = tl.arange(0, N)
    tl.store(target + at, ordered(tl.load(source + at)))


def encoded(values: torch.Tensor) -> torch.Tensor:
    """What `float_to_e4m3` makes of any numbers of values; as many as programs are full."""
    target = torch.empty(values.shape, dtype=torch.uint8, device=DEVICE)
    _encode[(len(values) // AT_ONCE,)](values.to(DEVICE), target, AT_ONCE)
    return target.cpu().view(torch.float8_e4m3fn)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The same bits, but for NaN, which is one number."""
    same = ours.view(torch.uint8) == theirs.view(torch.uint8)
    assert (same | (ours.float().isnan() & theirs.float().isnan())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_becomes_the_e4m3_that_torch_says(dtype: torch.dtype) -> None:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    assert_same(encoded(values), cast_keys(values, "fp8_e4m3"))


def test_float32_round_to_nearest_even_and_saturate(generator: torch.Generator) -> None:
    """Around every e4m3 number and every middle between two: the number itself, and its neighbours."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    edges = torch.cat([numbers, middles, torch.tensor([448.0, 464.0, 480.0, 2.0**-10, 3e38, math.inf, math.nan])])
    near = torch.cat([edges, edges.nextafter(torch.tensor(math.inf)), edges.nextafter(torch.tensor(-math.inf))])
    bits = torch.randint(-(2**31), 2**31, (AT_ONCE - len(near) * 2,), generator=generator).to(torch.int32)
    values = torch.cat([near, -near, bits.view(torch.float32)])

    assert_same(encoded(values), cast_keys(values, "fp8_e4m3"))


def test_every_e4m3_number_becomes_the_float_it_is() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    target = torch.empty(256, device=DEVICE)

    _decode[(1,)](codes.to(DEVICE), target, 256)

    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(target.cpu().nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
    assert torch.equal(target.cpu().signbit()[expected == 0], expected.signbit()[expected == 0])


def test_rows_are_scaled_as_on_the_host(generator: torch.Generator) -> None:
    rows = torch.randn(64, 32, generator=generator) * torch.logspace(-45, 38, 64)[:, None]
    rows[0], rows[1], rows[2] = 0.0, math.nan, -math.inf
    rows[3] = torch.tensor([2.0**-149, -(2.0**-126), 0.0, -0.0]).repeat(8)
    rows[4, 1:3] = torch.tensor([math.inf, math.nan])
    rows[5, 0], rows[6, 0], rows[7, 0] = 3.4e38, 255.99999, 256.0
    target = torch.empty(rows.shape, dtype=torch.uint8, device=DEVICE)
    undos = torch.empty(64, device=DEVICE)

    _scale[(1,)](rows.to(DEVICE), target, undos, 64, 32)

    expected, expected_undos = scale_to_fp8(rows)
    assert_same(target.cpu().view(torch.float8_e4m3fn), expected)
    assert torch.equal(undos.cpu(), expected_undos[:, 0])


def test_scores_sort_as_integers() -> None:
    scores = torch.tensor(
        [-math.inf, math.nan, -3e38, -1.0, -(2.0**-149), -0.0, 0.0, 2.0**-149, 1.0, 1.0000001, 3e38, math.inf]
    )
    scores = torch.cat([scores, scores.flip(0)[:4]])
    target = torch.empty(16, dtype=torch.int32, device=DEVICE)

    _order[(1,)](scores.to(DEVICE), target, 16)

    numbers = target.cpu().tolist()
    known = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).tolist()
    assert min(numbers) > -(2**31)
    for one, first in zip(numbers, known, strict=True):
        for other, second in zip(numbers, known, strict=True):
            assert (one < other) == (first < second)
