"""Top-k of the Triton kernels on its own, against sorting in Python, on scores that no kernel has to compute."""

from __future__ import annotations

import math

import pytest
import torch

from blockdex_kernels import IndexSpec
from blockdex_kernels.interface import Order
from blockdex_kernels.triton.rank import Signals, rank
from support.triton_device import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BLOCK = 4
UNREADABLE = 3e38
"""Stands where no kernel may read: it would win."""

UNWRITTEN = -7

SPECS = {
    "K=1": IndexSpec(topk=2, local_blocks=1, init_blocks=0, block_size=BLOCK),
    "K=5, init and local": IndexSpec(topk=8, local_blocks=2, init_blocks=1, block_size=BLOCK),
    "K=15": IndexSpec(topk=16, local_blocks=1, init_blocks=0, block_size=BLOCK),
    "K=16": IndexSpec(topk=16, local_blocks=0, init_blocks=0, block_size=BLOCK),
    "K=32": IndexSpec(topk=32, local_blocks=0, init_blocks=0, block_size=BLOCK),
    "K=40, init and local": IndexSpec(topk=45, local_blocks=2, init_blocks=3, block_size=BLOCK),
    "all forced": IndexSpec(topk=4, local_blocks=2, init_blocks=2, block_size=BLOCK),
}


def rows_of(width: int, generator: torch.Generator) -> tuple[torch.Tensor, list[int]]:
    """Scores `[rows, width]` of every awkward kind, and how many of them a row sees."""
    odd = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 2.0**-149, -1.0])
    spread = torch.randn(width, generator=generator)
    kinds = [
        spread.sort().values,
        spread.sort(descending=True).values,
        torch.randint(3, (width,), generator=generator) - 1.0,
        odd[torch.randint(8, (width,), generator=generator)],
        torch.full((width,), -math.inf),
        torch.full((width,), math.nan),
        1.0 + torch.randint(4, (width,), generator=generator) * 2.0**-23,
        torch.where(torch.arange(width) % 37 == 5, 1e30, -1e30),
        spread,
        torch.randint(2, (width,), generator=generator).float(),
    ]
    visible = [
        width - 1,
        width,
        width,
        max(width * 5 // 8, 1),
        width,
        width - 3,
        width,
        width * 7 // 8 + 1,
        width,
        width,
    ]
    few = torch.randint(1, max(width // 2, 2), (2,), generator=generator).tolist()
    return torch.stack([spread, spread, *kinds]), [*few, *visible]


def expected_row(scores: list[float], visible: int, spec: IndexSpec, order: Order) -> tuple[list[int], list[float]]:
    """Block ids and unscaled scores of one row."""
    init = list(range(min(spec.init_blocks, visible)))
    local = [block for block in range(max(visible - spec.local_blocks, 0), visible) if block not in init]
    known = [-math.inf if math.isnan(score) else score for score in scores]
    candidates = [block for block in range(visible) if block not in init + local]
    best = sorted(candidates, key=lambda block: (-known[block], block))[: spec.topk - len(init) - len(local)]
    blocks = init + local + best
    if order == "ascending":
        blocks.sort()
    values = [known[block] if block in best else math.inf for block in blocks]
    unused = spec.topk - len(blocks)
    return blocks + [-1] * unused, values + [-math.inf] * unused


def test_rows_with_a_target_go_there_and_leave_minus_one_behind(generator: torch.Generator) -> None:
    spec, (scores, visible) = SPECS["K=15"], rows_of(160, generator)
    positions = (torch.tensor(visible) * BLOCK - 1).to(DEVICE, torch.int32)
    plain, ids, elsewhere = (
        torch.full((len(visible), 1, spec.topk), UNWRITTEN, dtype=torch.int32, device=DEVICE) for _ in range(3)
    )
    has_target = torch.arange(len(visible)) % 3 == 1
    addresses = elsewhere.data_ptr() + 4 * spec.topk * torch.arange(len(visible))
    wants = torch.ones(len(visible), dtype=torch.int32, device=DEVICE)
    raw, expected = (torch.zeros(plain.shape, device=DEVICE) for _ in range(2))
    inputs = (scores.to(DEVICE), positions, wants, None)
    rank(*inputs, plain, expected, spec, order="ascending", pdl=False)
    targets = torch.where(has_target, addresses, 0).to(DEVICE)
    rank(*inputs, ids, raw, spec, order="ascending", pdl=False, targets=targets)
    assert torch.equal(elsewhere[has_target], plain[has_target])
    assert (elsewhere[~has_target] == UNWRITTEN).all()
    assert torch.equal(ids[~has_target], plain[~has_target])
    assert (ids[has_target] == -1).all()
    assert torch.equal(raw, expected)


def test_numbers_are_written_behind_the_ids(generator: torch.Generator) -> None:
    """Once a launch, and the next one begins as this one did."""
    spec, (scores, visible) = SPECS["K=15"], rows_of(160, generator)
    positions = (torch.tensor(visible) * BLOCK - 1).to(DEVICE, torch.int32)
    ids = torch.full((len(visible), 1, spec.topk), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    told = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    arrived = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    at = told.data_ptr()
    for launch, addresses in enumerate(([at + 8, 0, 0, at + 24], [0] * 4, [0, at, 0, 0])):
        told.zero_()
        numbers = [(1 << 40) + 10 * launch + place for place in range(4)]
        signals = Signals(torch.tensor(addresses + numbers, device=DEVICE), arrived)
        rank(scores.to(DEVICE), positions, None, None, ids, None, spec, order="ascending", pdl=False, signals=signals)
        expected_told = [0] * 4
        for address, number in zip(addresses, numbers, strict=True):
            if address:
                expected_told[(address - at) // 8] = number
        assert told.tolist() == expected_told
        assert arrived.item() == 0


@pytest.mark.parametrize(
    ("width", "name", "order", "valued"),
    [
        (32, "K=15", "ascending", False),
        (32, "K=40, init and local", "score", True),
        (96, "K=16", "score", True),
        (128, "K=1", "ascending", False),
        (160, "K=5, init and local", "ascending", True),
        (224, "K=15", "ascending", False),
        (480, "K=32", "ascending", False),
        (480, "all forced", "score", False),
        (992, "K=40, init and local", "ascending", False),
        (1024, "K=15", "score", True),
        (1056, "K=5, init and local", "score", False),
        (2048, "K=15", "ascending", False),
        (2048, "K=1", "score", True),
    ],
)
@pytest.mark.parametrize("few_rows", [0, 1024], ids=["as many", "as few"])
def test_rows_of_every_kind(
    width: int,
    name: str,
    order: Order,
    valued: bool,
    few_rows: int,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("blockdex_kernels.triton.rank._FEW_ROWS", few_rows)
    spec, (scores, visible) = SPECS[name], rows_of(width, generator)
    hidden = torch.arange(width)[None] >= torch.tensor(visible)[:, None] - spec.local_blocks
    hidden |= torch.arange(width)[None] < spec.init_blocks
    positions = torch.tensor(visible) * BLOCK - 1 - torch.arange(len(visible)) % BLOCK
    # A row before those that are written, and one behind.
    all_ids = torch.full((len(visible) + 2, 1, spec.topk), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    all_values = torch.full(all_ids.shape, float(UNWRITTEN), device=DEVICE)
    ids, values = all_ids[1:-1], all_values[1:-1] if valued else None
    unscales = torch.full((len(visible),), 0.25, device=DEVICE) if valued else None

    rank(
        torch.where(hidden, UNREADABLE, scores).to(DEVICE),
        positions.to(DEVICE, torch.int32),
        None,
        unscales,
        ids,
        values,
        spec,
        order=order,
        pdl=False,
    )

    for written in (all_ids, all_values):
        assert (written[[0, -1]] == UNWRITTEN).all()
    for row, seen in enumerate(visible):
        blocks, best = expected_row(scores[row].tolist(), seen, spec, order)
        assert ids[row, 0].tolist() == blocks, f"row {row}"
        if values is not None:
            scaled = torch.tensor(best) * 0.25 * spec.score_scale
            torch.testing.assert_close(values[row, 0].cpu(), scaled, rtol=2.0**-22, atol=0.0)


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_share_a_position_and_padded_tokens_get_nothing(heads: int, generator: torch.Generator) -> None:
    spec = SPECS["K=5, init and local"]
    scores = torch.randn(3 * heads, 64, generator=generator)
    positions = torch.tensor([30 * BLOCK, -1, 64 * BLOCK - 1], dtype=torch.int32)
    ids = torch.empty((3, heads, spec.topk), dtype=torch.int32, device=DEVICE)
    values = torch.empty(ids.shape, device=DEVICE)

    rank(scores.to(DEVICE), positions.to(DEVICE), None, None, ids, values, spec, order="ascending", pdl=False)

    for token, visible in enumerate((31, 0, 64)):
        for head in range(heads):
            blocks, _ = expected_row(scores[token * heads + head].tolist(), visible, spec, "ascending")
            assert ids[token, head].tolist() == blocks
    assert (values[1] == -math.inf).all()
