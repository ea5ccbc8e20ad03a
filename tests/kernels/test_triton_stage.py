"""How a step comes onto the device: staged rows as they are, others from their addresses, in every dtype."""

from __future__ import annotations

import pytest
import torch

from blockdex_kernels.triton.stage import stage
from support.triton_device import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DIM, TOKENS, HEADS, COLUMNS = 128, 7, 3, 5 * 300
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
ROWS_AT = -(-4 * COLUMNS // 16) * 16
NUM_ROWS = TOKENS * (1 + HEADS)
NUM_BROUGHT = TOKENS * HEADS + 10
GUARD = 64


def awkward(dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A row with numbers of all magnitudes that the dtype has, zeros, infinities and NaN."""
    row = torch.randn(DIM, generator=generator) * 2.0 ** torch.randint(-30, 30, (DIM,), generator=generator)
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, 1e-45, 2.0**-24, 3.0**-9, 448.0, 65504.0])
    row[: len(odd)] = odd
    return row.to(dtype)


def to_odd(row: torch.Tensor) -> torch.Tensor:
    """float32 cut to bf16, its last bit set where anything was lost."""
    bits = row.view(torch.int32)
    cut = (bits >> 16 << 16) | torch.where((bits & 0xFFFF) != 0, 1 << 16, 0).int()
    return torch.where(row.isnan(), torch.nan, cut.view(torch.float32)).bfloat16()


@pytest.mark.parametrize("odd", [False, True], ids=["to nearest", "to odd"])
def test_a_step_as_it_is_laid(odd: bool, generator: torch.Generator) -> None:
    """Columns and what is brought along too; nothing is written behind it."""
    staged = torch.randn(NUM_ROWS, DIM, generator=generator).bfloat16()
    expected, addresses = staged.clone(), torch.zeros(NUM_ROWS, dtype=torch.int64)
    kept: list[torch.Tensor] = []
    for row in range(0, NUM_ROWS, 2):
        number = row // 2 % len(DTYPES)
        kept.append(awkward(DTYPES[number], generator).to(DEVICE))
        addresses[row] = kept[-1].data_ptr() | (number + 1)
        exact = kept[-1].float().cpu()
        rounds_odd = odd and row < TOKENS
        expected[row] = to_odd(exact) if rounds_odd else exact.bfloat16()
    columns = torch.randint(-(2**31), 2**31 - 1, (COLUMNS,), dtype=torch.int64, generator=generator).int()
    brought = torch.randint(0, 2**62, (NUM_BROUGHT,), generator=generator)
    parts = [columns, staged, addresses, brought]
    laid = [part.contiguous().view(torch.uint8).view(-1) for part in parts]
    padding = torch.zeros(ROWS_AT - 4 * COLUMNS, dtype=torch.uint8)
    host = torch.cat([laid[0], padding, *laid[1:], torch.full((GUARD,), 7, dtype=torch.uint8)])
    host = host.pin_memory() if DEVICE.type == "cuda" else host
    there = torch.full(host.shape, 9, dtype=torch.uint8, device=DEVICE)
    targets = stage(
        host,
        there,
        num_columns=COLUMNS,
        rows_at=ROWS_AT,
        num_keys=TOKENS,
        num_queries=TOKENS * HEADS,
        num_brought=NUM_BROUGHT,
        dim=DIM,
        odd_keys=odd,
        odd_queries=False,
        pdl=False,
    )
    found = there.cpu()
    assert torch.equal(targets.cpu(), brought)
    assert torch.equal(found[: 4 * COLUMNS].view(torch.int32), columns)
    rows = found[ROWS_AT : ROWS_AT + 2 * DIM * NUM_ROWS].view(torch.bfloat16).view(NUM_ROWS, DIM)
    numbers = expected.isnan()
    assert torch.equal(rows.isnan(), numbers)
    assert torch.equal(rows[~numbers].view(torch.int16), expected[~numbers].view(torch.int16))
    addresses_at = ROWS_AT + 2 * DIM * NUM_ROWS
    assert (found[addresses_at : addresses_at + 8 * NUM_ROWS] == 9).all(), "nobody reads these there"
    assert (found[-GUARD:] == 9).all()
