"""What the engine counts and times: plain numbers that a front door turns into metrics."""

from __future__ import annotations

import time
from bisect import bisect_left
from copy import deepcopy
from dataclasses import dataclass, field

SECONDS_BUCKETS = (
    *(step / 1e6 for step in (10, 25, 50, 100, 250, 500)),
    *(step / 1e3 for step in (1, 2.5, 5, 10, 25, 50, 100, 250, 500)),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
SIZE_BUCKETS = tuple(float(2**power) for power in range(15))


@dataclass(slots=True)
class Histogram:
    """Counts of observations by bucket: `counts[i]` were at most `bounds[i]`, the last one above them all."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        if not self.counts:
            self.counts = [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        """Observations in all."""
        return sum(self.counts)

    def observe(self, value: float) -> None:
        """Counts one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, other: Histogram) -> None:
        """Counts the observations of another one, of the same bounds, too."""
        self.counts = [own + others for own, others in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def since(self, earlier: Histogram) -> Histogram:
        """What was observed after an earlier state of this histogram."""
        counts = [now - then for now, then in zip(self.counts, earlier.counts, strict=True)]
        return Histogram(self.bounds, counts, self.total - earlier.total)

    def quantile(self, share: float) -> float | None:
        """The value that a share of the observations, 0 to 1, do not exceed; None without any.

        Interpolated evenly within its bucket, as PromQL's `histogram_quantile` does; above the last bound, that bound.
        """
        rank, below = share * self.count, 0
        if not self.count:
            return None
        for lower, upper, count in zip((0.0, *self.bounds), self.bounds, self.counts, strict=False):
            if count and below + count >= rank:
                return lower + (upper - lower) * (rank - below) / count
            below += count
        return self.bounds[-1]


def _seconds() -> Histogram:
    return Histogram(SECONDS_BUCKETS)


def _sizes() -> Histogram:
    return Histogram(SIZE_BUCKETS)


@dataclass(slots=True)
class Stats:
    """Written by the engine's thread alone; readers get a copy (`snapshot`).

    Attributes:
        stage_seconds: per stage of a request or a batch (`queue`: arrival until taken up; `plan`: checking and forming
            one batch; `append`, `decode`, `prefill`: kernels of one batch; `reply`: handing one batch's answers over).
        batch_requests: requests of one batch.
        batch_tokens: tokens of one launch, by phase.
        tokens: tokens in all, by phase (`append`, `decode`, `prefill`).
        batches: batches run.
        dropped: requests that were never worked on, by why (`cancelled`, `deadline`).
        busy_seconds: time in which the engine was not waiting for work.
        started: Unix seconds at which counting began: with the engine's process, or before.
        epoch_started: Unix seconds at which the cache was born.
        waiting: selections that wait for keys now.
        queued: requests taken over and not yet begun, now.
    """

    stage_seconds: dict[str, Histogram] = field(
        default_factory=lambda: {name: _seconds() for name in ("queue", "plan", "append", "decode", "prefill", "reply")}
    )
    batch_requests: Histogram = field(default_factory=_sizes)
    batch_tokens: dict[str, Histogram] = field(
        default_factory=lambda: {name: _sizes() for name in ("append", "decode", "prefill")}
    )
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("append", "decode", "prefill"), 0))
    batches: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("cancelled", "deadline"), 0))
    busy_seconds: float = 0.0
    started: float = field(default_factory=time.time)
    epoch_started: float = 0.0
    waiting: int = 0
    queued: int = 0

    def snapshot(self) -> Stats:
        """A copy that no longer changes."""
        return deepcopy(self)
