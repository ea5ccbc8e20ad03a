"""Lengths where calls overlap in time: what is certain stays, what is not is unknown, never wrong."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdex import FailedPreconditionError, NotFoundError
from blockdex.client.ledger import Ledger
from blockdex.client.requests import TokenRequest
from support.clients import CODECS, append_of, selection_of, some_info, starts_of


@pytest.fixture(params=CODECS)
def ledger(request: pytest.FixtureRequest) -> Ledger:
    ledger = Ledger(some_info(num_layers=2), request.param)
    ledger.open(7, [10, 10])
    return ledger


def length(ledger: Ledger, layer: int = 0) -> int | None:
    selection = selection_of(ledger, layer, 7, rows=0)
    try:
        ledger.place_selection(selection)
    except FailedPreconditionError:
        return None
    return starts_of(selection)[0]


def begin(ledger: Ledger, rows: int, start: int | None = None) -> TokenRequest:
    """An append to layer 0 of sequence 7 is in flight."""
    append = append_of(ledger, 0, 7, rows, start)
    ledger.begin_append(append)
    return append


def test_of_an_evicted_sequence_nothing_is_known_until_it_is_opened_again(ledger: Ledger) -> None:
    ledger.evict([7, 8])
    for layer in (0, 1):
        with pytest.raises(NotFoundError, match=f"^sequence 7, layer {layer}: the server has evicted it"):
            ledger.begin_append(append_of(ledger, layer, 7, 1))
    with pytest.raises(FailedPreconditionError, match="sequence 8, layer 0: its length is not known"):
        ledger.place_selection(selection_of(ledger, 0, 8, rows=1))
    ledger.end_question(ledger.begin_question(7), [3, 3])
    assert length(ledger) == 3, "the server says what is so"
    ledger.evict([7])
    ledger.open(7, [0, 0])
    assert length(ledger) == 0
    ledger.evict([7])
    ledger.close(7)
    assert length(ledger) is None


def test_an_append_follows_one_that_is_still_in_flight(ledger: Ledger) -> None:
    first = begin(ledger, 5)
    second = begin(ledger, 3)
    assert (starts_of(first), starts_of(second)) == ([10], [15])
    ledger.end_append(second)
    ledger.end_append(first)
    assert length(ledger) == 18


def test_the_later_of_two_is_refused(ledger: Ledger) -> None:
    first = begin(ledger, 5)
    second = begin(ledger, 3)
    ledger.fail_append(second, changed_nothing=True)
    ledger.end_append(first)
    assert length(ledger) == 15


def test_the_earlier_of_two_is_refused(ledger: Ledger) -> None:
    first = begin(ledger, 5)
    second = begin(ledger, 3)
    ledger.fail_append(first, changed_nothing=True)
    ledger.fail_append(second, changed_nothing=True)
    assert length(ledger) is None
    assert length(ledger, layer=1) == 10


def test_an_unknown_outcome_stays_unknown_whatever_follows(ledger: Ledger) -> None:
    first = begin(ledger, 5)
    second = begin(ledger, 3)
    ledger.fail_append(first, changed_nothing=False)
    ledger.end_append(second)
    assert length(ledger) is None


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_appends_that_overlap_and_name_the_same_start_leave_the_length_unknown(
    ledger: Ledger, first_ends_first: bool
) -> None:
    appends = [begin(ledger, rows, 10) for rows in (20, 5)]
    for append in appends if first_ends_first else reversed(appends):
        ledger.end_append(append)
    assert (length(ledger), length(ledger, layer=1)) == (None, 10)
    ledger.end_append(begin(ledger, 1, 12))
    assert length(ledger) == 13


@pytest.mark.parametrize("refused_ends_first", [True, False])
def test_a_refusal_does_not_undo_what_another_append_did_meanwhile(ledger: Ledger, refused_ends_first: bool) -> None:
    refused = begin(ledger, 5, 10)
    good = begin(ledger, 5, 10)
    if refused_ends_first:
        ledger.fail_append(refused, changed_nothing=True)
    ledger.end_append(good)
    if not refused_ends_first:
        ledger.fail_append(refused, changed_nothing=True)
    assert length(ledger) is None


def test_the_later_of_two_with_the_same_start_is_refused(ledger: Ledger) -> None:
    good = begin(ledger, 5, 10)
    ledger.fail_append(begin(ledger, 5, 10), changed_nothing=True)
    ledger.end_append(good)
    assert length(ledger) == 15


def test_an_append_without_start_during_one_that_rolls_back_leaves_the_length_unknown(ledger: Ledger) -> None:
    first = begin(ledger, 2, 4)
    second = begin(ledger, 3)
    assert starts_of(second) == [6]
    ledger.end_append(first)
    ledger.end_append(second)
    assert length(ledger) is None


def test_an_answer_that_an_append_overtook_does_not_count_for_its_layer(ledger: Ledger) -> None:
    question = ledger.begin_question(7)
    append = begin(ledger, 5)
    ledger.end_append(append)
    ledger.end_question(question, [10, 11])
    assert (length(ledger), length(ledger, layer=1)) == (15, 11)


def test_an_answer_to_a_question_asked_during_an_append_does_not_count_for_its_layer(ledger: Ledger) -> None:
    append = begin(ledger, 5)
    question = ledger.begin_question(7)
    ledger.end_append(append)
    ledger.end_question(question, [10, 11])
    assert (length(ledger), length(ledger, layer=1)) == (15, 11)


def test_a_question_after_the_failure_settles(ledger: Ledger) -> None:
    append = begin(ledger, 5)
    ledger.fail_append(append, changed_nothing=False)
    assert length(ledger) is None
    ledger.end_question(ledger.begin_question(7), [15, 10])
    assert length(ledger) == 15


@pytest.mark.parametrize("append_ends_first", [True, False])
@pytest.mark.parametrize("append_begins_first", [True, False])
def test_a_truncation_that_overlaps_an_append_leaves_its_layer_unknown(
    ledger: Ledger, append_begins_first: bool, append_ends_first: bool
) -> None:
    if append_begins_first:
        append = begin(ledger, 5)
        cut = ledger.begin_truncation(7)
    else:
        cut = ledger.begin_truncation(7)
        append = begin(ledger, 5)
    if append_ends_first:
        ledger.end_append(append)
        ledger.end_truncation(cut, [4, 4])
    else:
        ledger.end_truncation(cut, [4, 4])
        ledger.end_append(append)
    assert (length(ledger), length(ledger, layer=1)) == (None, 4)


def test_a_failed_truncation_leaves_all_unknown_or_all_as_it_was(ledger: Ledger) -> None:
    ledger.fail_truncation(ledger.begin_truncation(7), changed_nothing=True)
    assert (length(ledger), length(ledger, layer=1)) == (10, 10)
    ledger.fail_truncation(ledger.begin_truncation(7), changed_nothing=False)
    assert (length(ledger), length(ledger, layer=1)) == (None, None)


@pytest.mark.parametrize("end", ["cut", "failed", "answered"])
def test_what_ends_after_its_sequence_was_closed_leaves_nothing(ledger: Ledger, end: str) -> None:
    watch = ledger.begin_question(7) if end == "answered" else ledger.begin_truncation(7)
    ledger.close(7)
    if end == "cut":
        ledger.end_truncation(watch, [4, 4])
    elif end == "failed":
        ledger.fail_truncation(watch, changed_nothing=False)
    else:
        ledger.end_question(watch, [10, 10])
    assert ledger._sequences == {}
    assert length(ledger) is None


def test_what_ends_after_its_sequence_was_opened_anew_does_not_count(ledger: Ledger) -> None:
    cut = ledger.begin_truncation(7)
    ledger.close(7)
    ledger.open(7, [0, 0])
    append = begin(ledger, 5)
    ledger.end_truncation(cut, [4, 4])
    ledger.end_append(append)
    assert (length(ledger), length(ledger, layer=1)) == (5, 0)


def test_a_failure_counts_once(ledger: Ledger) -> None:
    append = begin(ledger, 5)
    ledger.end_append(append)
    ledger.fail_append(append, changed_nothing=False)
    ledger.end_question(ledger.begin_question(7), [12, 12])
    assert length(ledger) == 12


# --- Beside a server ---


@dataclass
class Sent:
    """A write on its way: what the ledger knows it by, where it goes (rows: 0 of a cut), and what the server said."""

    token: Any
    start: int
    rows: int
    changed: bool | None = None
    lengths: tuple[int, int] = (0, 0)


class Beside:
    """A ledger, and a server that takes what is in flight in any order, for layer 0 of sequence 7."""

    def __init__(self, codec: ModuleType) -> None:
        self.ledger = Ledger(some_info(num_layers=2), codec)
        self.ledger.open(7, [10, 10])
        self.truth = 10
        self.sent: list[Sent] = []

    def append(self, rows: int, start: int | None) -> None:
        if start is None and length(self.ledger) is None:
            return
        append = begin(self.ledger, rows, start)
        self.sent.append(Sent(append, starts_of(append)[0], rows))

    def cut(self, to: int) -> None:
        self.sent.append(Sent(self.ledger.begin_truncation(7), to, 0))

    def ask(self) -> None:
        self.ledger.end_question(self.ledger.begin_question(7), [self.truth, 10])

    def take(self, one: Sent, refused: bool) -> None:
        one.changed = not refused and (one.rows == 0 or one.start <= self.truth)
        if one.changed:
            self.truth = one.start + one.rows if one.rows else min(self.truth, one.start)
        one.lengths = self.truth, 10

    def answer(self, one: Sent, lost: bool) -> None:
        self.sent.remove(one)
        if lost or not one.changed:
            fail = self.ledger.fail_append if one.rows else self.ledger.fail_truncation
            fail(one.token, not lost)
        elif one.rows:
            self.ledger.end_append(one.token)
        else:
            self.ledger.end_truncation(one.token, one.lengths)

    def go(self, step: str, number: int, flag: bool) -> None:
        untaken = [one for one in self.sent if one.changed is None]
        taken = [one for one in self.sent if one.changed is not None]
        if step == "append":
            self.append(1 + number % 5, None if flag else number)
        elif step == "cut":
            self.cut(number)
        elif step == "ask":
            self.ask()
        elif step == "take" and untaken:
            self.take(untaken[number % len(untaken)], refused=flag)
        elif step == "answer" and taken:
            self.answer(taken[number % len(taken)], lost=flag)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("append", "append", "take", "take", "answer", "answer", "cut", "ask")),
        st.integers(0, 20),
        st.sampled_from((False, False, True)),
    ),
    max_size=30,
)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_a_length_that_is_known_is_the_servers(codec: ModuleType, steps: Any) -> None:
    beside = Beside(codec)
    for step in steps:
        beside.go(*step)
        assert beside.sent or length(beside.ledger) in (None, beside.truth)
    for one in list(beside.sent):
        if one.changed is None:
            beside.take(one, refused=False)
        beside.answer(one, lost=False)
    assert length(beside.ledger) in (None, beside.truth)
    beside.ask()
    assert length(beside.ledger) == beside.truth
