"""What the engine says of itself to another process, between plain data and JSON."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np

from blockdex.contract.errors import Reason, UnavailableError
from blockdex.contract.messages import CacheOverview, CacheUsage, Info, Limits
from blockdex.contract.stats import Histogram, LinkStats, Stats
from blockdex.logs import log_fault
from blockdex.ring.control_channel import ControlChannel, Words
from blockdex.ring.regions import Offer, Region
from blockdex_kernels import IndexSpec

logger = logging.getLogger(__name__)

_Report = TypeVar("_Report")


class Engine(Protocol):
    """What an engine says of itself, from any thread."""

    def info(self) -> Info:
        """What it is, holds and can do, now."""
        ...

    def overview(self, max_cells: int) -> CacheOverview:
        """What pages and sequences are like, now, the pages in `max_cells` cells at most."""
        ...

    def stats(self) -> Stats:
        """What it counted and timed since it started."""
        ...

    def open_region(self, offer: Offer) -> Region:
        """Opens memory that a client shares: see `LinkRegions`."""
        ...


class Reports(Protocol):
    """The same, asked on an asyncio loop, which no call blocks."""

    async def info(self) -> Info:
        """As `Engine.info`.

        Raises:
            UnavailableError: the engine is gone, or cannot be understood (UNREACHABLE); so do the other two.
        """
        ...

    async def overview(self, max_cells: int) -> CacheOverview:
        """As `Engine.overview`."""
        ...

    async def stats(self) -> Stats:
        """As `Engine.stats`."""
        ...


class RemoteReports:
    """`Reports` over a control channel; used on one asyncio loop.

    Args:
        control: the control channel to who holds the engine, if they are there.
    """

    def __init__(self, control: Callable[[], ControlChannel | None]) -> None:
        self._control_of = control

    async def info(self) -> Info:
        """As `Reports.info`."""
        return await self._ask(info_of, "info")

    async def stats(self) -> Stats:
        """As `Reports.stats`."""
        return await self._ask(stats_of, "stats")

    async def overview(self, max_cells: int) -> CacheOverview:
        """As `Reports.overview`."""
        return await self._ask(overview_of, "overview", max_cells=max_cells)

    async def _ask(self, read: Callable[[Words], _Report], what: str, **arguments: int) -> _Report:
        control = self._control_of()
        if control is None:
            raise gone()
        words = await control.ask({"ask": what, **arguments})
        try:
            return read(words)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as fault:
            message = f"engine: its report of {what} cannot be read ({type(fault).__name__}: {fault})"
            raise UnavailableError(message, Reason.UNREACHABLE) from None


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
        case {"ask": "overview", "max_cells": int(max_cells)} if max_cells > 0:
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
        socket=words["socket"],
        region_kinds=tuple(words["region_kinds"]),
    )


def stats_of(words: Words) -> Stats:
    """The stats that such an object stands for."""
    stats = Stats(**words)
    stats.stage_seconds = {phase: _histograms_of(stages) for phase, stages in words["stage_seconds"].items()}
    stats.batch_requests = histogram_of(words["batch_requests"])
    stats.launch_requests = _histograms_of(words["launch_requests"])
    stats.batch_tokens = _histograms_of(words["batch_tokens"])
    stats.links = LinkStats(**words["links"])
    stats.links.seconds = _histograms_of(words["links"]["seconds"])
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
