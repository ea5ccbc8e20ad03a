"""What finalizers do while the collector runs them in the middle of a call."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from blockdex.client.core import Core
from blockdex.client.endpoint import Endpoint
from blockdex.client.frames import plain
from blockdex.client.kinds import GET_INFO
from blockdex.client.ledger import Ledger
from blockdex.client.requests import TokenRequest
from blockdex.v1 import indexer_pb2 as pb
from support.clients import CODECS, append_of, selection_of, some_info, starts_of

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


@pytest.fixture(params=CODECS)
def ledger(request: pytest.FixtureRequest) -> Ledger:
    ledger = Ledger(some_info(num_layers=3), request.param)
    for sequence in (1, 2, 3, 4, 7):
        ledger.open(sequence, [10] * 3)
    return ledger


def in_time(calls: Callable[[], object]) -> None:
    """Has them done by a thread that may be left behind."""
    caller = threading.Thread(target=calls, daemon=True)
    caller.start()
    caller.join(timeout=30)
    assert not caller.is_alive(), "the caller waits for itself"


def append(ledger: Ledger, sequence: int, start: int | None = 5) -> TokenRequest:
    """Counts an append of one token."""
    append = append_of(ledger, 0, [1, sequence, 2], [1] * 3, None if start is None else [start] * 3)
    ledger.begin_append(append)
    return append


def last_positions(ledger: Ledger, sequences: list[int]) -> list[int]:
    selection = selection_of(ledger, 0, sequences, [0] * len(sequences))
    ledger.place_selection(selection)
    return starts_of(selection)


CALLS: dict[str, Callable[[Ledger], object]] = {
    "open": lambda ledger: ledger.open(8, [0] * 3),
    "append": lambda ledger: ledger.end_append(append(ledger, 7)),
    "refused append": lambda ledger: ledger.fail_append(append(ledger, 7), changed_nothing=True),
    "selection": lambda ledger: last_positions(ledger, [1, 2]),
    "question": lambda ledger: ledger.end_question(ledger.begin_question(7), [5] * 3),
    "cut": lambda ledger: ledger.end_truncation(ledger.begin_truncation(7), [5] * 3),
    "failed cut": lambda ledger: ledger.fail_truncation(ledger.begin_truncation(7), changed_nothing=False),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_sequence_that_is_closed_in_the_middle_of_a_call(ledger: Ledger, moments: Iterator[int], name: str) -> None:
    closed: list[int] = []

    def close() -> None:
        for sequence in (3, 7):
            ledger.close(sequence)
            closed.append(sequence)

    def calls() -> None:
        for _ in moments:
            Left(close)
            CALLS[name](ledger)
            gc.collect()
            ledger.open(3, [10] * 3)
            ledger.open(7, [10] * 3)

    in_time(calls)
    assert closed == [3, 7] * (LATEST - 1)
    assert last_positions(ledger, [4, 3, 7]) == [10] * 3


def test_a_question_what_the_server_is_in_the_middle_of_another_one(moments: Iterator[int]) -> None:
    info = some_info(num_layers=3)
    fields = dataclasses.asdict(info.spec) | {"key_dtype": pb.DTYPE_BF16, "scoring": pb.SCORING_BLOCK_MAX}
    del fields["score"]
    answer = pb.GetInfoResponse(spec=fields, limits=dataclasses.asdict(info.limits), epoch=17)
    epochs: list[int] = []

    def ask(core: Core) -> None:
        epochs.append(core.get_info(core.deadline(None)).finish(plain(GET_INFO, answer)).info.epoch)

    def calls() -> None:
        for _ in moments:
            core = Core(Endpoint("127.0.0.1:1"), None, 5.0)
            Left(partial(ask, core))
            ask(core)
            gc.collect()

    in_time(calls)
    assert epochs == [17] * 2 * (LATEST - 1)
