"""The total order of candidates on the CPU, where no product would show it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from blockdex_kernels.cpu.ranking import NONE, arrange, merge
from blockdex_kernels.spec import IndexSpec

SPEC = IndexSpec(num_layers=1, head_dim=1, block_size=1, topk=3, local_blocks=0)


def rank(scores: list[float], limit: int = 99, places: int = 3) -> list[tuple[int, float]]:
    """Block ids and scores of one row, best first."""
    column = np.array(scores, np.float32)[None, :, None]
    best = merge(np.empty((1, 1, 0), np.int64), column, np.arange(len(scores)), np.full((1, 1), limit), places)
    spec = IndexSpec(num_layers=1, head_dim=1, block_size=1, topk=places, local_blocks=0)
    ids, values = arrange(best, np.array([[len(scores) - 1]]), spec, "score", return_scores=True)
    assert values is not None
    ids, values = ids[0], values[0]
    return [
        (-1 if block == NONE else block, score)
        for block, score in zip(ids[0].tolist(), values[0].tolist(), strict=True)
    ]


@pytest.mark.parametrize("zeros", list(itertools.product([0.0, -0.0], repeat=3)), ids=str)
def test_zeros_of_either_sign_are_a_tie(zeros: tuple[float, ...]) -> None:
    assert [block for block, _ in rank(list(zeros))] == [0, 1, 2]


def test_equal_scores_go_to_the_lower_block() -> None:
    assert [block for block, _ in rank([1.0, 2.0, 1.0, 2.0, 1.0])] == [1, 3, 0]


def test_scores_come_back_as_they_went_in() -> None:
    scores = [1.5, -(2.0**-149), math.inf, -3e38, 2.0**-149, 3e38]

    assert rank(scores, places=6) == [
        (2, math.inf),
        *((block, float(np.float32(scores[block]))) for block in (5, 0, 4, 1, 3)),
    ]


def test_the_least_score_ranks_above_no_block() -> None:
    assert rank([-math.inf, -math.inf], places=4) == [(0, -math.inf), (1, -math.inf), (-1, -math.inf), (-1, -math.inf)]


def test_blocks_from_the_limit_on_are_not_offered() -> None:
    assert [block for block, _ in rank([1.0, 2.0, 3.0, 4.0], limit=2)] == [1, 0, -1]


def test_the_highest_block_id_survives() -> None:
    ids = np.array([2**31 - 3, 2**31 - 2])
    best = merge(np.empty((1, 1, 0), np.int64), np.zeros((1, 2, 1), np.float32), ids, np.full((1, 1), 2**31), 3)

    arranged, _ = arrange(best, ids[None, -1:], SPEC, "ascending", return_scores=False)

    assert arranged.astype(np.int32).tolist() == [[[2**31 - 3, 2**31 - 2, -1]]]


def test_merging_piece_by_piece_is_merging_at_once() -> None:
    scores = np.random.default_rng(0).integers(-3, 3, (2, 40, 4)).astype(np.float32)
    limits = np.array([[5, 40, 17, 0], [40, 39, 20, 33]])
    none = np.empty((2, 4, 0), np.int64)
    at_once = merge(none, scores, np.arange(40), limits, 5)
    best = none
    for begin, end in ((0, 3), (3, 20), (20, 21), (21, 40)):
        best = merge(best, scores[:, begin:end], np.arange(begin, end), limits, 5)

    assert np.array_equal(np.sort(best), np.sort(at_once))
