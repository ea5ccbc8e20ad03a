"""What a request insists on: a server that does not know it must refuse rather than answer something else."""

from __future__ import annotations

import numpy as np
import pytest

from blockdex.client.requests import Queries, fill, spans_of
from blockdex.v1 import indexer_pb2 as pb
from support.clients import some_info

ALL = np.zeros((2, 4, 128), np.float32)
TWO = np.zeros((2, 2, 128), np.float32)


def request_for(
    queries: Queries, revisions: list[int] | None = None, epoch: int | None = None
) -> pb.SelectBlocksRequest:
    request = pb.SelectBlocksRequest()
    spans = spans_of(0, 7, None, 0, revisions, epoch, name="queries", tensor=queries.tensor)
    fill(request, some_info(), spans, [0], None, queries)
    return request


@pytest.mark.parametrize(
    ("queries", "feature"),
    [
        (Queries(TWO, first_head=1, num_heads=2, order="ascending", return_scores=False), pb.FEATURE_HEAD_RANGES),
        (Queries(ALL, first_head=0, num_heads=4, order="ascending", return_scores=False), pb.FEATURE_HEAD_RANGES),
        (Queries(ALL, first_head=0, num_heads=0, order="score", return_scores=False), pb.FEATURE_SCORES),
        (Queries(ALL, first_head=0, num_heads=0, order="ascending", return_scores=True), pb.FEATURE_SCORES),
        (
            Queries(ALL, first_head=0, num_heads=0, order="ascending", return_scores=False, wait_for_keys=True),
            pb.FEATURE_WAIT_FOR_KEYS,
        ),
    ],
)
def test_what_changes_the_answer_is_required(queries: Queries, feature: int) -> None:
    request = request_for(queries)
    assert list(request.required_features) == [feature]
    assert (request.first_head, request.num_heads) == (queries.first_head, queries.num_heads)
    assert request.wait_for_keys == queries.wait_for_keys


def test_revisions_are_required_and_nothing_else_is() -> None:
    plain = Queries(ALL, first_head=0, num_heads=0, order="ascending", return_scores=False)
    assert list(request_for(plain).required_features) == []
    assert list(request_for(plain, revisions=[5]).required_features) == [pb.FEATURE_REVISIONS]


def test_the_known_epoch_goes_along_unless_the_caller_names_one() -> None:
    plain = Queries(ALL, first_head=0, num_heads=0, order="ascending", return_scores=False)
    assert [request_for(plain, epoch=epoch).epoch for epoch in (None, 0, 3)] == [17, 0, 3]
