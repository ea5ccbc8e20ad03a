"""Data calls in C: no reference is lost or kept, however a call ends, and what is run in between harms nothing."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import blockdex
from blockdex import _native
from blockdex.client.frames import response_of
from blockdex.client.kinds import APPEND_AND_SELECT
from blockdex.client.ledger import Ledger
from blockdex.client.lengths import Layers, Sequences
from blockdex.client.requests import NO_POOL, WIRE_DTYPES, copied
from blockdex.v1 import indexer_pb2 as pb
from support.clients import some_info

KEYS, QUERIES = np.ones((2, 128), np.float32), np.ones((2, 4, 128), np.float32)
IDS, LENGTHS = [10**12, 10**12 + 1], [1, 1]


def ledger() -> Ledger:
    made = Ledger(some_info(num_layers=2), _native)
    for sequence in IDS:
        made.open(sequence, [10, 10])
    return made


def request(ledger: Ledger, **change: Any) -> Any:
    named = {
        "layer": 0,
        "sequences": IDS,
        "lengths": LENGTHS,
        "starts": None,
        "revisions": None,
        "epoch": None,
        "keys": KEYS,
        "queries": QUERIES,
        "first_head": 0,
        "num_heads": 0,
        "order": "ascending",
        "return_scores": False,
        "wait_for_keys": False,
        "rollback": False,
        "pool_id": 0,
        "ids": "blocks",
    }
    return ledger.make(APPEND_AND_SELECT.number, *(named | change).values())


def refused(ledger: Ledger, **change: Any) -> None:
    with pytest.raises((blockdex.BlockdexError, TypeError)):
        request(ledger, **change)


def in_flight(ledger: Ledger, end: Callable[[Any], object]) -> None:
    append = request(ledger)
    ledger.begin_append(append)
    end(append)


def unknown(ledger: Ledger) -> None:
    append = request(ledger, sequences=[IDS[0], 5])
    with pytest.raises(blockdex.FailedPreconditionError):
        ledger.begin_append(append)


USES: dict[str, Callable[[Ledger], object]] = {
    "made": request,
    "a message": lambda ledger: request(ledger).message(),
    "a frame": lambda ledger: request(ledger).frame(1, 2),
    "ended": lambda ledger: in_flight(ledger, lambda append: append.end()),
    "failed": lambda ledger: in_flight(ledger, lambda append: append.fail(True)),
    "left in flight": lambda ledger: in_flight(ledger, lambda append: None),
    "of unknown length": unknown,
    "no integers": lambda ledger: refused(ledger, lengths=[1, 1.5]),
    "an integer too large": lambda ledger: refused(ledger, lengths=[1, 2**32]),
    "another shape": lambda ledger: refused(ledger, queries=QUERIES[:, :2]),
    "another dtype": lambda ledger: refused(ledger, keys=KEYS.astype(np.float64)),
    "no order": lambda ledger: refused(ledger, order="falling"),
    "no ids": lambda ledger: refused(ledger, ids="cells"),
    "rows of a pool": lambda ledger: request(ledger, pool_id=3, ids="pages"),
    "too large": lambda ledger: refused(ledger, keys=np.ones((2**12, 128), np.float16)),
    "an array to copy": lambda ledger: request(ledger, keys=np.asfortranarray(KEYS)),
    "numpy's integers": lambda ledger: request(ledger, sequences=np.array(IDS), lengths=np.array(LENGTHS)),
}


@pytest.mark.parametrize("name", USES)
def test_no_reference_is_lost_or_kept(name: str) -> None:
    known = ledger()
    layers = [known._sequences[sequence] for sequence in IDS]
    held = [KEYS, QUERIES, IDS, IDS[0], IDS[1], LENGTHS, *layers, known._sequences, _native.TokenRequest]
    USES[name](known)
    gc.collect()  # What earlier tests have left would go in between.
    before = [sys.getrefcount(each) for each in held]
    for _ in range(50):
        USES[name](known)
    gc.collect()
    assert [sys.getrefcount(each) for each in held] == before


def test_what_is_refused_with_is_not_kept() -> None:
    seen: list[Any] = []

    def refuse(*refusal: Any) -> None:
        seen.extend(refusal[2:])
        raise LookupError

    bounds = {"num_heads": 4, "head_dim": 128, "topk": 16, "max_message_bytes": 8, "epoch": 1}
    maker = _native.RequestMaker(**bounds, array=np.ndarray, dtypes=WIRE_DTYPES, array_of=copied, refuse=refuse)
    arguments = (0, IDS, LENGTHS, 0, None, None, KEYS, QUERIES, 0, 0, "ascending", False, False, False, *NO_POOL)
    with pytest.raises(LookupError):
        maker.make(APPEND_AND_SELECT.number, *arguments)
    assert seen == [
        "keys and queries together must be at most 8 bytes, got 5120",
        {"bytes": 5120, "max_message_bytes": 8},
    ]
    # One of the list, one of the call.
    assert [sys.getrefcount(seen[at]) for at in range(2)] == [2, 2]


def test_a_list_that_shrinks_while_it_is_read() -> None:
    class Shrinks:
        def __init__(self, column: list[Any]) -> None:
            self.column = column

        def __index__(self) -> int:
            self.column.clear()
            return 7

    column: list[Any] = []
    column += [Shrinks(column), 8, 9]
    made = request(ledger(), sequences=column, lengths=[2])
    assert list(pb.AppendAndSelectRequest.FromString(made.message()).spans.sequence_ids) == [7]


def test_a_request_begins_once() -> None:
    known = ledger()
    append = request(known)
    known.begin_append(append)
    with pytest.raises(RuntimeError, match="it has begun already"):
        known.begin_append(append)
    known.end_append(append)
    assert [known._sequences[sequence] for sequence in IDS] == [Layers("q", [11, 1, 0, 1, 10, 0, 0, 0])] * 2


def test_a_layer_that_there_is_not_is_for_the_server_to_refuse() -> None:
    known = ledger()
    before = {sequence: Layers("q", layers or []) for sequence, layers in known._sequences.items()}
    append = request(known, layer=2)
    known.begin_append(append)
    known.fail_append(append, changed_nothing=True)
    assert known._sequences == before
    assert pb.AppendAndSelectRequest.FromString(append.message()).layer == 2


def test_what_is_no_dictionary_of_lengths_is_refused() -> None:
    append = request(ledger())
    for sequences in ({}, {IDS[0]: 1, IDS[1]: 2}, {IDS[0]: b"abc", IDS[1]: b"abc"}, None):
        with pytest.raises((KeyError, TypeError, BufferError, AttributeError)):
            append.begin(sequences)
    short: Any = {sequence: bytearray(7) for sequence in IDS}
    append.begin(short)
    append.end()
    assert short == {sequence: bytearray(7) for sequence in IDS}
    append.begin(Sequences(2) | {sequence: Layers.of([3]) for sequence in IDS})
    assert list(pb.AppendAndSelectRequest.FromString(append.message()).spans.starts) == [3, 3]


@pytest.mark.parametrize("cut", range(40))
def test_an_answer_that_is_cut_off_is_left_to_protobuf_which_refuses_it(cut: int) -> None:
    ids = pb.Tensor(dtype=pb.DTYPE_INT32, data=bytes(24))
    whole = pb.AppendAndSelectResponse(epoch=7, block_ids=ids).SerializeToString()
    assert response_of(APPEND_AND_SELECT, whole, _native) == (bytes(24), None)
    part = whole[: cut % len(whole)]
    if _native.read_selection(APPEND_AND_SELECT.number, False, part) is None:
        with pytest.raises(blockdex.InternalError):
            response_of(APPEND_AND_SELECT, part, _native)
