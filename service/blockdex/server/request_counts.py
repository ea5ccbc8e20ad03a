"""The requests that several frontends answered, those that have ended included, as one server's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from blockdex.contract.errors import UnavailableError
from blockdex.contract.stats import SECONDS_BUCKETS, Histogram
from blockdex.frontend.http.metrics import RequestMetrics
from blockdex.ring.control_channel import Words
from blockdex.server.child_process import Child

if TYPE_CHECKING:
    from blockdex.ring.client import RingChannel

_ANSWER_SECONDS = 1.0


def words_of(requests: RequestMetrics) -> Words:
    """Counts as an object of JSON; RPCs that nobody has called are left out."""
    return {
        "counts": [[*key, count] for key, count in requests.counts.items() if count],
        "seconds": {rpc: [made.counts, made.total] for rpc, made in requests.seconds.items() if any(made.counts)},
        "streams": [requests.streams, requests.streams_opened],
        "bytes": [requests.bytes_received, requests.bytes_sent],
    }


def requests_of(words: Words) -> RequestMetrics:
    """The counts that such an object stands for."""
    requests = RequestMetrics()
    requests.counts = {(rpc, code, reason): count for rpc, code, reason, count in words["counts"]}
    requests.seconds = {
        rpc: Histogram(SECONDS_BUCKETS, counts, total) for rpc, (counts, total) in words["seconds"].items()
    }
    requests.streams, requests.streams_opened = words["streams"]
    requests.bytes_received, requests.bytes_sent = words["bytes"]
    return requests


class OwnCounts(RequestMetrics):
    """`RequestCounts` of the frontend in this process.

    Attributes:
        channel: what its requests go over; None before it is there.
    """

    channel: RingChannel | None = None

    async def refresh(self) -> None:
        """As `RequestCounts.refresh`."""
        if self.channel is not None:
            self.channel.tell_times()


class FleetCounts:
    """`RequestCounts` of all frontends; used on one asyncio loop.

    Args:
        frontends: the frontends that run.

    Attributes:
        total: of those that run and those that have ended.
    """

    def __init__(self, frontends: Callable[[], Iterable[Child]]) -> None:
        self._frontends = frontends
        self._last: dict[Child, RequestMetrics] = {}
        self._ended = RequestMetrics()
        self.total = RequestMetrics()

    async def refresh(self) -> None:
        """Asks every frontend; of one that does not answer soon, what it said last counts."""
        await asyncio.gather(*map(self._ask, self._frontends()))
        total = RequestMetrics()
        for requests in (self._ended, *self._last.values()):
            total.add(requests)
        self.total = total

    def has_ended(self, frontend: Child) -> None:
        """Keeps what a frontend said last: counters do not go back."""
        if last := self._last.pop(frontend, None):
            last.streams = 0
            self._ended.add(last)

    async def _ask(self, frontend: Child) -> None:
        with contextlib.suppress(UnavailableError, TimeoutError):
            words = await asyncio.wait_for(frontend.control.ask({"ask": "requests"}), _ANSWER_SECONDS)
            if not frontend.ended.done():
                self._last[frontend] = requests_of(words)
