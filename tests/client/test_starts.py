"""What the clients count by themselves: where appends go, which positions selections ask for, what they do not know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import blockdex
from blockdex import FailedPreconditionError, NotFoundError, OutOfRangeError, Reason
from support.clients import new_sequence

RANDOM = np.random.default_rng(3)


def keys(tokens: int) -> NDArray[np.float32]:
    return RANDOM.standard_normal((tokens, 128), dtype=np.float32)


def queries(tokens: int) -> NDArray[np.float32]:
    return RANDOM.standard_normal((tokens, 4, 128), dtype=np.float32)


def lengths(client: blockdex.Client, sequence: int) -> tuple[int, ...]:
    return client.get_sequence(sequence).lengths


def test_appends_follow_each_other_in_every_layer(client: blockdex.Client, sequence: int) -> None:
    client.append_keys(0, sequences=sequence, keys=keys(130))
    client.append_keys(0, sequences=sequence, keys=keys(2))
    client.append_keys(2, sequences=sequence, keys=keys(5))
    assert lengths(client, sequence) == (132, 0, 5)


def test_a_selection_asks_for_the_last_positions(client: blockdex.Client, sequence: int) -> None:
    client.append_keys(0, sequences=sequence, keys=keys(300))
    asked = queries(3)
    implicit = client.select_blocks(0, sequences=sequence, queries=asked)
    explicit = client.select_blocks(0, sequences=sequence, queries=asked, starts=297)
    np.testing.assert_array_equal(implicit, explicit)
    assert (implicit[:, :, 2] == 2).all(), "the third and last block is local to these positions"


def test_an_append_with_a_start_rolls_back_and_the_next_one_follows_it(client: blockdex.Client, sequence: int) -> None:
    client.append_keys(1, sequences=sequence, keys=keys(10))
    client.append_keys(1, sequences=sequence, keys=keys(2), starts=6, rollback=True)
    client.append_keys(1, sequences=sequence, keys=keys(1))
    assert lengths(client, sequence)[1] == 9
    with pytest.raises(OutOfRangeError, match="append starts at 3, length is 9; to roll back takes") as refused:
        client.append_keys(1, sequences=sequence, keys=keys(2), starts=3)
    assert refused.value.reason == Reason.APPEND_OVERLAPS
    numbers = {"sequence_id": str(sequence), "layer": "1", "start": "3", "length": "2", "layer_length": "9"}
    assert refused.value.metadata == numbers
    client.append_keys(1, sequences=sequence, keys=keys(1))
    assert lengths(client, sequence)[1] == 10


def test_several_sequences_are_counted_one_by_one(client: blockdex.Client, sequence: int) -> None:
    second = new_sequence()
    client.open_sequence(second)
    client.append_keys(0, sequences=[sequence, second], lengths=[4, 7], keys=keys(11))
    client.append_and_select(
        0, sequences=np.array([second, sequence]), lengths=np.array([1, 2]), keys=keys(3), queries=queries(3)
    )
    assert lengths(client, sequence)[0] == 6
    assert lengths(client, second)[0] == 8
    client.close_sequence(second)


def test_a_fork_is_counted_from_its_beginning(client: blockdex.Client, sequence: int) -> None:
    client.append_keys(0, sequences=sequence, keys=keys(200))
    client.append_keys(1, sequences=sequence, keys=keys(50))
    child = new_sequence()
    assert client.fork_sequence(sequence, child, 128) == (128, 50, 0)
    client.append_keys(0, sequences=child, keys=keys(1))
    client.append_keys(1, sequences=child, keys=keys(1))
    client.append_keys(0, sequences=sequence, keys=keys(1))
    assert lengths(client, child) == (129, 51, 0)
    assert lengths(client, sequence) == (201, 50, 0)
    client.close_sequence(child)


def test_a_truncation_is_counted(client: blockdex.Client, sequence: int) -> None:
    client.append_keys(0, sequences=sequence, keys=keys(200))
    client.append_keys(1, sequences=sequence, keys=keys(50))
    assert client.truncate_sequence(sequence, 100) == (100, 50, 0)
    client.append_keys(0, sequences=sequence, keys=keys(1))
    assert lengths(client, sequence) == (101, 50, 0)


def test_a_refused_append_is_not_counted(client: blockdex.Client, sequence: int) -> None:
    client.append_keys(0, sequences=sequence, keys=keys(5))
    with pytest.raises(OutOfRangeError) as refused:
        client.append_keys(0, sequences=sequence, keys=keys(5), starts=6)
    assert refused.value.reason == Reason.APPEND_BEYOND_LENGTH
    assert refused.value.message == f"sequence {sequence}, layer 0: append starts at 6, length is 5"
    with pytest.raises(blockdex.InvalidArgumentError):
        client.append_keys(0, sequences=sequence, keys=keys(5), lengths=6)
    client.append_keys(0, sequences=sequence, keys=keys(1))
    assert lengths(client, sequence)[0] == 6


def test_a_request_that_is_refused_for_one_sequence_is_counted_for_none(client: blockdex.Client, sequence: int) -> None:
    missing = new_sequence()
    with pytest.raises(NotFoundError) as refused:
        client.append_keys(0, sequences=[sequence, missing], lengths=[3, 3], keys=keys(6), starts=[0, 0])
    assert refused.value.reason == Reason.UNKNOWN_SEQUENCE
    client.append_keys(0, sequences=sequence, keys=keys(1))
    assert lengths(client, sequence)[0] == 1


def test_a_sequence_of_another_client_is_unknown_until_it_is_asked_about(
    client: blockdex.Client, other: blockdex.Client, sequence: int
) -> None:
    client.append_keys(1, sequences=sequence, keys=keys(6))
    calls: list[Any] = [
        lambda: other.append_keys(1, sequences=sequence, keys=keys(1)),
        lambda: other.select_blocks(1, sequences=sequence, queries=queries(1)),
        lambda: other.append_and_select(1, sequences=sequence, keys=keys(1), queries=queries(1)),
    ]
    for call in calls:
        with pytest.raises(FailedPreconditionError) as refused:
            call()
        assert refused.value.reason == Reason.OUTCOME_UNKNOWN
        assert refused.value.message.startswith(f"sequence {sequence}, layer 1: ")
    assert other.get_sequence(sequence).lengths == (0, 6, 0)
    for call in calls:
        call()
    assert lengths(client, sequence) == (0, 8, 0)


def test_an_append_that_names_its_start_settles_its_layer_alone(
    client: blockdex.Client, other: blockdex.Client, sequence: int
) -> None:
    client.append_keys(1, sequences=sequence, keys=keys(6))
    other.append_keys(1, sequences=sequence, keys=keys(1), starts=6)
    other.append_keys(1, sequences=sequence, keys=keys(1))
    assert lengths(client, sequence) == (0, 8, 0)
    with pytest.raises(FailedPreconditionError):
        other.append_keys(0, sequences=sequence, keys=keys(1))


def test_a_closed_sequence_is_unknown(client: blockdex.Client, sequence: int) -> None:
    client.close_sequence(sequence)
    with pytest.raises(FailedPreconditionError) as refused:
        client.append_keys(0, sequences=sequence, keys=keys(1))
    assert refused.value.reason == Reason.OUTCOME_UNKNOWN
    client.close_sequence(sequence)


def test_ids_take_64_bits(client: blockdex.Client) -> None:
    sequence = 2**64 - 1 - new_sequence()
    client.open_sequence(sequence)
    client.append_keys(0, sequences=np.array([sequence], np.uint64), keys=keys(3))
    assert lengths(client, sequence)[0] == 3
    client.close_sequence(sequence)
