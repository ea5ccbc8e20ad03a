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
from blockdex.loadtest.plot import Series, line_chart, linear_axis
from blockdex.loadtest.recorder import CallRecord, Recorder
from blockdex.loadtest.report import report
from blockdex.loadtest.result import FORMAT, measurements
from blockdex.loadtest.schedule import Window
from blockdex.loadtest.steps import Operation
from blockdex.loadtest.sweep import Sweep, SweepError
from blockdex.loadtest.verdicts import verdicts

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


def bounded(recorder: Recorder, seconds: float = 3.0) -> dict[str, Any]:
    """What it comes to, with the bound of an outage that a run is given."""
    measurement = measurements(recorder, seconds)
    measurement["outages"]["bound"] = 2.0
    return measurement


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
            "check_share": 0.01,
        },
        "target": {"address": "<host>:1", "http_address": "", "tenant": "t"},
        "environment": {"cpu": "x", "cores": 2},
        "server": {
            "version": "0.1.0",
            "device": "cpu",
            "kernels": {"decode": ["k", "a & b"]},
            "spec": {"num_layers": 3, "topk": 16, "block_size": 128},
            "same_epoch": True,
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
        **bounded(recorded()),
        "left_open": 0,
        "cpu_shares": [0.5, 0.4],
        "ceiling": {**calls, "cpu_shares": [0.9, 0.9], "share_reached": 0.2, "near": False},
        "checks": {"answers": 90, "sampled": 9, "checked": 9, "whole": 0, "rows": 36, "flips": 1, "wrong": []},
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


def with_a_hole(operation: Operation = "decode") -> Recorder:
    """Ten calls a second for three seconds, but those of the 1.5 in the middle are answered when these are over."""
    recorder = Recorder()
    for number in range(30):
        begin = 10 + number / 10
        end = begin + 0.01 if not 10.75 < begin < 12.25 else 12.25
        recorder.observe(CallRecord("measured", operation, "AppendAndSelect", begin, begin, end, 8, 8, OK), WINDOW)
    return recorder


def test_an_outage_is_told_however_short_latencies_are(result: dict[str, Any]) -> None:
    result |= bounded(with_a_hole())
    assert result["outages"] == {"gaps": [{"start": 0.8, "seconds": 1.4}], "seconds": 1.4, "longest": 1.4, "bound": 2.0}
    assert ("warn", "1.40 s of 3.00 s without an answer") in verdicts(result)
    assert exit_status(result | {"slos": []}) == 0
    result["outages"]["bound"] = 1.3
    assert ("bad", "1.40 s of 3.00 s without an answer") in verdicts(result)
    assert exit_status(result | {"slos": []}) == 1
    text = report(result)
    assert "Without an answer" in text
    assert text.count('class="band"') == 4


def test_where_nobody_waits_there_is_no_outage() -> None:
    """Calls so rare that seconds pass without one; and a client that starts over waits, whatever its calls do."""
    recorder = Recorder()
    for begin in (10.1, 12.5):
        recorder.observe(CallRecord("measured", "open", "x", begin, begin, begin + 0.01, 0, 0, OK), WINDOW)
    assert bounded(recorder)["outages"]["gaps"] == []
    other = Recorder()
    other.wait(9.0, 14.0, WINDOW)
    recorder.merge(other)
    assert bounded(recorder)["outages"]["gaps"] == [{"start": 0.2, "seconds": 2.3}]


def test_what_is_answered_to_clients_that_start_over_is_no_answer_to_the_load() -> None:
    recorder = Recorder()
    for begin in range(10, 13):
        outcome = ("UNAVAILABLE", "UNREACHABLE") if begin == 11 else OK
        recorder.observe(CallRecord("set_up", "open", "OpenSequences", begin, begin, begin + 1, 0, 0, outcome), WINDOW)
    measured = bounded(recorder)
    assert measured["set_up_errors"] == 1
    assert measured["outages"]["seconds"] == 3.0


def test_a_line_ends_where_nothing_was_measured() -> None:
    line = Series("p50", [(0.5, 1.0), (1.5, 1.0), (2.5, None), (3.5, 2.0)])
    axis = linear_axis("", 4.0, str)
    first, second = re.findall(r'<polyline [^>]*points="([^"]*)"', line_chart("", axis, axis, [line]))
    assert len(first.split()) == 2
    assert len(set(second.split())) == 1


@pytest.mark.parametrize(
    ("text", "values"),
    [("clients=1,2,4", (1, 2, 4)), ("rate=0.5,20", (0.5, 20.0))],
)
def test_a_sweep_is_read(text: str, values: tuple[float, ...]) -> None:
    assert Sweep.parse(text).values == values


@pytest.mark.parametrize("text", ["clients", "clients=4", "clients=1,1", "clients=1,x", "rate=0,1", "layers=1,2"])
def test_a_sweep_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(SweepError, match=f"--sweep '{text}'"):
        Sweep.parse(text)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 3),
        ({"slos": []}, 0),
        ({"slos": [], "window": {"interrupted": True}}, 130),
        ({"all": {"calls": 5, "errors": 5}}, 1),
        ({"all": {"calls": 0, "errors": 0}}, 1),
        ({"checks": {"wrong": [{}], "checked": 1}, "window": {"interrupted": True}}, 1),
        ({"outages": {"longest": 2.1, "bound": 2.0}}, 1),
        ({"outages": {"longest": 2.0, "bound": 2.0}, "slos": []}, 0),
        ({"checks": {"wrong": [], "checked": 0}}, 3),
        ({"checks": {"wrong": [], "checked": 0}, "slos": []}, 4),
        ({"checks": {"wrong": [], "checked": 0}, "slos": [], "settings": {"check_share": 0}}, 0),
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


def test_the_page_says_that_nothing_was_tested(result: dict[str, Any]) -> None:
    result["checks"] |= {"checked": 0, "whole": 9, "rows": 0}
    text = report(result)
    assert "no selection was tested" in text
    assert "answers right" not in text
    assert "at most 2,048 tokens" in text


@pytest.mark.parametrize(("count", "words"), [(1, "1 client in 1 process,"), (2, "2 clients in 2 processes,")])
def test_one_is_not_many(result: dict[str, Any], count: int, words: str) -> None:
    result["settings"] |= {"clients": count, "processes": count}
    assert words in report(result)


def test_the_page_says_what_is_wrong(result: dict[str, Any]) -> None:
    result["checks"]["wrong"] = [{"operation": "decode", "sequence": 7, "layer": 1, "position": 9, "reason": "<b>"}]
    result["unsent"] = 12
    result["ceiling"]["near"] = True
    text = report(result)
    for words in (
        "1 wrong answer<",
        "&lt;b&gt;",
        "12 arrivals unsent",
        "near the load test",
        "1 of 1 objectives missed",
    ):
        assert words in text
    assert "&lt;host&gt;:1" in text
    assert "<b>:1" not in text


def test_a_page_of_nothing_measured_can_be_written(result: dict[str, Any]) -> None:
    result |= bounded(Recorder(), 0.4)
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
    [(None, "No such file"), ("{", "not JSON"), ("[]", "of format 2, got None"), ('{"format": 9}', "got 9")],
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
