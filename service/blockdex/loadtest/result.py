"""A run as plain data: what the JSON file holds, and what objectives, comparison and report read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from blockdex.client import Info
from blockdex.loadtest.histogram import RELATIVE_ERROR, Histogram
from blockdex.loadtest.jobs import Done
from blockdex.loadtest.recorder import OK, TICK_SECONDS, Recorder, Second
from blockdex.loadtest.shapes import Plan

FORMAT = 2
"""Changes when a reader of the file would have to."""

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
_CURVE = (0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.8, 99.9, 99.95, 99.98, 99.99, 99.999, 100.0)
_NEAR_CEILING = 0.8
_SHORTEST_GAP = round(1.0 / TICK_SECONDS)


def merged(recorders: Sequence[Recorder]) -> Recorder:
    """What all processes have counted together."""
    together = Recorder()
    for recorder in recorders:
        together.merge(recorder)
    return together


def measurements(recorder: Recorder, seconds: float) -> dict[str, Any]:
    """What was measured, of a window that lasted so long."""
    operations = {}
    for operation in sorted({name for name, *_ in recorder.outcomes}):
        outcomes = {
            _words(code, reason): n for (name, code, reason), n in recorder.outcomes.items() if name == operation
        }
        latencies = recorder.latencies.get(operation, Histogram())
        operations[operation] = _calls(outcomes, latencies)
    every: dict[str, int] = {}
    for (_, code, reason), count in recorder.outcomes.items():
        every[_words(code, reason)] = every.get(_words(code, reason), 0) + count
    together = Histogram()
    for latencies in recorder.latencies.values():
        together.merge(latencies)
    return {
        "all": _calls(every, together),
        "operations": operations,
        "unsent": recorder.unsent,
        "lateness_seconds": summary(recorder.lateness),
        "latency_relative_error": RELATIVE_ERROR,
        "throughput": _throughput(list(recorder.seconds.values()), seconds),
        "outages": outages(recorder, seconds),
        "set_up_errors": _set_up_errors(recorder),
        "seconds": [_second(recorder, number, seconds) for number in range(math.ceil(seconds))],
    }


def outages(recorder: Recorder, seconds: float) -> dict[str, Any]:
    """Stretches of a second or more in which clients waited and no call of the load was answered, to a tenth."""
    silent = recorder.waiting - recorder.answered
    gaps: list[dict[str, float]] = []
    for is_silent, stretch in itertools.groupby(range(int(seconds / TICK_SECONDS + 1e-6)), silent.__contains__):
        ticks = list(stretch)
        if is_silent and len(ticks) >= _SHORTEST_GAP:
            start, length = (round(count * TICK_SECONDS, 1) for count in (ticks[0], len(ticks)))
            gaps.append({"start": start, "seconds": length})
    lengths = [gap["seconds"] for gap in gaps]
    return {"gaps": gaps, "seconds": round(sum(lengths), 1), "longest": max(lengths, default=0.0)}


def _set_up_errors(recorder: Recorder) -> int:
    """Calls that failed while clients whose calls had failed made new sequences: of no operation, and yet errors."""
    return sum(count for (phase, _, code), count in recorder.sent.items() if phase == "set_up" and code != OK[0])


def sent(recorder: Recorder) -> dict[str, dict[str, dict[str, int]]]:
    """Calls of all phases, by phase, RPC and code: together, what the server has counted of this load test."""
    phases: dict[str, dict[str, dict[str, int]]] = {}
    for (phase, rpc, code), count in sorted(recorder.sent.items()):
        phases.setdefault(phase, {}).setdefault(rpc, {})[code] = count
    return phases


def ceiling(done: Sequence[Done], seconds: float, measured_rate: float) -> dict[str, Any]:
    """What the load test reached where nothing was computed, and how near to that the measured rate is."""
    recorder = merged([part.recorder for part in done])
    measured = measurements(recorder, seconds)
    rate = measured["throughput"]["calls_per_second"]
    share = measured_rate / rate if rate else None
    return {
        "seconds": seconds,
        "throughput": measured["throughput"],
        "latency_seconds": measured["all"]["latency_seconds"],
        "cpu_shares": [part.cpu_share for part in done],
        "share_reached": share,
        "near": share is not None and share >= _NEAR_CEILING,
    }


def server_facts(before: Info, at_end: Info | None) -> dict[str, Any]:
    """What the server says of itself, before the run and at the end of the window."""
    return {
        "version": before.version,
        "device": before.device,
        "kernels": {phase: list(choice) for phase, choice in before.kernels.items()},
        "spec": asdict(before.spec),
        "limits": asdict(before.limits),
        "epoch": before.epoch,
        "same_epoch": None if at_end is None else at_end.epoch == before.epoch,
        "cache_before": asdict(before.cache),
        "cache_at_end": None if at_end is None else asdict(at_end.cache),
    }


def shape_facts(plan: Plan) -> dict[str, Any]:
    """What the clients were."""
    kinds: dict[str, int] = {}
    for shape in plan.shapes:
        kinds[str(shape)] = kinds.get(str(shape), 0) + 1
    return {
        "scale": plan.scale,
        "free_tokens": plan.free_tokens,
        "layers": plan.bounds.layers,
        "chunk": plan.bounds.chunk,
        "clients": [{"clients": count, "shape": kind} for kind, count in kinds.items()],
    }


def summary(latencies: Histogram) -> dict[str, float | None]:
    """Percentiles, mean and maximum, in seconds."""
    return {
        **{name: latencies.percentile(percent) for name, percent in PERCENTILES.items()},
        "mean": latencies.mean,
        "max": latencies.largest if latencies.count else None,
    }


def _calls(outcomes: dict[str, int], latencies: Histogram) -> dict[str, Any]:
    calls = sum(outcomes.values())
    return {
        "calls": calls,
        "errors": calls - outcomes.get(_words(*OK), 0),
        "outcomes": dict(sorted(outcomes.items())),
        "latency_seconds": summary(latencies),
        "curve": [[percent, latencies.percentile(percent)] for percent in _CURVE] if latencies.count else [],
    }


def _throughput(seconds: Sequence[Second], length: float) -> dict[str, float]:
    totals = {name: sum(getattr(second, name) for second in seconds) for name in ("calls", "tokens", "queries")}
    return {f"{name}_per_second": total / length if length > 0 else 0.0 for name, total in totals.items()}


def _second(recorder: Recorder, number: int, seconds: float) -> dict[str, Any]:
    second = recorder.seconds.get(number, Second())
    return {
        "second": number,
        "length": min(1.0, seconds - number),
        "calls": second.calls,
        "tokens": second.tokens,
        "queries": second.queries,
        "errors": dict(second.errors),
        "p50": second.latencies.percentile(50),
        "p99": second.latencies.percentile(99),
        "max": second.latencies.largest if second.latencies.count else None,
    }


def _words(code: str, reason: str) -> str:
    return f"{code} {reason}".strip()
