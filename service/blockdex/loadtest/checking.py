"""A sample of answers against the float64 reference: equal, a flip that rounding explains, or wrong."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from blockdex.loadtest.sampling import Sample
from blockdex.loadtest.tensors import Run, TensorPool
from blockdex_kernels import IndexSpec

_MOST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class WrongAnswer:
    """An answer that the reference does not give, and that rounding does not explain."""

    sequence: int
    layer: int
    position: int
    operation: str
    reason: str


@dataclass(slots=True)
class Checks:
    """What came of checking.

    Attributes:
        answers: selections answered in the run.
        sampled: answers of which some rows were kept.
        checked: answers with a row that had to leave a block out, held against the reference; where a minute was not
            enough, of the first ones alone.
        whole: answers whose rows took every block that there was: held against it too, but they test no selection.
        rows: rows of block ids that had to leave a block out, one for each query and head.
        flips: blocks exchanged for others whose scores are as high but for rounding.
        wrong: what was neither equal nor a flip.
    """

    answers: int = 0
    sampled: int = 0
    checked: int = 0
    whole: int = 0
    rows: int = 0
    flips: int = 0
    wrong: list[WrongAnswer] = field(default_factory=list)


def reference_is_there() -> bool:
    """Whether the reference can be run: it needs torch, which the client alone does not bring."""
    try:
        return importlib.util.find_spec("torch") is not None
    except ValueError:
        return False


def check(samples: Sequence[Sample], answers: int, spec: IndexSpec, pool: TensorPool) -> Checks:
    """Checks as many samples as can be in a minute.

    Args:
        samples: what was kept.
        answers: of how many answers.
        spec: the server's indexer.
        pool: where keys and queries came from.
    """
    checks = Checks(answers=answers, sampled=len(samples))
    deadline = time.monotonic() + _MOST_SECONDS
    for sample in samples:
        if time.monotonic() > deadline:
            break
        for row, query in enumerate(sample.queries):
            _check_row(checks, sample, row, query, spec, pool)
        choosing = sum(leaves_out(query.start, spec) for query in sample.queries)
        checks.rows += choosing * spec.num_index_heads
        checks.checked += choosing > 0
        checks.whole += choosing == 0
    return checks


def leaves_out(position: int, spec: IndexSpec) -> bool:
    """Whether a query at the position sees more blocks than it selects; else there is nothing to be wrong about."""
    return position // spec.block_size + 1 > spec.topk


def _check_row(checks: Checks, sample: Sample, row: int, query: Run, spec: IndexSpec, pool: TensorPool) -> None:
    block_ids = sample.block_ids[row]
    visible = [
        Run(run.start, min(run.length, query.start + 1 - run.start), run.stream)
        for run in sample.keys
        if run.start <= query.start
    ]
    keys = pool.keys(sample.layer, visible)
    flips, reason = _judge(block_ids, keys, pool.queries(sample.layer, [query]), query.start, spec)
    checks.flips += flips
    if reason:
        checks.wrong.append(WrongAnswer(sample.sequence, sample.layer, query.start, sample.operation, reason))


def _judge(
    block_ids: NDArray[Any], keys: NDArray[Any], queries: NDArray[Any], position: int, spec: IndexSpec
) -> tuple[int, str]:
    """Flips in the rows `[H, topk]` of one query, and why they are wrong; no reason where they are right."""
    # Loading torch takes seconds, and only the end of a run needs it.
    import torch  # noqa: PLC0415

    from blockdex_kernels import reference  # noqa: PLC0415

    if not _ascending(block_ids):
        return 0, f"not in ascending order, or -1 before the end: {block_ids.tolist()}"
    reason = ""
    # An fp8 cache may be scored with fp8 or with bf16 queries, as its server was told: either is right.
    ways: tuple[Literal["native", "upcast"], ...] = (
        ("native", "upcast") if spec.key_dtype == "fp8_e4m3" else ("native",)
    )
    for fp8_scoring in ways:
        expected = reference.select(_torch(keys), _torch(queries), position, spec, fp8_scoring=fp8_scoring)
        try:
            return reference.count_flips(torch.from_numpy(block_ids)[None], expected.block_ids, expected), ""
        except reference.SelectionMismatchError as mismatch:
            reason = reason or str(mismatch)
    return 0, reason


def _torch(values: NDArray[Any]) -> Any:
    import torch  # noqa: PLC0415

    return torch.from_numpy(values.astype(np.float32))


def _ascending(block_ids: NDArray[Any]) -> bool:
    # -1 stands for "after every block".
    places = np.where(block_ids < 0, np.iinfo(np.int32).max, block_ids)
    return bool((np.diff(places, axis=-1) >= 0).all())
