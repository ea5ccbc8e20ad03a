"""The last minute, second by second: what the page draws, and what tells of evictions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass

from blockdex.contract.errors import UnavailableError
from blockdex.contract.messages import CacheUsage, Info
from blockdex.contract.stats import Histogram, Stats
from blockdex.frontend.http.metrics import RequestCounts
from blockdex.logs import log_event
from blockdex.ring.engine_reports import Reports

WINDOW_SECONDS = 60

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """All counters at one moment.

    Attributes:
        at: `time.monotonic` seconds.
        stats: the engine's.
        requests: requests answered, by RPC, code and reason.
        request_seconds: their time, by RPC.
        info: what the engine is and holds.
        stage_p99: 99th percentile in seconds of each phase's stages (`stages_of`) since the sample before; None where
            nothing was timed.
    """

    at: float
    stats: Stats
    requests: dict[tuple[str, str, str], int]
    request_seconds: dict[str, Histogram]
    info: Info
    stage_p99: dict[str, float | None]


class History:
    """A sample a second, for a minute; made and used on one asyncio loop.

    Attributes:
        samples: oldest first; not empty once one was taken.
    """

    def __init__(self, reports: Reports, requests: RequestCounts) -> None:
        self._reports = reports
        self._requests = requests
        self.samples: deque[Sample] = deque(maxlen=WINDOW_SECONDS + 1)

    async def run(self) -> None:
        """Takes a sample each second, until it is cancelled; tells of evictions, in one line a second at most."""
        while True:
            await asyncio.sleep(1)
            before = self.samples[-1].info
            # Without an engine there is nothing to count.
            with contextlib.suppress(UnavailableError):
                now = (await self.take()).info
                if now.epoch == before.epoch and now.cache.evictions > before.cache.evictions:
                    _log_evictions(before.cache, now.cache)

    async def take(self) -> Sample:
        """Adds what is counted now.

        Raises:
            UnavailableError: the engine is gone.
        """
        info, stats = await asyncio.gather(self._reports.info(), self._reports.stats())
        await self._requests.refresh()
        made = self._requests.total
        if self.samples and self.samples[-1].stats.started != stats.started:
            # Another process counts, from 0.
            self.samples.clear()
        before = stages_of(self.samples[-1].stats if self.samples else stats)
        sample = Sample(
            at=time.monotonic(),
            stats=stats,
            requests=dict(made.counts),
            request_seconds={rpc: seconds.copy() for rpc, seconds in made.seconds.items()},
            info=info,
            stage_p99={name: seconds.since(before[name]).quantile(0.99) for name, seconds in stages_of(stats).items()},
        )
        self.samples.append(sample)
        return sample


def stages_of(stats: Stats) -> dict[str, Histogram]:
    """The time of requests in each stage, by phase and stage: `decode queue`."""
    return {
        f"{phase} {stage}": seconds
        for phase, stages in stats.stage_seconds.items()
        for stage, seconds in stages.items()
    }


def _log_evictions(before: CacheUsage, now: CacheUsage) -> None:
    log_event(
        logger,
        logging.WARNING,
        "evicted",
        sequences=now.evictions - before.evictions,
        open_sequences=now.sequences,
        free_pages=now.pages_total - now.pages_used,
        total_pages=now.pages_total,
    )
