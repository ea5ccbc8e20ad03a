"""What a request insists on: a server that does not know it must refuse rather than answer something else."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdex import _native
from blockdex.client import plain_codec
from blockdex.client.core import Core
from blockdex.client.endpoint import Endpoint
from blockdex.client.kinds import SELECT_BLOCKS, TOKEN_KINDS
from blockdex.client.ledger import Ledger
from blockdex.client.requests import NO_POOL
from blockdex.v1 import indexer_pb2 as pb
from support.clients import CODECS, append_of, some_info

ALL = np.zeros((2, 4, 128), np.float32)
TWO = np.zeros((2, 2, 128), np.float32)


@pytest.fixture(params=CODECS)
def ledger(request: pytest.FixtureRequest) -> Ledger:
    return Ledger(some_info(), request.param)


def request_for(
    ledger: Ledger,
    queries: Any = ALL,
    first_head: int = 0,
    num_heads: int = 0,
    order: str = "ascending",
    return_scores: Any = False,
    wait_for_keys: bool = False,
    revisions: Any = None,
) -> pb.SelectBlocksRequest:
    selection = (queries, first_head, num_heads, order, return_scores, wait_for_keys)
    made = ledger.make(SELECT_BLOCKS.number, 0, 7, None, 0, revisions, None, None, *selection, False, *NO_POOL)
    return pb.SelectBlocksRequest.FromString(made.message())


@pytest.mark.parametrize(
    ("arguments", "feature"),
    [
        ({"queries": TWO, "first_head": 1, "num_heads": 2}, pb.FEATURE_HEAD_RANGES),
        ({"num_heads": 4}, pb.FEATURE_HEAD_RANGES),
        ({"order": "score"}, pb.FEATURE_SCORES),
        ({"return_scores": True}, pb.FEATURE_SCORES),
        ({"order": "score", "return_scores": "raw"}, pb.FEATURE_RAW_SCORES),
        ({"wait_for_keys": True}, pb.FEATURE_WAIT_FOR_KEYS),
    ],
)
def test_what_changes_the_answer_is_required(ledger: Ledger, arguments: dict[str, Any], feature: int) -> None:
    request = request_for(ledger, **arguments)
    assert list(request.header.required_features) == [feature]
    assert (request.first_head, request.num_heads) == (arguments.get("first_head", 0), arguments.get("num_heads", 0))
    assert request.wait_for_keys == arguments.get("wait_for_keys", False)


def test_revisions_are_required_and_nothing_else_is(ledger: Ledger) -> None:
    assert list(request_for(ledger).header.required_features) == []
    assert list(request_for(ledger, revisions=[5]).header.required_features) == [pb.FEATURE_REVISIONS]


@pytest.mark.parametrize("rollback", [False, True])
def test_a_rollback_is_required(ledger: Ledger, rollback: bool) -> None:
    made = append_of(ledger, 0, 7, 2, 0, rollback=rollback)
    request = pb.AppendKeysRequest.FromString(made.message())
    assert request.rollback == rollback
    assert list(request.header.required_features) == [pb.FEATURE_ROLLBACK] * rollback


def columns(count: int) -> st.SearchStrategy[tuple[list[int], list[int], list[int], list[int] | None]]:
    words, halves = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)
    of = functools.partial(st.lists, min_size=count, max_size=count)
    return st.tuples(of(words), of(halves), of(st.integers(0, 3)), st.none() | of(words))


@given(
    st.integers(0, 5).flatmap(columns),
    st.integers(0, 2**32 - 1),
    st.none() | st.integers(0, 2**64 - 1),
    st.sampled_from(("ascending", "score")),
    st.sampled_from((False, True, "raw")),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**64 - 1),
    st.sampled_from(("blocks", "pages")),
)
def test_both_codecs_write_the_same_request(
    spans: Any,
    layer: int,
    epoch: int | None,
    order: str,
    scores: Any,
    wait: bool,
    rollback: bool,
    pool: int,
    block_ids: str,
) -> None:
    ids, starts, lengths, revisions = spans
    keys, queries = np.ones((sum(lengths), 128), np.float16), np.ones((sum(lengths), 4, 128), np.float32)
    spans = (layer, ids, lengths, starts, revisions, epoch, keys, queries)
    named = (*spans, 0, 0, order, scores, wait, rollback, pool, block_ids)
    for kind in TOKEN_KINDS:
        made = [Ledger(some_info(), codec).make(kind.number, *named) for codec in (_native, plain_codec)]
        alone = [kind.request.FromString(request.message()) for request in made]
        framed = [pb.StreamRequest.FromString(request.frame(9, 300)) for request in made]
        for message in (*alone, *(getattr(frame, kind.field) for frame in framed)):
            message.header.required_features.sort()
        assert alone[0] == alone[1] == getattr(framed[1], kind.field)
        assert framed[0] == framed[1]
        assert {(request.shape, request.epoch, request.repeatable) for request in made} == {
            (made[0].shape, 17 if epoch is None else epoch, made[0].repeatable)
        }


def test_the_known_epoch_goes_along_unless_the_caller_names_one() -> None:
    core = Core(Endpoint("127.0.0.1:1"), None, 5.0)
    ledger = Ledger(some_info(), core.codec)
    requests = [core.get_sequence(ledger, 1e9, 7, epoch).request.message() for epoch in (None, 0, 3)]
    assert [pb.GetSequenceRequest.FromString(request).header.epoch for request in requests] == [17, 0, 3]
