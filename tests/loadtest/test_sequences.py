"""What the load test knows of its sequences, and the keys that follow from it."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdex.loadtest.steps import KeptSequence
from blockdex.loadtest.tensors import Run, TensorPool

LAYER = 2
POOL = TensorPool(heads=2, head_dim=8, longest=10, seed=3)


def keys_of(sequence: KeptSequence) -> np.ndarray:
    return POOL.keys(LAYER, sequence.runs)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_sequence_knows_its_keys_like_a_list_of_them(data: st.DataObject) -> None:
    """Appends, rollbacks, truncations and forks, beside plain lists of the rows that were sent."""
    streams = itertools.count(1)
    sequences = [(KeptSequence(1, streams), np.empty((0, 8), ml_dtypes.bfloat16))]
    for number in range(data.draw(st.integers(1, 12))):
        place = data.draw(st.integers(0, len(sequences) - 1))
        sequence, rows = sequences[place]
        action = data.draw(st.sampled_from(["append", "roll back", "truncate", "fork"]))
        cut = data.draw(st.integers(0, sequence.length))
        if action in {"append", "roll back"}:
            start = sequence.length if action == "append" else cut
            span = sequence.write(start, data.draw(st.integers(1, 5)))
            sent = POOL.keys(LAYER, [span.run])
            assert action == "append" or not np.array_equal(sent[:1], rows[start : start + 1]), "a rollback shows"
            sequences[place] = (sequence, np.concatenate([rows[:start], sent]))
        elif action == "truncate":
            sequence.truncate(cut)
            sequences[place] = (sequence, rows[:cut])
        else:
            sequences.append((sequence.fork(100 + number, cut), rows[:cut]))
        for known, expected in sequences:
            assert known.length == len(expected)
            assert not known.length or np.array_equal(keys_of(known), expected)


def test_a_fork_and_its_parent_write_different_keys() -> None:
    streams = itertools.count(1)
    parent = KeptSequence(1, streams)
    parent.write(0, 5)
    child = parent.fork(2, 5)
    ours, theirs = (POOL.keys(LAYER, [sequence.write(5, 1).run]) for sequence in (parent, child))
    assert not np.array_equal(ours, theirs)


def test_the_last_positions_belong_to_the_last_append() -> None:
    sequence = KeptSequence(1, itertools.count(1))
    sequence.write(0, 5)
    assert sequence.last(2).run == Run(3, 2, sequence.runs[-1].stream)


def test_any_key_can_be_made_again_by_itself() -> None:
    run = Run(100, 50, 7)
    keys, queries = POOL.keys(LAYER, [run]), POOL.queries(LAYER, [run])
    assert (keys.shape, queries.shape) == ((50, 8), (50, 2, 8))
    assert keys.dtype == ml_dtypes.bfloat16
    again = TensorPool(heads=2, head_dim=8, longest=10, seed=3)
    assert np.array_equal(again.keys(LAYER, [Run(120, 1, 7)])[0], keys[20])
    assert np.array_equal(again.queries(LAYER, [Run(120, 1, 7)])[0], queries[20])


def test_seeds_layers_and_streams_have_keys_of_their_own() -> None:
    run = Run(0, 20, 7)
    other_seed = TensorPool(heads=2, head_dim=8, longest=10, seed=4)
    others = [
        POOL.keys(LAYER + 1, [run]),
        POOL.keys(LAYER, [Run(0, 20, 8)]),
        other_seed.keys(LAYER, [run]),
    ]
    assert not any(np.array_equal(POOL.keys(LAYER, [run]), other) for other in others)


def test_runs_stand_one_after_another() -> None:
    runs = [Run(3, 4, 1), Run(0, 2, 5), Run(9, 1, 2)]
    apart = np.concatenate([POOL.keys(LAYER, [run]) for run in runs])
    assert np.array_equal(POOL.keys(LAYER, runs), apart)
