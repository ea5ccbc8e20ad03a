"""What the page shows, as one JSON object: the last minute in numbers, and the cache as a picture. Names nobody."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Container
from itertools import pairwise
from typing import Any

from blockdex.contract.errors import UnavailableError
from blockdex.contract.messages import KERNEL_PHASES, STAGES, CacheOverview, CacheUsage
from blockdex.contract.stats import Histogram, Stats
from blockdex.contract.version import VERSION
from blockdex.frontend.http.history import History, Sample, stages_of
from blockdex.frontend.http.metrics import CODES
from blockdex.frontend.http.readiness import Readiness
from blockdex.ring.engine_reports import Reports

MAX_CELLS = 4096
_NOW_SECONDS = 5
_FAULTS = frozenset({"UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Codes that no caller brings about."""

Object = dict[str, Any]


class LiveView:
    """Makes the object once a second and when readiness changes, but only if asked for; used on one asyncio loop."""

    def __init__(self, reports: Reports, history: History, readiness: Readiness) -> None:
        self._reports = reports
        self._history = history
        self._readiness = readiness
        self._born = time.monotonic()
        self._making = asyncio.Lock()
        self._made_of: tuple[Sample, str] | None = None
        self._overview: CacheOverview | None = None
        self._body = b""

    async def body(self) -> bytes:
        """The object as of the last second, as JSON; while the engine is gone, what it said last.

        Raises:
            UnavailableError: the engine is gone, and has not been asked before.
        """
        async with self._making:
            if self._made_of != (self._history.samples[-1], self._readiness.obstacle):
                self._overview = await self._look()
                self._made_of = (self._history.samples[-1], self._readiness.obstacle)
                self._body = json.dumps(self._object(self._overview), separators=(",", ":")).encode()
        return self._body

    async def _look(self) -> CacheOverview:
        try:
            return await self._reports.overview(MAX_CELLS)
        except UnavailableError:
            if self._overview is None:
                raise
            return self._overview

    def _object(self, overview: CacheOverview) -> Object:
        samples = list(self._history.samples)
        first, last, recent = samples[0], samples[-1], samples[-1 - _NOW_SECONDS :][0]
        info = last.info
        return {
            "version": VERSION,
            "device": info.device,
            "epoch": str(info.epoch),
            "epoch_seconds": round(time.time() - last.stats.epoch_started, 1),
            "uptime_seconds": round(time.monotonic() - self._born, 1),
            "ready": self._readiness.ready,
            "obstacle": self._readiness.obstacle,
            "window_seconds": round(last.at - first.at, 1),
            "now": _rates(recent, last),
            "queued": last.stats.queued,
            "waiting": last.stats.waiting,
            "seconds": _seconds(samples),
            "stages": _times(stages_of(first.stats), stages_of(last.stats), last.at - first.at),
            "rpcs": _rpcs(first, last),
            "codes": _codes(first, last),
            "batches": _batches(first.stats, last.stats),
            "cache": _cache(overview, first.info.cache, info.cache),
            "sequences": _sequences(overview, info.cache),
            "kernels": [[phase, kernel, reason] for phase, (kernel, reason) in info.kernels.items()],
            "spec": dataclasses.asdict(info.spec),
            "limits": dataclasses.asdict(info.limits),
        }


def _seconds(samples: list[Sample]) -> Object:
    """A row for each of the last seconds, as columns, oldest first."""
    rows = [_rates(before, now) for before, now in pairwise(samples)]
    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    p99 = {stage: [sample.stage_p99[stage] for sample in samples[1:]] for stage in samples[-1].stage_p99}
    return columns | {"pages_used": [sample.info.cache.pages_used for sample in samples[1:]], "p99": p99}


def _rates(before: Sample, now: Sample) -> dict[str, float | None]:
    """What happened a second between two samples, and how long a decode took in the engine, on average."""
    seconds = max(now.at - before.at, 1e-9)

    def a_second(earlier: float, later: float) -> float:
        return _short((later - earlier) / seconds)

    return {
        "requests": a_second(sum(before.requests.values()), sum(now.requests.values())),
        "errors": a_second(_errors(before), _errors(now)),
        "faults": a_second(_errors(before, _FAULTS), _errors(now, _FAULTS)),
        "decode_seconds": _decode_seconds(before.stats, now.stats),
        "batches": a_second(before.stats.batches, now.stats.batches),
        # Counted once a batch has ended, however long it was.
        "busy": min(a_second(before.stats.busy_seconds, now.stats.busy_seconds), 1.0),
        "device_busy": min(a_second(before.stats.device_busy_seconds, now.stats.device_busy_seconds), 1.0),
        **{phase: a_second(before.stats.tokens[phase], now.stats.tokens[phase]) for phase in KERNEL_PHASES},
    }


def _errors(sample: Sample, codes: Container[str] = frozenset(CODES) - {"OK"}) -> int:
    return sum(count for (_, code, _), count in sample.requests.items() if code in codes)


def _decode_seconds(before: Stats, now: Stats) -> float | None:
    """From arrival to answer, on average: a request's stages lie one behind the other."""
    earlier, later = before.stage_seconds["decode"], now.stage_seconds["decode"]
    decodes = later["queue"].count - earlier["queue"].count
    spent = sum(later[stage].total - earlier[stage].total for stage in STAGES)
    return _short(spent / decodes) if decodes else None


def _times(before: dict[str, Histogram], now: dict[str, Histogram], seconds: float) -> list[Object]:
    """Of each name: how often a second, and the median and 99th percentile in seconds."""
    rows = []
    for name, histogram in now.items():
        made = histogram.since(before[name]) if name in before else histogram
        row = {"name": name, "count": made.count, "rate": _short(made.count / max(seconds, 1e-9))}
        rows.append(row | {"p50": _quantile(made, 0.5), "p99": _quantile(made, 0.99)})
    return rows


def _rpcs(first: Sample, last: Sample) -> list[Object]:
    rows = _times(first.request_seconds, last.request_seconds, last.at - first.at)
    errors = dict.fromkeys(last.request_seconds, 0)
    for (rpc, code, reason), count in last.requests.items():
        if code != "OK":
            errors[rpc] += count - first.requests.get((rpc, code, reason), 0)
    return [row | {"errors": errors[row["name"]]} for row in rows]


def _codes(first: Sample, last: Sample) -> list[Object]:
    """Of each code: requests answered with it in the window, and since the start."""
    window, total = dict.fromkeys(CODES, 0), dict.fromkeys(CODES, 0)
    for (rpc, code, reason), count in last.requests.items():
        window[code] += count - first.requests.get((rpc, code, reason), 0)
        total[code] += count
    return [{"code": code, "window": window[code], "total": total[code]} for code in CODES]


def _batches(first: Stats, last: Stats) -> Object:
    requests = last.batch_requests.since(first.batch_requests)
    tokens = {phase: last.batch_tokens[phase].since(first.batch_tokens[phase]) for phase in KERNEL_PHASES}
    return {
        "bounds": [int(bound) for bound in requests.bounds],
        "requests": requests.counts,
        "mean": _mean(requests),
        "tokens": {phase: made.counts for phase, made in tokens.items()},
        "tokens_mean": {phase: _mean(made) for phase, made in tokens.items()},
    }


def _cache(overview: CacheOverview, first: CacheUsage, last: CacheUsage) -> Object:
    private, shared, idle = (int(state.sum()) for state in (overview.private, overview.shared, overview.idle))
    free = overview.pages_total - private - shared - idle
    return {
        "pages": {"total": overview.pages_total, "free": free, "private": private, "shared": shared, "idle": idle},
        "cells": {
            "pages_per_cell": overview.pages_per_cell,
            "private": overview.private.tolist(),
            "shared": overview.shared.tolist(),
            "idle": overview.idle.tolist(),
        },
        "page_bytes": last.page_bytes,
        "capacity_tokens": last.capacity_tokens,
        "evictions": last.evictions,
        # An engine that started anew counts from 0.
        "evictions_window": max(last.evictions - first.evictions, 0),
    }


def _sequences(overview: CacheOverview, usage: CacheUsage) -> Object:
    return {
        "open": usage.sequences,
        "idle": overview.idle_sequences,
        "tokens": overview.tokens,
        "bounds": overview.length_bounds,
        "lengths": overview.lengths.tolist(),
    }


def _mean(histogram: Histogram) -> float | None:
    return _short(histogram.total / histogram.count) if histogram.count else None


def _quantile(histogram: Histogram, share: float) -> float | None:
    value = histogram.quantile(share)
    return value and _short(value)


def _short(value: float) -> float:
    """Four digits, which is more than a histogram knows."""
    return float(f"{value:.4g}")
