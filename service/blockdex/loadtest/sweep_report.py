"""The page of a sweep: throughput and latency of all its runs, and what is to be known of each."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from blockdex.loadtest.page import latency_axis, page, section, table
from blockdex.loadtest.plot import Series, line_chart, linear_axis
from blockdex.loadtest.report import conditions
from blockdex.loadtest.result import PERCENTILES
from blockdex.loadtest.verdicts import verdicts
from blockdex.loadtest.wording import duration, figure


def sweep_report(setting: str, results: Sequence[dict[str, Any]]) -> str:
    """The page of results that differ in one setting."""
    title = f"blockdex load test: {results[0]['settings']['scenario']} by {setting}"
    heading = f"<header><h1>{escape(title)}</h1><p>The last run: {escape(conditions(results[-1]))}</p></header>"
    chart = f'<section class="charts">{_latency(setting, results)}{_throughput(setting, results)}</section>'
    return page(title, [heading, chart, section("Runs", _runs(setting, results))])


def _latency(setting: str, results: Sequence[dict[str, Any]]) -> str:
    rates = [result["throughput"]["calls_per_second"] for result in results]
    labels = [f"{result['settings'][setting]:g}" for result in results]
    lines = []
    for name in ("p99", "p50"):
        latencies = [result["all"]["latency_seconds"][name] for result in results]
        lines.append(Series(name, list(zip(rates, latencies, strict=True)), labels if name == "p99" else ()))
    x = linear_axis("calls answered a second", max(rates), "{:,g}".format)
    return line_chart(f"Latency by throughput, with the {setting} of each point", x, latency_axis(lines), lines)


def _throughput(setting: str, results: Sequence[dict[str, Any]]) -> str:
    points = [(result["settings"][setting], result["throughput"]["calls_per_second"]) for result in results]
    points.sort()
    x = linear_axis(setting, points[-1][0], "{:,g}".format)
    y = linear_axis("", max(rate for _, rate in points), "{:,g}".format)
    return line_chart(f"Calls answered a second by {setting}", x, y, [Series("", points)])


def _runs(setting: str, results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        rates, latencies = result["throughput"], result["all"]["latency_seconds"]
        rows.append(
            (
                f"{result['settings'][setting]:g}",
                figure(rates["calls_per_second"], "per_second"),
                figure(rates["tokens_per_second"], "per_second"),
                *(duration(latencies[name]) for name in (*PERCENTILES, "max")),
                ", ".join(words for _, words in verdicts(result)),
            )
        )
    return table((setting, "calls", "tokens", *PERCENTILES, "max", "what to know"), rows)
