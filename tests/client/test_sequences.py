"""Sequences in batches, opened again, and what the server did for them."""

from __future__ import annotations

import numpy as np
import pytest

import blockdex
from blockdex.contract.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, Reason
from blockdex.contract.messages import Order
from support.clients import new_sequence

KEYS = np.ones((2, 128), np.float32)


def is_open(client: blockdex.Client, sequence: int) -> bool:
    try:
        client.get_sequence(sequence)
    except NotFoundError:
        return False
    return True


def test_all_are_opened_or_none(client: blockdex.Client, sequence: int) -> None:
    fresh = [new_sequence() for _ in range(3)]
    client.append_keys(0, sequences=sequence, keys=KEYS)
    with pytest.raises(AlreadyExistsError, match=f"sequence {sequence}: open already"):
        client.open_sequences([*fresh, sequence])
    assert not any(is_open(client, each) for each in fresh)
    client.open_sequences(fresh, lease_seconds=[7, 8, 9])
    client.append_keys(0, sequences=fresh, lengths=[1, 1, 1], keys=np.ones((3, 128), np.float32))
    client.close_sequences([*fresh, new_sequence()])
    assert not any(is_open(client, each) for each in fresh)
    client.close_sequences(fresh)


def test_one_that_is_still_empty_is_opened_again(client: blockdex.Client, sequence: int) -> None:
    client.open_sequence(sequence)
    client.append_keys(0, sequences=sequence, keys=KEYS, revisions=1)
    client.truncate_sequence(sequence, 0)
    with pytest.raises(AlreadyExistsError):  # the revision stays
        client.open_sequence(sequence)


def test_batches_that_cannot_be(client: blockdex.Client) -> None:
    for call in (client.open_sequences, client.close_sequences):
        for ids, reason in (([], Reason.INVALID_SPANS), ([1, 2, 1], Reason.DUPLICATE_SEQUENCE)):
            with pytest.raises(InvalidArgumentError) as refused:
                call(ids)
            assert refused.value.reason == reason
    with pytest.raises(InvalidArgumentError, match="lease_seconds: must be 1 or as many as the 3 sequences, got 2"):
        client.open_sequences([1, 2, 3], lease_seconds=[1, 2])


def test_what_the_server_did(client: blockdex.Client, sequence: int) -> None:
    before = client.stats()
    client.append_keys(0, sequences=sequence, keys=KEYS)
    after = client.stats()
    assert after.requests > before.requests
    assert after.uptime_seconds > before.uptime_seconds
    assert set(after.phases) == {"append", "decode", "prefill", "sequence"}


@pytest.mark.parametrize("num_queries", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("order", ["ascending", "score"])
def test_raw_scores_are_those_that_blocks_rank_by(
    client: blockdex.Client, sequence: int, order: Order, num_queries: int
) -> None:
    """Unscaled, and for forced blocks, too: so that the candidates of several servers can be merged."""
    random = np.random.default_rng(3)
    # Whole numbers, so that a sum is the same in whatever order its products are added.
    keys = random.integers(-4, 5, (5000, 128)).astype(np.float32)
    queries = random.integers(-4, 5, (num_queries, 4, 128)).astype(np.float32)
    client.append_keys(0, sequences=sequence, keys=keys)
    ids, scores = client.select_blocks(0, sequences=sequence, queries=queries, order=order, return_scores="raw")
    for token in range(num_queries):
        visible = len(keys) - num_queries + token + 1
        products = queries[token] @ keys[:visible].T
        best = np.stack([products[:, at : at + 128].max(axis=1) for at in range(0, visible, 128)], axis=1)
        np.testing.assert_array_equal(scores[token], np.take_along_axis(best, ids[token], axis=1))
