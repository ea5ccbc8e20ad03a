"""Lengths where calls overlap in time: what is certain stays, what is not is unknown, never wrong."""

from __future__ import annotations

import pytest

from blockdex import FailedPreconditionError
from blockdex.client.ledger import Ledger
from clients import some_info

pytestmark = pytest.mark.usefixtures("way")


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger(some_info(num_layers=2))
    ledger.open(7, [10, 10])
    return ledger


def length(ledger: Ledger, layer: int = 0) -> int | None:
    try:
        return ledger.last_positions(layer, [7], [0])[0]
    except FailedPreconditionError:
        return None


def test_an_append_follows_one_that_is_still_in_flight(ledger: Ledger) -> None:
    first = ledger.begin_append(0, [7], [5], None)
    second = ledger.begin_append(0, [7], [3], None)
    assert (first.starts, second.starts) == ([10], [15])
    ledger.end_append(second)
    ledger.end_append(first)
    assert length(ledger) == 18


def test_the_later_of_two_is_refused(ledger: Ledger) -> None:
    first = ledger.begin_append(0, [7], [5], None)
    second = ledger.begin_append(0, [7], [3], None)
    ledger.fail_append(second, changed_nothing=True)
    ledger.end_append(first)
    assert length(ledger) == 15


def test_the_earlier_of_two_is_refused(ledger: Ledger) -> None:
    first = ledger.begin_append(0, [7], [5], None)
    second = ledger.begin_append(0, [7], [3], None)
    ledger.fail_append(first, changed_nothing=True)
    ledger.fail_append(second, changed_nothing=True)
    assert length(ledger) is None
    assert length(ledger, layer=1) == 10


def test_an_unknown_outcome_stays_unknown_whatever_follows(ledger: Ledger) -> None:
    first = ledger.begin_append(0, [7], [5], None)
    second = ledger.begin_append(0, [7], [3], None)
    ledger.fail_append(first, changed_nothing=False)
    ledger.end_append(second)
    assert length(ledger) is None


def test_an_answer_that_an_append_overtook_does_not_count_for_its_layer(ledger: Ledger) -> None:
    question = ledger.begin_question(7)
    append = ledger.begin_append(0, [7], [5], None)
    ledger.end_append(append)
    ledger.end_question(question, [10, 11])
    assert (length(ledger), length(ledger, layer=1)) == (15, 11)


def test_an_answer_to_a_question_asked_during_an_append_does_not_count_for_its_layer(ledger: Ledger) -> None:
    append = ledger.begin_append(0, [7], [5], None)
    question = ledger.begin_question(7)
    ledger.end_append(append)
    ledger.end_question(question, [10, 11])
    assert (length(ledger), length(ledger, layer=1)) == (15, 11)


def test_a_question_after_the_failure_settles(ledger: Ledger) -> None:
    append = ledger.begin_append(0, [7], [5], None)
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
        append = ledger.begin_append(0, [7], [5], None)
        cut = ledger.begin_truncation(7)
    else:
        cut = ledger.begin_truncation(7)
        append = ledger.begin_append(0, [7], [5], None)
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


def test_a_failure_counts_once(ledger: Ledger) -> None:
    append = ledger.begin_append(0, [7], [5], None)
    ledger.end_append(append)
    ledger.fail_append(append, changed_nothing=False)
    ledger.end_question(ledger.begin_question(7), [12, 12])
    assert length(ledger) == 12
