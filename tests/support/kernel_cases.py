"""Sequences laid out in the pages of a backend, and the check that its selections are the reference's.

Pages start as NaN from end to end, page ids are shuffled, and the places of the page table that must not be read hold
an id that no cache has: whatever a kernel reads beyond what it may shows in its answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from blockdex_kernels.interface import Backend, Fp8Scoring, Order, Selection, Spans
from blockdex_kernels.reference import Reference, count_flips, select
from blockdex_kernels.spec import IndexSpec

UNREADABLE = 2**31 - 1

ON_GPU = torch.cuda.is_available()
"""Elsewhere the Triton kernels are interpreted, which takes seconds."""


@dataclass(slots=True)
class Tally:
    """What the checks of a test run compared: `rows` selections, of which rounding exchanged `flips` blocks."""

    rows: int = 0
    flips: int = 0


TALLY = Tally()


@dataclass(frozen=True, slots=True)
class Run:
    """One sequence in one layer and its last queries.

    Attributes:
        keys: `[length, D]`, the whole sequence.
        queries: `[T, H, D]`, of the last T positions, or of those from `start` on.
        layer: the layer.
        start: position of the first query; None for the last T.
    """

    keys: torch.Tensor
    queries: torch.Tensor
    layer: int = 0
    start: int | None = None

    @property
    def first(self) -> int:
        """Position of the first query."""
        return len(self.keys) - len(self.queries) if self.start is None else self.start


def random_run(generator: torch.Generator, spec: IndexSpec, length: int, num_queries: int, layer: int = 0) -> Run:
    """Normally distributed keys and queries, in float32."""
    keys = torch.randn(length, spec.head_dim, generator=generator)
    return Run(keys, torch.randn(num_queries, spec.num_index_heads, spec.head_dim, generator=generator), layer)


def pages_of(runs: list[Run], spec: IndexSpec) -> int:
    """Pages that the runs fill."""
    return sum(-(-len(run.keys) // spec.block_size) for run in runs)


def poison(backend: Backend) -> None:
    """Makes every element of every page NaN."""
    backend.pages.view(torch.uint8).fill_(0xFF)


def spans_of(layers: list[int], starts: list[int], lengths: list[int], page_table: torch.Tensor) -> Spans:
    """Spans from plain columns, on the page table's device."""
    columns = torch.tensor([layers, starts, lengths], dtype=torch.int32, device=page_table.device)
    return Spans(columns[0], columns[1], columns[2], page_table.to(torch.int32))


def load(backend: Backend, runs: list[Run], generator: torch.Generator) -> Spans:
    """Poisons the pages, appends the keys of all runs in one call, and returns the spans of their queries."""
    spec, device = backend.spec, backend.device
    poison(backend)
    page_ids = torch.randperm(len(backend.pages), generator=generator).tolist()
    table = torch.full((len(runs), max(-(-len(run.keys) // spec.block_size) for run in runs) + 1), UNREADABLE)
    for row, run in enumerate(runs):
        for block in range(-(-len(run.keys) // spec.block_size)):
            table[row, block] = page_ids.pop()
    page_table = table.to(device)
    layers = [run.layer for run in runs]
    whole = spans_of(layers, [0] * len(runs), [len(run.keys) for run in runs], page_table)
    backend.append(torch.cat([run.keys for run in runs]).to(device), whole)
    return spans_of(layers, [run.first for run in runs], [len(run.queries) for run in runs], page_table)


def check(
    backend: Backend,
    runs: list[Run],
    generator: torch.Generator,
    *,
    order: Order = "ascending",
    fp8_scoring: Fp8Scoring = "native",
    flip_tolerance: float | None = None,
    plain: bool = ON_GPU,
    oracle: Callable[..., Reference] = select,
) -> Selection:
    """Loads the runs, selects by decode and by prefill, and compares with the reference.

    Args:
        backend: empty or not, its pages are overwritten.
        runs: what it selects for.
        generator: shuffles the pages.
        order: of the selections.
        fp8_scoring: what the backend was made with.
        flip_tolerance: the backend's own if None.
        plain: whether it selects without scores too, which must select the same.
        oracle: answers as `reference.select`.

    Returns:
        What decode answered.
    """
    spans = load(backend, runs, generator)
    queries = torch.cat([run.queries for run in runs]).to(backend.device)
    tolerance = backend.flip_tolerance if flip_tolerance is None else flip_tolerance
    judged = partial(oracle, spec=backend.spec, order=order, fp8_scoring=fp8_scoring, flip_tolerance=tolerance)
    references = [judged(run.keys, run.queries, run.first) for run in runs]
    decoded = backend.decode(queries, spans, order=order, return_scores=True)
    prefilled = backend.prefill(queries, spans, order=order, return_scores=True)
    for selection in (decoded, prefilled):
        compare(selection, references, backend.spec, order)
    for phase, selection in ((backend.decode, decoded), (backend.prefill, prefilled)) if plain else ():
        alone = phase(queries, spans, order=order, return_scores=False)
        assert alone.scores is None
        assert torch.equal(alone.block_ids, selection.block_ids)
    return decoded


def compare(selection: Selection, references: list[Reference], spec: IndexSpec, order: Order) -> None:
    """Compares a selection of packed runs, with scores, with the references of the runs; counts the flips."""
    assert selection.scores is not None
    assert (selection.block_ids.dtype, selection.scores.dtype) == (torch.int32, torch.float32)
    counts = [len(reference.block_ids) for reference in references]
    all_ids = torch.split(selection.block_ids.cpu(), counts)
    all_scores = torch.split(selection.scores.cpu().double(), counts)
    for block_ids, scores, reference in zip(all_ids, all_scores, references, strict=True):
        TALLY.rows += block_ids.shape[0] * block_ids.shape[1]
        TALLY.flips += count_flips(block_ids, reference.block_ids, reference)
        _compare_scores(block_ids.long(), scores, reference, spec)
        _check_order(block_ids.long(), scores, reference, order)


def _compare_scores(block_ids: torch.Tensor, scores: torch.Tensor, reference: Reference, spec: IndexSpec) -> None:
    """Scores are those of the blocks beside them: +inf where forced, -inf beside -1, else rounded and scaled."""
    used = block_ids.clamp(min=0)
    forced = reference.forced[:, None, :].expand_as(reference.block_scores).gather(2, used)
    expected = reference.block_scores.gather(2, used) * spec.score_scale
    expected = torch.where(forced, math.inf, expected).masked_fill(block_ids < 0, -math.inf)
    tolerance = reference.tolerance[..., None] * spec.score_scale + expected.abs().nan_to_num(posinf=0.0) * 2.0**-22
    assert ((scores == expected) | ((scores - expected).abs() <= tolerance)).all()


def _check_order(block_ids: torch.Tensor, scores: torch.Tensor, reference: Reference, order: Order) -> None:
    """-1 comes last; before it block ids rise, or forced blocks come as the reference has them and scores fall."""
    used = block_ids >= 0
    rising = block_ids[..., 1:] > block_ids[..., :-1]
    assert (used[..., 1:] <= used[..., :-1]).all()
    if order == "ascending":
        assert (rising | ~used[..., 1:]).all()
        return
    num_forced = reference.forced.sum(dim=1)[:, None, None]
    leading = torch.arange(block_ids.shape[2]) < num_forced
    assert ((block_ids == reference.block_ids) | ~leading).all()
    falling = (scores[..., 1:] < scores[..., :-1]) | ((scores[..., 1:] == scores[..., :-1]) & rising)
    assert (falling | leading[..., :-1] | ~used[..., 1:]).all()
