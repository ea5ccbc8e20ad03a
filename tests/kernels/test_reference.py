"""The reference, against selections worked out by hand: head_dim 1 and a query of 1 make a key's score the key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from blockdex_kernels import IndexSpec
from blockdex_kernels.interface import Order
from blockdex_kernels.reference import Reference, SelectionMismatchError, count_flips, select

INF = math.inf
NAN = math.nan


def spec_of(**fields: Any) -> IndexSpec:
    return IndexSpec(**({"head_dim": 1, "block_size": 2, "topk": 2, "scale": 1.0} | fields))


def select_last(keys: Sequence[float], order: Order = "ascending", query: float = 1.0, **fields: Any) -> Reference:
    """The selection of one query with one head at the last position."""
    rows = torch.tensor(list(keys), dtype=torch.float32)[:, None]
    return select(rows, torch.tensor([[[query]]]), len(keys) - 1, spec_of(**fields), order=order)


def ids(reference: Reference) -> list[int]:
    return reference.block_ids[0, 0].tolist()


def test_the_best_block_joins_the_local_one() -> None:
    reference = select_last([1, 2, 5, 0, 3, 3, -9, -9])

    assert ids(reference) == [1, 3]
    assert reference.block_scores[0, 0].tolist() == [2, 5, 3, -9]
    assert reference.forced[0].tolist() == [False, False, False, True]


def test_a_negative_query_turns_the_order_round() -> None:
    assert ids(select_last([1, 2, 5, 4, 3, 3, 0, 0], query=-1.0)) == [0, 3]


def test_all_elements_of_a_vector_count() -> None:
    keys = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 4.0], [0.0, 0.0]])
    queries = torch.tensor([[[3.0, -1.0], [0.0, 1.0]]])

    reference = select(keys, queries, 3, spec_of(head_dim=2, block_size=1, topk=2))

    assert reference.block_scores[0].tolist() == [[1, 5, -4, 0], [2, 1, 4, 0]]
    assert reference.block_ids[0].tolist() == [[1, 3], [2, 3]]


def test_a_query_sees_the_keys_up_to_its_own() -> None:
    keys = torch.tensor([[1.0], [9.0], [2.0], [8.0], [0.0], [7.0]])

    reference = select(keys, torch.ones(6, 1, 1), 0, spec_of(local_blocks=0, topk=1))

    assert reference.block_ids[:, 0, 0].tolist() == [0, 0, 0, 0, 0, 0]
    assert reference.block_scores[:, 0, 0].tolist() == [1, 9, 9, 9, 9, 9]
    assert reference.block_scores[2:, 0, 1].tolist() == [2, 8, 8, 8]
    assert reference.block_scores[4:, 0, 2].tolist() == [0, 7]
    assert reference.block_scores[:4, 0, 2].isnan().all()


def test_a_run_that_starts_inside_a_block_sees_what_lies_before() -> None:
    keys = torch.tensor([[4.0], [9.0], [2.0], [8.0], [0.0], [7.0], [99.0]])

    reference = select(keys, torch.ones(3, 1, 1), 3, spec_of(local_blocks=0, topk=3))

    assert reference.block_ids[:, 0].tolist() == [[0, 1, -1], [0, 1, 2], [0, 1, 2]]
    assert reference.block_scores[:, 0, :2].tolist() == [[9, 8], [9, 8], [9, 8]]
    assert reference.block_scores[1:, 0, 2].tolist() == [0, 7]


def test_equal_scores_go_to_the_lower_block() -> None:
    assert ids(select_last([0, 0, 7, 1, 1, 7, 7, 7, 0, 0], topk=3)) == [1, 2, 4]


def test_minus_zero_equals_zero() -> None:
    assert ids(select_last([-0.0, -0.0, 0.0, 0.0, -1, -1])) == [0, 2]
    assert ids(select_last([0.0, 0.0, -0.0, -0.0, -1, -1])) == [0, 2]


def test_a_nan_product_counts_as_the_least() -> None:
    reference = select_last([NAN, NAN, NAN, -3, -4, -4, 0, 0], topk=4, order="score")

    assert ids(reference) == [3, 1, 2, 0]
    assert reference.scores[0, 0].tolist() == [INF, -3, -4, -INF]


def test_a_nan_query_selects_the_first_blocks() -> None:
    assert ids(select_last([1, 2, 3, 4, 5, 6, 7, 8], query=NAN, topk=3)) == [0, 1, 3]


def test_infinite_products_rank_at_the_ends() -> None:
    assert ids(select_last([-INF, -INF, 1, 1, INF, 0, -INF, 5, 0, 0], topk=5, order="score")) == [4, 2, 3, 1, 0]


def test_infinity_times_zero_is_nan() -> None:
    assert ids(select_last([INF, INF, -1, -1, 0, 0], query=0.0)) == [1, 2]


def test_init_and_local_blocks_are_selected_whatever_they_score() -> None:
    keys = [-9, -9, 1, 1, 5, 5, 3, 3, -8, -8, -7, -7]
    forced: dict[str, Any] = {"topk": 4, "init_blocks": 1, "local_blocks": 2}

    assert ids(select_last(keys, **forced)) == [0, 2, 4, 5]
    by_score = select_last(keys, order="score", **forced)
    assert ids(by_score) == [0, 4, 5, 2]
    assert by_score.scores[0, 0].tolist() == [INF, INF, INF, 5]
    assert by_score.forced[0].tolist() == [True, False, False, False, True, True]


@pytest.mark.parametrize("order", ["ascending", "score"])
def test_init_and_local_blocks_that_meet_count_once(order: Order) -> None:
    forced: dict[str, Any] = {"topk": 6, "init_blocks": 2, "local_blocks": 3}

    assert ids(select_last([1], order, **forced)) == [0, -1, -1, -1, -1, -1]
    assert ids(select_last([1, 2, 3], order, **forced)) == [0, 1, -1, -1, -1, -1]
    assert ids(select_last([1, 2, 3, 4, 5, 6, 7], order, **forced)) == [0, 1, 2, 3, -1, -1]
    assert ids(select_last(list(range(11)), "ascending", **forced)) == [0, 1, 2, 3, 4, 5]
    assert ids(select_last(list(range(11)), "score", **forced)) == [0, 1, 3, 4, 5, 2]


def test_fewer_blocks_than_places_leave_minus_one_at_the_end() -> None:
    reference = select_last([3, 4, 5], topk=4)

    assert ids(reference) == [0, 1, -1, -1]
    assert reference.scores[0, 0].tolist() == [4, INF, -INF, -INF]


def test_scale_multiplies_what_is_returned_alone() -> None:
    reference = select_last([3, 4, 5, 6, 7], topk=3, scale=0.25)

    assert reference.scores[0, 0].tolist() == [1.0, 1.5, INF]
    assert reference.block_scores[0, 0].tolist() == [4, 6, 7]


def test_keys_and_queries_are_rounded_to_bf16() -> None:
    below_one_step = 1 + 2.0**-9

    assert ids(select_last([1, 1, below_one_step, below_one_step, 0, 0])) == [0, 2]
    assert ids(select_last([1, 1, 1 + 2.0**-7, 0, 0, 0])) == [1, 2]
    assert select_last([1], query=below_one_step).block_scores.item() == 1


@pytest.mark.parametrize("key", [500.0, 1e30, INF])
def test_fp8_keys_saturate(key: float) -> None:
    reference = select_last([448, 0, key, 0, -key, 0, 0, 0], key_dtype="fp8_e4m3", topk=4)

    assert reference.block_scores[0, 0, :3].tolist() == [448, 448, 0]
    assert ids(reference) == [0, 1, 2, 3]
    assert select_last([-key], key_dtype="fp8_e4m3").block_scores.item() == -448


def test_a_nan_fp8_key_stays_one() -> None:
    assert select_last([NAN], key_dtype="fp8_e4m3").block_scores.item() == -INF


def test_native_fp8_rounds_scaled_queries_and_upcast_does_not() -> None:
    # 1.0625 needs four bits behind the point, e4m3 has three; bf16 has seven. 2^-20 is far below e4m3's least number.
    for unit in (1.0, 2.0**-20, 2.0**20):
        keys = torch.ones(1, 1)
        queries = torch.tensor([[[1.0625 * unit]]])
        spec = spec_of(key_dtype="fp8_e4m3")

        assert select(keys, queries, 0, spec, fp8_scoring="native").block_scores.item() == unit
        assert select(keys, queries, 0, spec, fp8_scoring="upcast").block_scores.item() == 1.0625 * unit


def test_the_greatest_finite_element_sets_the_scale_of_a_native_fp8_row() -> None:
    queries = torch.tensor([[[-3.0, 2.0**-10, 0.0], [INF, 1.0, 0.0], [0.0, 0.0, 0.0], [NAN, 1.0, 0.0]]])
    spec = spec_of(key_dtype="fp8_e4m3", head_dim=3)
    keys = torch.eye(3)

    scores = [select(keys[i : i + 1], queries, 0, spec).block_scores[0, :, 0].tolist() for i in range(3)]

    # 3 * 64 = 192 lies in [128, 256), so 2^-10 becomes 2^-4; beside infinity the 1 becomes 128, and infinity 448.
    assert scores[0] == [-3.0, 3.5, 0.0, -INF]
    assert scores[1] == [2.0**-10, 1.0, 0.0, -INF]
    assert scores[2] == [0.0, 0.0, 0.0, -INF]


def test_too_few_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="keys: must reach position 3, got 3 keys"):
        select(torch.ones(3, 1), torch.ones(2, 1, 1), 2, spec_of())


def test_the_tolerance_follows_query_and_visible_keys() -> None:
    keys = torch.tensor([[3.0, 4.0], [NAN, 1.0], [0.0, 1.0], [INF, 0.0], [6.0, 8.0]])
    queries = torch.tensor([[[2.0, 0.0]], [[INF, 0.0]], [[0.0, -4.0]]])

    reference = select(keys, queries, 2, spec_of(head_dim=2))

    assert reference.tolerance[:, 0].tolist() == [2.0**-16 * 2 * 5, 0.0, 2.0**-16 * 4 * 10]


def near_tie() -> Reference:
    """Blocks 0 and 1 score 1 and 1 - 2^-17, which bf16 keys of two elements can say; block 2 scores 0, 3 is forced."""
    keys = torch.tensor([[1.0, 0.0], [1.0, -(2.0**-17)], [0.0, 0.0], [0.0, 0.0]])
    return select(keys, torch.ones(1, 1, 2), 3, spec_of(head_dim=2, block_size=1, topk=2))


def rows(*block_ids: int) -> torch.Tensor:
    return torch.tensor(block_ids, dtype=torch.int32).view(1, 1, -1)


def test_equal_sets_have_no_flips() -> None:
    assert near_tie().block_ids.tolist() == [[[0, 3]]]
    assert count_flips(rows(3, 0), rows(0, 3), near_tie()) == 0


def test_an_exchange_within_the_tolerance_is_one_flip_either_way() -> None:
    assert count_flips(rows(1, 3), near_tie().block_ids, near_tie()) == 1
    assert count_flips(near_tie().block_ids, rows(1, 3), near_tie()) == 1


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (rows(2, 3), "block 2 scores 0.0, block 0 1.0"),
        (rows(0, 1), "block 3 is one that every selection must hold"),
        (rows(0, 4), "block 4 is not one that the query sees"),
        (rows(0, -2), "block -2 is not one that the query sees"),
        (rows(3, 3), "block is named twice"),
        (rows(3, -1), "not one that the query sees"),
        (rows(-1, -1), "not equally many"),
        (rows(0, 1, 3), "shapes must be equal"),
    ],
)
def test_any_other_difference_is_a_mismatch(ours: torch.Tensor, message: str) -> None:
    with pytest.raises(SelectionMismatchError, match=message):
        count_flips(ours, near_tie().block_ids, near_tie())


def test_a_block_that_the_query_does_not_see_is_a_mismatch() -> None:
    keys = torch.ones(4, 1)
    reference = select(keys, torch.ones(4, 1, 1), 0, spec_of(block_size=1, topk=2))

    wrong = reference.block_ids.clone()
    wrong[1, 0] = torch.tensor([1, 2])

    with pytest.raises(SelectionMismatchError, match=r"query 1, head 0.*block 2 is not one that the query sees"):
        count_flips(wrong, reference.block_ids, reference)


def test_equal_infinities_may_be_exchanged() -> None:
    reference = select_last([INF, INF, INF, INF, 0, 0])

    assert count_flips(rows(1, 2), reference.block_ids, reference) == 1
