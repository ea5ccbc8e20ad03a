"""The server's own account: its `/metrics` before and after, and what lies between."""

from __future__ import annotations

import re
import ssl
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from blockdex.client.endpoint import TLS
from blockdex.loadtest.settings import Target

_ANSWER_SECONDS = 5.0
_LARGEST_ANSWER = 16 << 20
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_TYPE = re.compile(r"^# TYPE (\S+) (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_PREFIX = "blockdex_"
_PROCESS_START = "process_start_time_seconds"
_WHOLE_SERVER = ("server", "supervisor")
"""Processes with which a server begins and ends; its core and its frontends are started anew beside them."""


class MetricsError(Exception):
    """`/metrics` does not answer: one line that says why."""


@dataclass(slots=True)
class HistogramState:
    """A histogram's buckets, as cumulated counts by upper bound, and the sum of its observations."""

    buckets: dict[float, float] = field(default_factory=dict)
    total: float = 0.0


@dataclass(slots=True)
class Snapshot:
    """The server's own metrics at one moment, by the series' name with its labels; and when its process began."""

    process_start: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, HistogramState] = field(default_factory=dict)


def scrape(target: Target) -> Snapshot:
    """What `/metrics` of a server says now.

    Raises:
        MetricsError: it does not answer, or with something else.
    """
    address = target.http_address
    url = f"{address if address.startswith('https://') else f'http://{address}'}/metrics"
    tls = target.endpoint.tls
    try:
        context = ssl.create_default_context(cafile=tls.ca if isinstance(tls, TLS) else None)
        request = urllib.request.Request(url, headers=dict(target.endpoint.metadata(None)))  # noqa: S310 - http or https
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS, context=context) as response:  # noqa: S310
            text = response.read(_LARGEST_ANSWER).decode()
    except (OSError, ValueError) as error:
        raise MetricsError(f"{url}: {error}") from error
    return parse(text)


def parse(text: str) -> Snapshot:
    """The blockdex metrics in a text of the Prometheus exposition format."""
    kinds = dict(_TYPE.findall(text))
    snapshot = Snapshot()
    for name, labels, value in _SAMPLE.findall(text):
        if name == _PROCESS_START and dict(_LABEL.findall(labels)).get("process") in _WHOLE_SERVER:
            snapshot.process_start = float(value)
        if not name.startswith(_PREFIX):
            continue
        pairs = dict(_LABEL.findall(labels))
        family, _, part = name.rpartition("_")
        if kinds.get(family) == "histogram":
            bound = pairs.pop("le", "")
            state = snapshot.histograms.setdefault(_series(family, pairs), HistogramState())
            if part == "bucket":
                state.buckets[float(bound)] = float(value)
            elif part == "sum":
                state.total = float(value)
        elif kinds.get(name) == "counter":
            snapshot.counters[_series(name, pairs)] = float(value)
        elif kinds.get(name) == "gauge":
            snapshot.gauges[_series(name, pairs)] = float(value)
    return snapshot


def difference(before: Snapshot, after: Snapshot) -> dict[str, Any]:
    """What happened between two moments.

    What began anew in between (the server, or the part of it that counts) has counted from nothing since: of it, all
    that it has counted at the end happened in between, and what it had counted before is lost.

    Returns:
        `counters`: by how much they rose; `histograms`: of what was observed; both without series that did not move.
        `gauges`: as they stand at the end.
    """
    if after.process_start != before.process_start:
        before = Snapshot()
    counters = {name: _rise(before.counters.get(name, 0.0), value) for name, value in after.counters.items()}
    histograms = {
        name: _observed(before.histograms.get(name, HistogramState()), state, whole="_seconds" not in name)
        for name, state in after.histograms.items()
    }
    return {
        "counters": {name: rise for name, rise in counters.items() if rise},
        "histograms": {name: observed for name, observed in histograms.items() if observed["count"]},
        "gauges": after.gauges,
    }


def _rise(before: float, after: float) -> float:
    return after if after < before else after - before


def _observed(before: HistogramState, after: HistogramState, *, whole: bool) -> dict[str, float]:
    fell = any(after.buckets.get(bound, 0.0) < count for bound, count in before.buckets.items())
    if fell or after.total < before.total:
        before = HistogramState()
    counts = {bound: count - before.buckets.get(bound, 0.0) for bound, count in sorted(after.buckets.items())}
    count = max(counts.values(), default=0.0)
    if not count:
        return {"count": 0.0}
    return {
        "count": count,
        "mean": (after.total - before.total) / count,
        "p50": _percentile(counts, 50, whole=whole),
        "p99": _percentile(counts, 99, whole=whole),
    }


def _percentile(counts: dict[float, float], percent: float, *, whole: bool) -> float:
    """No finer than the buckets are: interpolated inside one, or its upper bound for whole numbers."""
    rank = max(counts.values()) * percent / 100
    lower, seen = 0.0, 0.0
    for bound, count in counts.items():
        if count >= rank:
            if bound == float("inf"):
                return lower
            return bound if whole else lower + (bound - lower) * (rank - seen) / (count - seen)
        lower, seen = bound, count
    return lower


def _series(name: str, labels: dict[str, str]) -> str:
    words = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return f"{name}{{{words}}}" if words else name
