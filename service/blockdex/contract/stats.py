"""What the engine counts and times: plain numbers that a frontend turns into metrics."""

from __future__ import annotations

import dataclasses
import time
from bisect import bisect_left
from dataclasses import dataclass, field

from blockdex.contract.messages import KERNEL_PHASES, PHASES, STAGES, PhaseTotals, Totals

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

    def copy(self) -> Histogram:
        """The same, no longer changing with this one."""
        return Histogram(self.bounds, self.counts.copy(), self.total)

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


@dataclass(slots=True)
class LinkStats:
    """What clients on the server's host do, whose calls no frontend sees.

    Attributes:
        seconds: by call (`Ring/AppendKeys`, of a device channel `Channel/AppendKeys`), from its arrival to its answer.
        outcomes: call, name of the canonical code or `OK`, reason, and how often.
        open: links that are open.
        opened: links opened.
        turned_away: links that were refused.
        channels: device channels that are open.
        regions: that are shared.
        region_bytes: of them all.
    """

    seconds: dict[str, Histogram] = field(default_factory=dict)
    outcomes: list[tuple[str, str, str, int]] = field(default_factory=list)
    open: int = 0
    opened: int = 0
    turned_away: int = 0
    channels: int = 0
    regions: int = 0
    region_bytes: int = 0


def _sizes() -> Histogram:
    return Histogram(SIZE_BUCKETS)


@dataclass(slots=True)
class Stats:
    """Written by the engine's thread alone; readers get a copy (`snapshot`).

    Attributes:
        stage_seconds: by phase and stage, time of one request, one behind the other from its arrival to its answer.
        batch_requests: requests of one batch.
        launch_requests: requests of one launch, by phase (`append`, `decode`, `prefill`; so below).
        batch_tokens: tokens of one launch, by phase.
        tokens: tokens in all, by phase.
        device_seconds: time of launches on the device, by phase, those that overlap counted each.
        device_busy_seconds: time in which at least one launch was on the device.
        batches: batches run.
        dropped: requests that were never worked on, by why (`cancelled`, `deadline`).
        busy_seconds: time in which the engine's thread was not waiting for work.
        started: Unix seconds at which counting began: with the engine's process, or before.
        epoch_started: Unix seconds at which the cache was born.
        waiting: selections that wait for keys now.
        queued: requests taken over and not yet begun, now.
        integrity_checks: times that an idle core has checked all of the cache's columns against each other.
        integrity_faults: contradictions that it found.
        faults: batches that failed, each of which ended an epoch.
        links: what clients on the server's host do.
    """

    stage_seconds: dict[str, dict[str, Histogram]] = field(
        default_factory=lambda: {phase: {stage: Histogram(SECONDS_BUCKETS) for stage in STAGES} for phase in PHASES}
    )
    batch_requests: Histogram = field(default_factory=_sizes)
    launch_requests: dict[str, Histogram] = field(default_factory=lambda: {phase: _sizes() for phase in KERNEL_PHASES})
    batch_tokens: dict[str, Histogram] = field(default_factory=lambda: {phase: _sizes() for phase in KERNEL_PHASES})
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KERNEL_PHASES, 0))
    device_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KERNEL_PHASES, 0.0))
    device_busy_seconds: float = 0.0
    batches: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("cancelled", "deadline"), 0))
    busy_seconds: float = 0.0
    started: float = field(default_factory=time.time)
    epoch_started: float = 0.0
    waiting: int = 0
    queued: int = 0
    integrity_checks: int = 0
    integrity_faults: int = 0
    faults: int = 0
    links: LinkStats = field(default_factory=LinkStats)

    def launched(self, phase: str, tokens: int, requests: int) -> None:
        """Counts one launch.

        Args:
            phase: `append`, `decode` or `prefill`.
            tokens: rows of its packed tensor.
            requests: whose they are.
        """
        self.launch_requests[phase].observe(requests)
        self.batch_tokens[phase].observe(tokens)
        self.tokens[phase] += tokens

    def totals(self) -> Totals:
        """What it all came to; from any thread."""
        return Totals(
            requests=round(self.batch_requests.total),
            batches=self.batches,
            phases={
                phase: PhaseTotals(
                    requests=stages["queue"].count,
                    tokens=self.tokens.get(phase, 0),
                    device_seconds=self.device_seconds.get(phase, 0.0),
                    stage_seconds={stage: seconds.total for stage, seconds in stages.items()},
                )
                for phase, stages in self.stage_seconds.items()
            },
            dropped=self.dropped.copy(),
            busy_seconds=self.busy_seconds,
            device_busy_seconds=self.device_busy_seconds,
            uptime_seconds=time.time() - self.started,
        )

    def snapshot(self) -> Stats:
        """A copy that no longer changes."""
        return dataclasses.replace(
            self,
            stage_seconds={phase: _copies(stages) for phase, stages in self.stage_seconds.items()},
            batch_requests=self.batch_requests.copy(),
            launch_requests=_copies(self.launch_requests),
            batch_tokens=_copies(self.batch_tokens),
            tokens=self.tokens.copy(),
            device_seconds=self.device_seconds.copy(),
            dropped=self.dropped.copy(),
        )


def _copies(histograms: dict[str, Histogram]) -> dict[str, Histogram]:
    return {name: histogram.copy() for name, histogram in histograms.items()}
