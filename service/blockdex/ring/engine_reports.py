"""What the engine says of itself to another process, between plain data and JSON."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from blockdex.contract.errors import Reason, UnavailableError
from blockdex.contract.messages import CacheOverview, CacheUsage, Info, Limits
from blockdex.contract.stats import Histogram, Stats
from blockdex.logs import log_fault
from blockdex.ring.control_channel import ControlChannel, Words
from blockdex_kernels import IndexSpec

if TYPE_CHECKING:
    from blockdex.scheduler.loop import Engine

logger = logging.getLogger(__name__)


class RemoteReports:
    """`Reports` of an engine in another process; used on one asyncio loop.

    Args:
        talk: the conversation with that process, if it is there.
    """

    def __init__(self, talk: Callable[[], ControlChannel | None]) -> None:
        self._talk_of = talk

    async def info(self) -> Info:
        """As `Reports.info`."""
        return info_of(await self._ask("info"))

    async def stats(self) -> Stats:
        """As `Reports.stats`."""
        return stats_of(await self._ask("stats"))

    async def overview(self, max_cells: int) -> CacheOverview:
        """As `Reports.overview`."""
        return overview_of(await self._ask("overview", max_cells=max_cells))

    async def _ask(self, what: str, **arguments: int) -> Words:
        talk = self._talk_of()
        if talk is None:
            raise gone()
        return await talk.ask({"ask": what, **arguments})


async def reply_to(engine: Engine, words: Words) -> Words:
    """What is said to a question about an engine; a fault in a report is logged, and harms nothing else."""
    try:
        return {"answer": await _answer_of(engine, words)}
    except Exception as fault:
        log_fault(logger, "a report failed", fault)
        return {"failed": "engine: a fault in its report, which its log tells of"}


async def _answer_of(engine: Engine, words: Words) -> Words:
    """The report that is asked for: made beside the engine's thread, so that batches do not wait."""
    match words:
        case {"ask": "info"}:
            return _fields_of(engine.info())
        case {"ask": "stats"}:
            return _fields_of(engine.stats())
        case {"ask": "overview", "max_cells": int(max_cells)}:
            return _fields_of(await asyncio.to_thread(engine.overview, max_cells))
        case _:
            return {}


def gone() -> UnavailableError:
    """What is said of an engine that is not there."""
    return UnavailableError("engine: it is gone and starts anew, without any sequence", Reason.UNREACHABLE)


def _fields_of(report: Info | Stats | CacheOverview) -> Words:
    return {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}


def info_of(words: Words) -> Info:
    """The info that such an object stands for."""
    return Info(
        spec=IndexSpec(**words["spec"]),
        limits=Limits(**words["limits"]),
        cache=CacheUsage(**words["cache"]),
        epoch=words["epoch"],
        device=words["device"],
        device_name=words["device_name"],
        kernels={phase: (kernel, reason) for phase, (kernel, reason) in words["kernels"].items()},
    )


def stats_of(words: Words) -> Stats:
    """The stats that such an object stands for."""
    stats = Stats(**words)
    stats.stage_seconds = {phase: _histograms_of(stages) for phase, stages in words["stage_seconds"].items()}
    stats.batch_requests = histogram_of(words["batch_requests"])
    stats.launch_requests = _histograms_of(words["launch_requests"])
    stats.batch_tokens = _histograms_of(words["batch_tokens"])
    return stats


def _histograms_of(words: Words) -> dict[str, Histogram]:
    return {name: histogram_of(histogram) for name, histogram in words.items()}


def histogram_of(words: Words) -> Histogram:
    """The histogram that such an object stands for."""
    return Histogram(tuple(words["bounds"]), words["counts"], words["total"])


def overview_of(words: Words) -> CacheOverview:
    """The overview that such an object stands for."""
    counts = {name: np.array(words[name], np.int64) for name in ("private", "shared", "idle", "lengths")}
    return CacheOverview(**words | counts | {"length_bounds": tuple(words["length_bounds"])})
