"""What the engine says of itself, between plain data and JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from blockdex.engine.stats import Histogram, Stats
from blockdex.messages import CacheOverview, CacheUsage, Info, Limits
from blockdex_kernels import IndexSpec

Words = dict[str, Any]


def words_of(report: Info | Stats | CacheOverview) -> Words:
    """A report as an object of JSON."""
    fields = dataclasses.asdict(report)
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


def info_of(words: Words) -> Info:
    """The info that such an object stands for."""
    return Info(
        spec=IndexSpec(**words["spec"]),
        limits=Limits(**words["limits"]),
        cache=CacheUsage(**words["cache"]),
        epoch=words["epoch"],
        device=words["device"],
        kernels={phase: (kernel, reason) for phase, (kernel, reason) in words["kernels"].items()},
    )


def stats_of(words: Words) -> Stats:
    """The stats that such an object stands for."""
    stats = Stats(**words)
    for name in ("stage_seconds", "batch_tokens"):
        setattr(stats, name, {key: histogram_of(histogram) for key, histogram in words[name].items()})
    stats.batch_requests = histogram_of(words["batch_requests"])
    return stats


def histogram_of(words: Words) -> Histogram:
    """The histogram that such an object stands for."""
    return Histogram(tuple(words["bounds"]), words["counts"], words["total"])


def overview_of(words: Words) -> CacheOverview:
    """The overview that such an object stands for."""
    counts = {name: np.array(words[name], np.int64) for name in ("private", "shared", "idle", "lengths")}
    return CacheOverview(**words | counts | {"length_bounds": tuple(words["length_bounds"])})
