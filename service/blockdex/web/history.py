"""The last minute, second by second: what the page draws, and what tells of evictions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from copy import deepcopy
from dataclasses import dataclass

from blockdex.engine.stats import Histogram, Stats
from blockdex.logs import log_event
from blockdex.messages import CacheUsage
from blockdex.transport.channel import Channel
from blockdex.web.metrics import RequestMetrics

WINDOW_SECONDS = 60

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """All counters at one moment.

    Attributes:
        at: `time.monotonic` seconds.
        stats: the engine's.
        requests: requests answered, by RPC and code.
        request_seconds: their time, by RPC.
        cache: state of the cache.
        epoch: the cache's.
        stage_p99: 99th percentile in seconds of each stage since the sample before; None where nothing was timed.
    """

    at: float
    stats: Stats
    requests: dict[tuple[str, str], int]
    request_seconds: dict[str, Histogram]
    cache: CacheUsage
    epoch: int
    stage_p99: dict[str, float | None]


class History:
    """A sample a second, for a minute; made and used on one asyncio loop.

    Attributes:
        samples: oldest first, never empty.
    """

    def __init__(self, channel: Channel, requests: RequestMetrics) -> None:
        self._channel = channel
        self._requests = requests
        self.samples: deque[Sample] = deque(maxlen=WINDOW_SECONDS + 1)
        self.take()

    async def run(self) -> None:
        """Takes a sample each second, until it is cancelled; tells of evictions, in one line a second at most."""
        while True:
            await asyncio.sleep(1)
            before, now = self.samples[-1], self.take()
            if now.epoch == before.epoch and now.cache.evictions > before.cache.evictions:
                _log_evictions(before.cache, now.cache)

    def take(self) -> Sample:
        """Adds what is counted now."""
        info, stats = self._channel.info(), self._channel.stats()
        before = self.samples[-1].stats if self.samples else stats
        sample = Sample(
            at=time.monotonic(),
            stats=stats,
            requests=dict(self._requests.counts),
            request_seconds=deepcopy(self._requests.seconds),
            cache=info.cache,
            epoch=info.epoch,
            stage_p99={
                stage: seconds.since(before.stage_seconds[stage]).quantile(0.99)
                for stage, seconds in stats.stage_seconds.items()
            },
        )
        self.samples.append(sample)
        return sample


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
