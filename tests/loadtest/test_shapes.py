"""Scenarios made to fit a server."""

from __future__ import annotations

import dataclasses

import pytest

from blockdex.loadtest.settings import SCENARIOS
from blockdex.loadtest.shapes import DecodeShape, Plan, PrefillShape, ShapeError
from blockdex.loadtest.workloads import DECODE_CASES, PREFILL_CASES
from blockdex_kernels import IndexSpec
from support.load_plans import SPEC, info, plan


def pages(made: Plan) -> int:
    size = made.bounds.block_size
    return sum(-(-tokens // size) for shape in made.shapes for tokens in shape.held)


def test_the_published_weights_are_complete() -> None:
    assert sum(case.weight for case in DECODE_CASES) == 10_000
    assert sum(case.weight for case in PREFILL_CASES) == 10_434
    assert len(DECODE_CASES) == 28


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_where_there_is_step_buffer_shapes_are_the_published_ones(scenario: str) -> None:
    made = plan(scenario, info(2_000_000))
    assert made.scale == 1.0
    for shape in made.shapes:
        if isinstance(shape, DecodeShape):
            assert len(shape.lengths) == min(shape.case.batch, 64)
            assert sum(shape.lengths) == len(shape.lengths) * shape.case.tokens
        if isinstance(shape, PrefillShape):
            assert shape.cases == PREFILL_CASES


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("free", [100, 170, 1000, 20_000])
def test_where_there_is_less_room_they_fill_it_and_no_more(scenario: str, free: int) -> None:
    made = plan(scenario, info(free + 50, used=50))
    assert pages(made) <= 0.9 * free
    assert made.free_tokens == free * 128
    assert made.scale == 1.0 or pages(made) > 0.6 * 0.9 * free


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_server_with_its_defaults_has_to_select(scenario: str) -> None:
    """Two GiB, 57 layers and eight clients; batches get smaller before sequences get so short that all is taken."""
    spec = IndexSpec()
    made = plan(scenario, info(2**31 // spec.bytes_per_page, spec=spec), clients=8, layers=None)
    assert made.bounds.layers == 4
    for shape in made.shapes:
        # Some of the published cases are as short as 1,000 tokens.
        as_published = shape.case.tokens if isinstance(shape, DecodeShape) else 4096
        assert shape.longest > min(as_published, 1.5 * spec.topk * spec.block_size)


def test_scale_is_a_bound() -> None:
    made = plan("decode-fleet", info(2_000_000), scale=0.25, clients=1)
    (shape,) = made.shapes
    assert isinstance(shape, DecodeShape)
    assert sum(shape.lengths) / len(shape.lengths) == shape.case.tokens / 4


def test_decode_lengths_stand_in_pairs_around_their_mean() -> None:
    for shape in plan("decode-fleet", info(2_000_000), clients=8).shapes:
        assert isinstance(shape, DecodeShape)
        for low, high in zip(shape.lengths[::2], shape.lengths[1::2], strict=True):
            assert low + high == 2 * shape.case.tokens
            assert shape.case.tokens // 20 <= shape.case.tokens - low <= shape.case.tokens // 4


def test_many_clients_stand_for_the_weights() -> None:
    shapes = plan("decode-fleet", info(2_000_000_000), clients=1000).shapes
    for case in DECODE_CASES:
        count = sum(isinstance(shape, DecodeShape) and shape.case == case for shape in shapes)
        assert count == pytest.approx(case.weight / 10, abs=1)


def test_a_quarter_of_mixed_clients_prefill() -> None:
    kinds = [type(shape) for shape in plan("mixed", info(100_000), clients=8).shapes]
    assert kinds == [DecodeShape] * 6 + [PrefillShape] * 2


def test_no_sequence_is_longer_than_the_server_takes() -> None:
    short = dataclasses.replace(SPEC, max_sequence_tokens=5000)
    for scenario in SCENARIOS:
        assert plan(scenario, info(2_000_000, spec=short)).longest <= 5000


def test_messages_are_no_larger_than_the_server_takes() -> None:
    bounds = plan("prefill-storm", info(100_000, max_message_bytes=100 * 1280)).bounds
    assert (bounds.chunk, bounds.fill, bounds.max_spans) == (100, 100, 64)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_too_little_room_is_refused_with_both_numbers(scenario: str) -> None:
    with pytest.raises(
        ShapeError, match=rf"4 clients of {scenario} need at least \d+ pages .* has 2 to spare \(3 free"
    ):
        plan(scenario, info(40, used=37))


def test_no_more_layers_than_the_server_has() -> None:
    assert plan("churn", info(1000), layers=None).bounds.layers == 2
    with pytest.raises(ShapeError, match="--layers must be at most the server's 2, got 3"):
        plan("churn", info(1000), layers=3)
