"""What finalizers do while the collector runs them in the middle of a call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from blockdex.client.core import _begin_append
from blockdex.client.kinds import APPEND_KEYS, SELECT_BLOCKS
from blockdex.client.ledger import Append, Ledger
from blockdex.client.requests import Queries, Spans
from blockdex.v1 import indexer_pb2 as pb
from clients import some_info

pytestmark = pytest.mark.usefixtures("way")

KEYS = np.ones((1, 128), np.float32)
QUERIES = Queries(np.ones((4, 4, 128), np.float32), 0, 0, "ascending", False)
FOUR = Spans(layer=0, sequences=[1, 2, 3, 4], lengths=[1] * 4, starts=None, revisions=[], epoch=None)
LATEST = 80
"""More objects than a call makes that the collector knows."""


class Left:
    """Garbage that only the collector finds, and what is done when it does."""

    def __init__(self, finish: Callable[[], object]) -> None:
        self.finish = finish
        self.me = self

    def __del__(self) -> None:
        self.finish()


@pytest.fixture
def moments() -> Iterator[Iterator[int]]:
    """The collector runs after so many new objects: at a later place of the call each time."""
    before = gc.get_threshold()

    def each() -> Iterator[int]:
        for moment in range(1, LATEST):
            gc.collect()
            gc.set_threshold(moment)
            yield moment
            gc.set_threshold(*before)

    yield each()
    gc.set_threshold(*before)


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger(some_info(num_layers=3))
    for sequence in (1, 2, 3, 4, 7):
        ledger.open(sequence, [10] * 3)
    return ledger


def append(ledger: Ledger, sequence: int) -> tuple[bytes, Append]:
    """As `Core.append_keys`."""
    named: Any = (0, [sequence], [1], [5], None, None)
    request, _, begun = ledger.write_append(APPEND_KEYS, named, KEYS, None) or _begin_append(
        APPEND_KEYS, ledger, named, KEYS, None
    )
    return request, begun


def test_a_request_that_is_written_in_the_middle_of_an_append(ledger: Ledger, moments: Iterator[int]) -> None:
    expected, begun = append(ledger, 7)
    ledger.end_append(begun)
    selection = ledger.writer.write(SELECT_BLOCKS, FOUR, [5] * 4, None, QUERIES)
    found: list[Any] = []
    for moment in moments:
        Left(lambda: found.append(ledger.writer.write(SELECT_BLOCKS, FOUR, [5] * 4, None, QUERIES)))
        request, begun = append(ledger, 7)
        assert request == expected, moment
        assert ledger.last_positions(0, [7], [0]) == [6], moment
        ledger.end_append(begun)
    gc.collect()
    assert found == [selection] * (LATEST - 1)
    assert pb.AppendKeysRequest.FromString(expected).spans.starts == [5]
