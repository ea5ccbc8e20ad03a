"""What is asked for run by run: scores as they rank, appends and selections that pass a run by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockdex_kernels import IndexSpec
from blockdex_kernels.cpu import CpuBackend
from blockdex_kernels.interface import (
    RUN_APPENDS,
    RUN_SELECTS,
    RUN_WANTS_SCORES,
    Backend,
    Fp8Scoring,
    Order,
    Selection,
)
from blockdex_kernels.reference import Reference, select
from support.kernel_cases import Run, load, pages_of, random_run
from support.triton_device import DEVICE
from support.triton_device import backend_for as triton_backend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CACHES: tuple[tuple[Any, Fp8Scoring], ...] = (("bf16", "native"), ("fp8_e4m3", "native"), ("fp8_e4m3", "upcast"))
ORDERS: tuple[Order, ...] = ("ascending", "score")
SHAPES = [(1, 1), (40, 4), (95, 2), (160, 1), (33, 18), (140, 3)]


def cpu_backend(spec: IndexSpec, runs: list[Run], fp8_scoring: Fp8Scoring) -> Backend:
    return CpuBackend(spec, pages_of(runs, spec) + 7, reason="tested", fp8_scoring=fp8_scoring)


def check_raw(ids: torch.Tensor, scores: torch.Tensor, reference: Reference) -> None:
    """Scores are those of the blocks beside them, unscaled, of forced blocks too; -inf beside -1."""
    used = ids.long().clamp(min=0)
    expected = reference.block_scores.gather(2, used).masked_fill(ids < 0, -math.inf)
    tolerance = reference.tolerance[..., None] + expected.abs().nan_to_num(posinf=0.0) * 2.0**-22
    assert ((scores.double() == expected) | ((scores.double() - expected).abs() <= tolerance)).all()


@pytest.mark.parametrize("make", [cpu_backend, triton_backend], ids=["cpu", "triton"])
@pytest.mark.parametrize(
    ("forced", "cache", "orders"),
    [
        ((0, 1), CACHES[0], ORDERS),
        ((0, 0), CACHES[1], ORDERS[::-1]),
        ((1, 2), CACHES[2], ORDERS),
        ((3, 3), CACHES[0], ORDERS[::-1]),
    ],
)
def test_raw_scores_are_as_they_rank(
    make: Callable[..., Backend],
    forced: tuple[int, int],
    cache: tuple[Any, Fp8Scoring],
    orders: tuple[Order, ...],
    generator: torch.Generator,
) -> None:
    """`orders`: of the decode, and of the prefill."""
    sizes = {"num_layers": 3, "num_index_heads": 1, "head_dim": 16, "block_size": 16, "topk": 6, "key_dtype": cache[0]}
    spec = IndexSpec(init_blocks=forced[0], local_blocks=forced[1], **sizes)
    runs = [random_run(generator, spec, *shape, layer=row % 3) for row, shape in enumerate(SHAPES)]
    backend = make(spec, runs, cache[1])
    spans = load(backend, runs, generator)
    queries = torch.cat([run.queries for run in runs]).to(backend.device)
    counts = [len(run.queries) for run in runs]
    for phase, order in zip((backend.decode, backend.prefill), orders, strict=True):
        plain = phase(queries, spans, order=order, return_scores=False)
        selection = phase(queries, spans, order=order, return_scores=True, raw_scores=True)
        assert selection.scores is not None
        assert torch.equal(selection.block_ids, plain.block_ids)
        parts = zip(
            torch.split(selection.block_ids.cpu(), counts),
            torch.split(selection.scores.cpu(), counts),
            runs,
            strict=True,
        )
        for ids, scores, run in parts:
            tolerance = backend.flip_tolerance
            judged = select(run.keys, run.queries, run.first, spec, fp8_scoring=cache[1], flip_tolerance=tolerance)
            check_raw(ids, scores, judged)


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_a_launch_does_for_each_run_what_its_flags_say(key_dtype: Any, generator: torch.Generator) -> None:
    """Nobody else's answer depends on it; of runs that do not append, or select, nothing is written, or read."""
    spec = IndexSpec(num_layers=3, num_index_heads=2, head_dim=16, block_size=16, topk=6, key_dtype=key_dtype)
    runs = [random_run(generator, spec, *shape, layer=row % 3) for row, shape in enumerate(SHAPES)]
    backend = triton_backend(spec, runs)
    spans = dataclasses.replace(load(backend, runs, generator), max_length=18)
    queries = torch.cat([run.queries for run in runs]).to(DEVICE)
    expected = backend.decode(queries, spans, order="ascending", return_scores=True, raw_scores=True)
    assert expected.scores is not None
    flags = [RUN_SELECTS, RUN_APPENDS, RUN_SELECTS | RUN_WANTS_SCORES, 0, RUN_SELECTS | RUN_WANTS_SCORES, RUN_SELECTS]
    flagged = dataclasses.replace(spans, flags=torch.tensor(flags, dtype=torch.int32, device=DEVICE))
    counts = [len(run.queries) for run in runs]

    before = backend.pages.view(torch.uint8).clone()
    backend.append(torch.full((sum(counts), 16), 3.0, device=DEVICE), flagged)
    changed = (backend.pages.view(torch.uint8) != before).flatten(2).any(dim=2).nonzero().tolist()
    table = spans.page_table.tolist()
    (first, layer), (last, _) = ((table[1][block], 1) for block in (36 // 16, 39 // 16))
    assert {tuple(cell) for cell in changed} == {(first, layer), (last, layer)}

    backend.pages.view(torch.uint8).copy_(before)
    ids = torch.full(expected.block_ids.shape, -2, dtype=torch.int32, device=DEVICE)
    scores = torch.full(ids.shape, 99.0, device=DEVICE)
    backend.decode_into(Selection(ids, scores), queries, flagged, order="ascending")
    for run, (flag, own) in enumerate(zip(flags, torch.split(ids, counts), strict=True)):
        wanted = torch.split(expected.block_ids, counts)[run]
        assert torch.equal(own, wanted if flag & RUN_SELECTS else torch.full_like(wanted, -1)), run
        told, raw = torch.split(scores, counts)[run], torch.split(expected.scores, counts)[run]
        assert torch.equal(told, raw if flag & RUN_WANTS_SCORES else torch.full_like(raw, 99.0)), run
