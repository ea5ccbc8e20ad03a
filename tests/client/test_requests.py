"""What a request insists on: a server that does not know it must refuse rather than answer something else."""

from __future__ import annotations

import numpy as np
import pytest

from blockdex.client.core import Core
from blockdex.client.ledger import Ledger
from blockdex.client.requests import Keys, Queries, fill, spans_of
from blockdex.v1 import indexer_pb2 as pb
from support.clients import some_info

ALL = np.zeros((2, 4, 128), np.float32)
TWO = np.zeros((2, 2, 128), np.float32)


def request_for(queries: Queries, revisions: list[int] | None = None) -> pb.SelectBlocksRequest:
    request = pb.SelectBlocksRequest()
    spans = spans_of(0, 7, None, 0, revisions, None, name="queries", tensor=queries.tensor)
    fill(request, some_info(), spans, [0], None, queries)
    return request


@pytest.mark.parametrize(
    ("queries", "feature"),
    [
        (Queries(TWO, first_head=1, num_heads=2, order="ascending", return_scores=False), pb.FEATURE_HEAD_RANGES),
        (Queries(ALL, first_head=0, num_heads=4, order="ascending", return_scores=False), pb.FEATURE_HEAD_RANGES),
        (Queries(ALL, first_head=0, num_heads=0, order="score", return_scores=False), pb.FEATURE_SCORES),
        (Queries(ALL, first_head=0, num_heads=0, order="ascending", return_scores=True), pb.FEATURE_SCORES),
        (Queries(ALL, first_head=0, num_heads=0, order="score", return_scores="raw"), pb.FEATURE_RAW_SCORES),
        (
            Queries(ALL, first_head=0, num_heads=0, order="ascending", return_scores=False, wait_for_keys=True),
            pb.FEATURE_WAIT_FOR_KEYS,
        ),
    ],
)
def test_what_changes_the_answer_is_required(queries: Queries, feature: int) -> None:
    request = request_for(queries)
    assert list(request.header.required_features) == [feature]
    assert (request.first_head, request.num_heads) == (queries.first_head, queries.num_heads)
    assert request.wait_for_keys == queries.wait_for_keys


def test_revisions_are_required_and_nothing_else_is() -> None:
    plain = Queries(ALL, first_head=0, num_heads=0, order="ascending", return_scores=False)
    assert list(request_for(plain).header.required_features) == []
    assert list(request_for(plain, revisions=[5]).header.required_features) == [pb.FEATURE_REVISIONS]


def test_a_rollback_is_required() -> None:
    for rollback in (False, True):
        request = pb.AppendKeysRequest()
        spans = spans_of(0, 7, None, 0, None, None, name="keys", tensor=ALL[:, 0])
        fill(request, some_info(), spans, [0], Keys(ALL[:, 0], rollback), None)
        assert request.rollback == rollback
        assert list(request.header.required_features) == [pb.FEATURE_ROLLBACK] * rollback


def test_the_known_epoch_goes_along_unless_the_caller_names_one() -> None:
    core = Core("127.0.0.1:1", None, 5.0)
    ledger = Ledger(some_info())
    requests = [core.get_sequence(ledger, 1e9, 7, epoch).request for epoch in (None, 0, 3)]
    assert [pb.GetSequenceRequest.FromString(request).header.epoch for request in requests] == [17, 0, 3]
