"""Samples of answers, and what becomes of right, exchanged and wrong ones."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from blockdex.loadtest.checking import check
from blockdex.loadtest.sampling import Sample, Sampler
from blockdex.loadtest.steps import KeptSequence, TokenStep
from blockdex.loadtest.tensors import Run, TensorPool
from blockdex_kernels import IndexSpec, reference

SPEC = IndexSpec(num_layers=2, num_index_heads=2, head_dim=16, block_size=8, topk=4)
POOL = TensorPool(heads=2, head_dim=16, longest=200, seed=1)
LAYER = 1


def answer(sequence: KeptSequence, spans: list[Run], spec: IndexSpec = SPEC) -> NDArray[np.int32]:
    """What a server that is right answers for runs of one sequence."""
    keys = torch.from_numpy(POOL.keys(LAYER, sequence.runs).astype(np.float32))
    rows = []
    for run in spans:
        queries = torch.from_numpy(POOL.queries(LAYER, [run]).astype(np.float32))
        rows.append(reference.select(keys, queries, run.start, spec).block_ids.numpy())
    return np.concatenate(rows)


def sample_of(tokens: int = 200, rows: int = 6, spec: IndexSpec = SPEC) -> Sample:
    sequence = KeptSequence(7, itertools.count(1))
    sequence.write(0, tokens - rows)
    span = sequence.write(tokens - rows, rows)
    sampler = Sampler(1.0, "seed")
    sampler.consider(TokenStep("decode", "AppendAndSelect", LAYER, (span,)), answer(sequence, [span.run], spec))
    (sample,) = sampler.samples
    return sample


def test_right_answers_are_right() -> None:
    samples = [sample_of(), sample_of(tokens=9), sample_of(tokens=200, rows=1)]
    checks = check(samples, 50, SPEC, POOL)
    assert (checks.answers, checks.sampled, checks.flips) == (50, 3, 0)
    # The one of nine tokens, two blocks, takes both: it is right whatever the scores are.
    assert (checks.checked, checks.whole) == (2, 1)
    assert checks.rows == 2 * sum(len(sample.queries) for sample in samples[::2]) >= 2 * (2 + 1)
    assert not checks.wrong


@pytest.mark.parametrize(("tokens", "checked"), [(32, 0), (33, 1)])
def test_an_answer_counts_from_the_first_block_that_it_must_leave_out(tokens: int, checked: int) -> None:
    checks = check([sample_of(tokens=tokens, rows=1)], 1, SPEC, POOL)
    assert (checks.checked, checks.whole, checks.rows) == (checked, 1 - checked, 2 * checked)


def test_a_wrong_answer_is_wrong_where_nothing_was_left_out_too() -> None:
    sample = sample_of(tokens=9, rows=1)
    sample.block_ids[0, 0, :2] = [1, 1]
    checks = check([sample], 1, SPEC, POOL)
    assert (checks.checked, len(checks.wrong)) == (0, 1)


@pytest.mark.parametrize("fp8_scoring", ["native", "upcast"])
def test_an_fp8_cache_may_be_scored_either_way(fp8_scoring: Literal["native", "upcast"]) -> None:
    spec = dataclasses.replace(SPEC, key_dtype="fp8_e4m3")
    sample = sample_of(spec=spec)
    keys = torch.from_numpy(POOL.keys(LAYER, sample.keys).astype(np.float32))
    for row, run in enumerate(sample.queries):
        queries = torch.from_numpy(POOL.queries(LAYER, [run]).astype(np.float32))
        chosen = reference.select(keys, queries, run.start, spec, fp8_scoring=fp8_scoring)
        sample.block_ids[row] = chosen.block_ids[0].numpy()
    assert not check([sample], 1, spec, POOL).wrong


def corrupted(change: str) -> Sample:
    sample = sample_of()
    row = sample.block_ids[1, 0]
    others = [block for block in range(int(row[-1])) if block not in row]
    match change:
        case "another block":
            row[:-1] = sorted([*row[1:-1], others[0]])
        case "twice":
            row[0] = row[1]
        case "missing":
            row[:] = [*row[1:], -1]
        case "not ascending":
            row[:2] = row[1::-1]
        case "-1 first":
            row[:] = [-1, *row[1:]]
        case "beyond":
            row[-1] += 1
    return sample


@pytest.mark.parametrize("change", ["another block", "twice", "missing", "not ascending", "-1 first", "beyond"])
def test_wrong_answers_are_wrong(change: str) -> None:
    checks = check([sample_of(), corrupted(change)], 2, SPEC, POOL)
    (wrong,) = checks.wrong
    assert (wrong.sequence, wrong.layer, wrong.operation) == (7, LAYER, "decode")
    assert wrong.position == corrupted(change).queries[1].start
    assert wrong.reason


class PairedPool(TensorPool):
    """A pool whose blocks come in pairs with the same keys, so that either of a pair is as good as the other."""

    def keys(self, layer: int, runs: Sequence[Run]) -> NDArray[Any]:
        """As of any pool, but that every other block repeats the one before it."""
        keys = super().keys(layer, runs)
        for start in range(8, len(keys) - 7, 16):
            keys[start : start + 8] = keys[start - 8 : start]
        return keys


def test_an_exchange_within_rounding_is_a_flip() -> None:
    pool = PairedPool(heads=2, head_dim=16, longest=200, seed=1)
    query = Run(199, 1, 1)
    keys, queries = (
        torch.from_numpy(values.astype(np.float32))
        for values in (pool.keys(LAYER, [Run(0, 200, 1)]), pool.queries(LAYER, [query]))
    )
    block_ids = reference.select(keys, queries, query.start, SPEC).block_ids.numpy()
    block_ids[0, 0] = [*sorted(_with_a_twin(block_ids[0, 0, :-1].tolist())), block_ids[0, 0, -1]]
    sample = Sample("decode", 7, LAYER, (Run(0, 200, 1),), (query,), block_ids)
    checks = check([sample], 1, SPEC, pool)
    assert (checks.wrong, checks.flips) == ([], 1)


def _with_a_twin(blocks: list[int]) -> list[int]:
    """The blocks, with one whose twin is not among them exchanged for that twin."""
    lonely = next(block for block in blocks if block ^ 1 not in blocks)
    return [lonely ^ 1 if block == lonely else block for block in blocks]


def test_a_few_answers_are_always_kept_and_never_too_many() -> None:
    sequence = KeptSequence(7, itertools.count(1))
    span = sequence.write(0, 5)
    step = TokenStep("decode", "AppendAndSelect", LAYER, (span,))
    block_ids = answer(sequence, [span.run])
    for share, least, most in ((0.0, 0, 0), (1e-9, 4, 4), (0.1, 200, 256), (1.0, 256, 256)):
        sampler = Sampler(share, "seed")
        for _ in range(3000):
            sampler.consider(step, block_ids)
        assert least <= len(sampler.samples) <= most
        assert sampler.answers == 3000


def test_a_sample_is_of_the_row_that_it_says() -> None:
    """Spans of three sequences in one call: the rows kept are those of the span's own queries."""
    sequences = [KeptSequence(number, itertools.count(100 * number)) for number in (1, 2, 3)]
    spans = tuple(sequence.write(0, 30 * number) for number, sequence in enumerate(sequences, 1))
    block_ids = np.concatenate([answer(sequence, [span.run]) for sequence, span in zip(sequences, spans, strict=True)])
    sampler = Sampler(1.0, "seed")
    for _ in range(20):
        sampler.consider(TokenStep("prefill", "AppendAndSelect", LAYER, spans), block_ids)
    assert {sample.sequence for sample in sampler.samples} == {1, 2, 3}
    assert not check(sampler.samples, 20, SPEC, POOL).wrong
