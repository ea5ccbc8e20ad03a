"""The server's own account between two moments."""

from __future__ import annotations

import pytest

from blockdex.client.endpoint import Endpoint
from blockdex.loadtest.metrics import MetricsError, difference, parse, scrape
from blockdex.loadtest.settings import Target

BEFORE = """# HELP blockdex_requests_total Requests answered.
# TYPE blockdex_requests_total counter
blockdex_requests_total{code="OK",rpc="AppendKeys"} 5.0
blockdex_requests_total{code="OK",rpc="GetInfo"} 1.0
# TYPE blockdex_pages gauge
blockdex_pages{state="free"} 90.0
# TYPE blockdex_stage_duration_seconds histogram
blockdex_stage_duration_seconds_bucket{le="0.001",phase="decode",stage="plan"} 10.0
blockdex_stage_duration_seconds_bucket{le="0.01",phase="decode",stage="plan"} 10.0
blockdex_stage_duration_seconds_bucket{le="+Inf",phase="decode",stage="plan"} 10.0
blockdex_stage_duration_seconds_count{phase="decode",stage="plan"} 10.0
blockdex_stage_duration_seconds_sum{phase="decode",stage="plan"} 0.005
# TYPE blockdex_batch_requests histogram
blockdex_batch_requests_bucket{le="1.0"} 0.0
blockdex_batch_requests_bucket{le="2.0"} 0.0
blockdex_batch_requests_bucket{le="+Inf"} 0.0
blockdex_batch_requests_sum 0.0
# TYPE process_open_fds gauge
process_open_fds 12.0
"""
AFTER = (
    BEFORE.replace('AppendKeys"} 5.0', 'AppendKeys"} 25.0')
    .replace('free"} 90.0', 'free"} 70.0')
    .replace('le="0.01",phase="decode",stage="plan"} 10.0', 'le="0.01",phase="decode",stage="plan"} 30.0')
    .replace('le="+Inf",phase="decode",stage="plan"} 10.0', 'le="+Inf",phase="decode",stage="plan"} 30.0')
    .replace('_sum{phase="decode",stage="plan"} 0.005', '_sum{phase="decode",stage="plan"} 0.045')
    .replace('requests_bucket{le="2.0"} 0.0', 'requests_bucket{le="2.0"} 4.0')
    .replace('requests_bucket{le="+Inf"} 0.0', 'requests_bucket{le="+Inf"} 4.0')
    .replace("batch_requests_sum 0.0", "batch_requests_sum 7.0")
)


def test_what_lies_between_two_moments() -> None:
    between = difference(parse(BEFORE), parse(AFTER))
    assert between["counters"] == {'blockdex_requests_total{code="OK",rpc="AppendKeys"}': 20.0}
    assert between["gauges"] == {'blockdex_pages{state="free"}': 70.0}
    plan = between["histograms"]['blockdex_stage_duration_seconds{phase="decode",stage="plan"}']
    assert plan == pytest.approx({"count": 20, "mean": 0.002, "p50": 0.0055, "p99": 0.00991})
    assert between["histograms"]["blockdex_batch_requests"] == {"count": 4, "mean": 1.75, "p50": 2.0, "p99": 2.0}


def test_a_series_that_was_not_there_before_began_at_nothing() -> None:
    between = difference(parse(""), parse(AFTER))
    assert between["counters"]['blockdex_requests_total{code="OK",rpc="AppendKeys"}'] == 25.0
    assert between["histograms"]['blockdex_stage_duration_seconds{phase="decode",stage="plan"}']["count"] == 30.0


def test_counts_of_a_server_that_began_anew_begin_at_nothing() -> None:
    """What was counted before is more than what is counted now: nothing took less than no time."""
    between = difference(parse(AFTER), parse(BEFORE))
    assert between["counters"]['blockdex_requests_total{code="OK",rpc="AppendKeys"}'] == 5.0
    plan = between["histograms"]['blockdex_stage_duration_seconds{phase="decode",stage="plan"}']
    assert plan["count"] == 10
    assert plan["mean"] == pytest.approx(0.0005)
    assert 0 < plan["p50"] < plan["p99"] <= 0.001
    assert "blockdex_batch_requests" not in between["histograms"]


def test_a_server_that_began_anew_may_have_counted_more_by_now() -> None:
    between = difference(parse(BEFORE + _started(10, 10)), parse(AFTER + _started(11, 11)))
    assert between["counters"]['blockdex_requests_total{code="OK",rpc="AppendKeys"}'] == 25.0
    plan = between["histograms"]['blockdex_stage_duration_seconds{phase="decode",stage="plan"}']
    assert (plan["count"], plan["mean"]) == (30, pytest.approx(0.0015))


def test_a_frontend_that_began_anew_is_no_other_server() -> None:
    between = difference(parse(AFTER + _started(10, 10)), parse(AFTER + _started(10, 11)))
    assert not between["counters"]


def _started(supervisor: float, frontend: float) -> str:
    return (
        "# TYPE process_start_time_seconds gauge\n"
        f'process_start_time_seconds{{process="supervisor"}} {supervisor}\n'
        f'process_start_time_seconds{{process="frontend-0"}} {frontend}\n'
    )


def test_nothing_that_listens_is_told_in_one_line() -> None:
    with pytest.raises(MetricsError, match=r"http://127\.0\.0\.1:1/metrics: "):
        scrape(Target(Endpoint("127.0.0.1:2"), "127.0.0.1:1", "loadtest"))
