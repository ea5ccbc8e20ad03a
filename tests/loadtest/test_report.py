"""The result beside an older one, and as a page."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest

from blockdex.loadtest.command import exit_status
from blockdex.loadtest.comparison import ComparisonError, compare, read_result
from blockdex.loadtest.recorder import CallRecord, Recorder
from blockdex.loadtest.report import report
from blockdex.loadtest.result import FORMAT, measurements
from blockdex.loadtest.schedule import Window
from blockdex.loadtest.steps import Operation

OK = ("OK", "")
WINDOW = Window(0.0, 10.0, 13.0)


def recorded() -> Recorder:
    """Three seconds of calls of two operations, some of which failed, after a warm-up of ten seconds."""
    numbers = Random(1)
    recorder = Recorder()
    for number in range(1400):
        begin = number / 100
        latency = numbers.expovariate(200) + (0.3 if 11 < begin < 11.2 else 0)
        outcome = ("UNAVAILABLE", "SHUTTING_DOWN") if number % 100 == 7 else OK
        operation: Operation = "decode" if number % 3 else "close"
        phase = WINDOW.phase_of(begin)
        recorder.observe(
            CallRecord(phase, operation, "AppendAndSelect", begin, begin + 1e-4, begin + latency, 8, 8, outcome), WINDOW
        )
    return recorder


@pytest.fixture
def result() -> dict[str, Any]:
    """A result as a run makes it."""
    calls = {"throughput": {"calls_per_second": 500.0}, "latency_seconds": {"p50": 1e-3, "p99": 2e-3}}
    return {
        "format": FORMAT,
        "date": "2026-11-23T12:00:00+00:00",
        "settings": {
            "scenario": "decode-fleet",
            "clients": 4,
            "processes": 2,
            "rate": 100.0,
            "spacing": "fixed",
            "transport": "stream",
            "warm_up": 10.0,
        },
        "target": {"address": "<host>:1", "http_address": "", "tenant": "t"},
        "environment": {"cpu": "x", "cores": 2},
        "server": {
            "version": "0.1.0",
            "device": "cpu",
            "kernels": {"decode": ["k", "a & b"]},
            "spec": {"num_layers": 3},
            "limits": {},
            "cache_before": {"pages_used": 0},
            "cache_at_end": {"pages_used": 9},
            "metrics": {
                "counters": {"blockdex_evictions_total": 1.0},
                "histograms": {
                    'blockdex_stage_duration_seconds{phase="decode",stage="plan"}': {
                        "count": 4,
                        "mean": 1e-3,
                        "p50": 1e-3,
                        "p99": 2e-3,
                    }
                },
                "gauges": {},
            },
        },
        "shapes": {
            "scale": 0.5,
            "free_tokens": 1000,
            "layers": 3,
            "chunk": 64,
            "clients": [{"clients": 4, "shape": "decode"}],
        },
        "window": {"seconds": 3.0, "warm_up_seconds": 10.0, "interrupted": False},
        **measurements(recorded(), 3.0),
        "left_open": 0,
        "cpu_shares": [0.5, 0.4],
        "ceiling": {**calls, "cpu_shares": [0.9, 0.9], "share_reached": 0.2, "near": False},
        "checks": {"answers": 90, "sampled": 9, "checked": 9, "rows": 36, "flips": 1, "wrong": []},
        "slos": [{"slo": "p99<20ms", "kind": "seconds", "limit": 0.02, "measured": 0.03, "met": False}],
        "comparison": None,
    }


def test_what_is_measured_is_the_window_alone() -> None:
    measured = measurements(recorder := recorded(), 3.0)
    assert measured["all"]["calls"] == 300
    assert measured["all"]["errors"] == 3
    assert measured["all"]["outcomes"] == {"OK": 297, "UNAVAILABLE SHUTTING_DOWN": 3}
    assert recorder.sent["warm_up", "AppendAndSelect", "OK"] + recorder.sent["after", "AppendAndSelect", "OK"] == 1089
    assert sum(second["calls"] for second in measured["seconds"]) == pytest.approx(297, abs=3)
    assert measured["throughput"]["tokens_per_second"] == pytest.approx(297 * 8 / 3, rel=0.02)
    assert measured["operations"]["decode"]["calls"] + measured["operations"]["close"]["calls"] == 300
    assert measured["lateness_seconds"]["p99"] == pytest.approx(1e-4, rel=0.01)


def test_latency_over_time_belongs_to_the_second_in_which_a_call_was_meant_to_begin() -> None:
    longest = [second["max"] for second in measurements(recorded(), 3.0)["seconds"]]
    assert longest[1] > 0.3 > max(longest[0], longest[2])


def test_merged_recorders_are_one(result: dict[str, Any]) -> None:
    twice = recorded()
    twice.merge(recorded())
    measured = measurements(twice, 3.0)
    assert measured["all"]["calls"] == 2 * result["all"]["calls"]
    assert measured["all"]["latency_seconds"]["p99"] == result["all"]["latency_seconds"]["p99"]
    assert measured["seconds"][0]["calls"] == 2 * result["seconds"][0]["calls"]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 3),
        ({"slos": []}, 0),
        ({"slos": [], "window": {"interrupted": True}}, 130),
        ({"all": {"calls": 5, "errors": 5}}, 1),
        ({"all": {"calls": 0, "errors": 0}}, 1),
        ({"checks": {"wrong": [{}]}, "window": {"interrupted": True}}, 1),
    ],
)
def test_the_exit_status_says_the_worst(result: dict[str, Any], change: dict[str, Any], status: int) -> None:
    assert exit_status(result | change) == status


class Page(HTMLParser):
    """Notes tags that are not closed, and everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [str(value) for name, value in attributes if name in {"src", "href", "xlink:href", "srcset"}]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_from_anywhere(result: dict[str, Any]) -> None:
    text = report(result)
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.references == []
    assert page.tags.count("svg") == 6
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", text)


def test_the_page_says_what_is_wrong(result: dict[str, Any]) -> None:
    result["checks"]["wrong"] = [{"operation": "decode", "sequence": 7, "layer": 1, "position": 9, "reason": "<b>"}]
    result["unsent"] = 12
    result["ceiling"]["near"] = True
    text = report(result)
    for words in (
        "1 wrong answers",
        "&lt;b&gt;",
        "12 arrivals unsent",
        "near the load test",
        "1 of 1 objectives missed",
    ):
        assert words in text
    assert "&lt;host&gt;:1" in text
    assert "<b>:1" not in text


def test_a_page_of_nothing_measured_can_be_written(result: dict[str, Any]) -> None:
    result |= measurements(Recorder(), 0.4)
    result["ceiling"] = None
    result["server"]["metrics"] = None
    result["server"]["cache_at_end"] = None
    assert "none" in report(result)


def test_a_run_beside_itself_differs_in_nothing(result: dict[str, Any]) -> None:
    compared = compare(result, result)
    assert compared["differences"] == []
    assert {row["ratio"] for row in compared["figures"]} <= {1.0, None}


def test_figures_stand_beside_their_ratio(result: dict[str, Any]) -> None:
    old = copy.deepcopy(result)
    old["throughput"]["calls_per_second"] = result["throughput"]["calls_per_second"] / 2
    (row,) = [row for row in compare(old, result)["figures"] if row["figure"] == "calls"]
    assert row["ratio"] == pytest.approx(2)


def test_what_differs_is_said_first(result: dict[str, Any]) -> None:
    old = copy.deepcopy(result)
    old["settings"]["clients"] = 8
    old["server"]["device"] = "cuda:0"
    compared = compare(old, result)
    assert compared["differences"] == [
        {"what": "settings.clients", "old": 8, "new": 4},
        {"what": "server.device", "old": "cuda:0", "new": "cpu"},
    ]
    assert compared["comparable"]
    result["comparison"] = compared
    assert "not alike" in report(result)


def test_another_scenario_is_not_compared(result: dict[str, Any]) -> None:
    old = copy.deepcopy(result)
    old["settings"]["scenario"] = "churn"
    compared = compare(old, result)
    assert not compared["comparable"]
    assert compared["figures"] == []
    result["comparison"] = compared
    assert "figures are not compared" in report(result)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "No such file"), ("{", "not JSON"), ("[]", "of format 1, got None"), ('{"format": 9}', "got 9")],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ComparisonError, match=words):
        read_result(path)


def test_a_result_survives_its_file(tmp_path: Path, result: dict[str, Any]) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")
    assert compare(read_result(path), result)["differences"] == []
