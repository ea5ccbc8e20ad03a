"""Faults of every kind, once each; `python -m faults` in `tests` does more of them."""

from __future__ import annotations

import pytest

from faults.run import ALL_KINDS, figures, run


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_fault_makes_an_answer_wrong_or_a_sequence_vanish() -> None:
    outcome = run(ALL_KINDS, each=1, seed=0)
    print(figures(outcome))
    assert not outcome.wrong
    assert outcome.recoveries.keys() == set(ALL_KINDS)
    assert outcome.answers > 1000
