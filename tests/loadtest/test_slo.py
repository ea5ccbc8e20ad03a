"""Objectives."""

from __future__ import annotations

from typing import Any

import pytest

from blockdex.loadtest.slo import Objective, ObjectiveError

RESULT: dict[str, Any] = {
    "all": {"calls": 1000, "errors": 5, "latency_seconds": {"p50": 0.002, "p99": 0.02, "p99.9": 0.03, "max": 0.5}},
    "operations": {"decode": {"calls": 10, "errors": 0, "latency_seconds": {"p50": 0.001, "p99": None}}},
    "unsent": 0,
    "throughput": {"calls_per_second": 100.0, "tokens_per_second": 800.0, "queries_per_second": 800.0},
}


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("p99<20.1ms", True),
        ("p99<20ms", False),
        ("p99<=20ms", True),
        ("p99.9 < 0.1s", True),
        ("max>400000us", True),
        ("errors<0.5%", False),
        ("errors<=0.5%", True),
        ("errors<0.006", True),
        ("rate>100/s", False),
        ("rate>=100", True),
        ("tokens>799/s", True),
        ("unsent<1%", True),
        ("decode.p50<2ms", True),
        ("decode.errors<1%", True),
        ("decode.p99<1s", False),
        ("prefill.p99<1s", False),
    ],
)
def test_objectives_are_held_against_the_result(text: str, met: bool) -> None:
    assert Objective.parse(text).judge(RESULT)["met"] is met


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("p99", "must be like"),
        ("p99=20ms", "must be like"),
        ("p98<20ms", "'p98' is none of p50"),
        ("p99<20", "p99 takes a number with us, ms, s, got '20'"),
        ("p99<20%", "got '20%'"),
        ("p99<fastms", "got 'fastms'"),
        ("errors<1ms", "errors takes a number with %, no unit"),
        ("rate>1%", "rate takes a number with /s, no unit"),
        ("decode.rate>1", "rate is of all calls together, not of decode"),
        ("", "must be like"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        Objective.parse(text)
