"""Which member a root goes to."""

from __future__ import annotations

import numpy as np
import pytest

from blockdex.cluster.rendezvous import owners

ROOTS = np.arange(200_000, dtype=np.uint64)


def names(count: int) -> list[str]:
    return [f"m{number}" for number in range(count)]


def test_answers_that_any_language_gives() -> None:
    # Worked out one by one, in plain integers modulo 2^64.
    roots = [0, 1, 2, 7, 1 << 40, (1 << 64) - 1]
    assert owners("default", roots, names(4), [1, 1, 1, 1]).tolist() == [0, 0, 2, 1, 3, 0]
    assert owners("tenant-ü", roots, names(4), [1, 2, 0.5, 1]).tolist() == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("weights", [[1.0] * 5, [1, 2, 3, 0, 0.5]])
def test_shares_follow_weights(weights: list[float]) -> None:
    counts = np.bincount(owners("a", ROOTS, names(5), weights), minlength=5)
    expected = len(ROOTS) * np.array(weights) / sum(weights)
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected))


@pytest.mark.parametrize("count", [1, 3, 10, 100])
def test_a_member_that_joins_takes_its_share_and_nothing_else_moves(count: int) -> None:
    before = owners("a", ROOTS, names(count), [1.0] * count)
    after = owners("a", ROOTS, names(count + 1), [1.0] * (count + 1))
    moved = before != after
    assert np.all(after[moved] == count)
    assert moved.mean() <= 1.1 / (count + 1)


def test_the_order_of_the_list_and_the_tenant() -> None:
    forward = owners("a", ROOTS[:1000], names(5), [1, 2, 3, 4, 5])
    backward = owners("a", ROOTS[:1000], names(5)[::-1], [5, 4, 3, 2, 1])
    assert np.array_equal(forward, 4 - backward)
    assert not np.array_equal(forward, owners("b", ROOTS[:1000], names(5), [1, 2, 3, 4, 5]))
