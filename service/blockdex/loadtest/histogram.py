"""Durations counted in buckets of equal ratio: any number of them in little memory, mergeable, of known error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_RATIO = 1.01
_BUCKETS_PER_E = 1 / math.log(_RATIO)
_SHORTEST = 1e-9

RELATIVE_ERROR = math.sqrt(_RATIO) - 1
"""A percentile differs by at most this share of it from the one of the durations themselves: 0.5 %."""


@dataclass(slots=True)
class Histogram:
    """Durations in seconds.

    Attributes:
        buckets: number of durations by bucket; bucket i holds those from 1.01^i to below 1.01^(i + 1) seconds.
        count: number of durations.
        total: their sum.
        largest: the longest, exactly; 0 where there is none.
    """

    buckets: dict[int, int] = field(default_factory=dict)
    count: int = 0
    total: float = 0.0
    largest: float = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one duration; one of less than a nanosecond counts as that."""
        bucket = math.floor(math.log(max(seconds, _SHORTEST)) * _BUCKETS_PER_E)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1
        self.total += seconds
        self.largest = max(self.largest, seconds)

    def merge(self, other: Histogram) -> None:
        """Counts everything that another histogram has counted."""
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.count += other.count
        self.total += other.total
        self.largest = max(self.largest, other.largest)

    def percentile(self, percent: float) -> float | None:
        """The shortest duration that at least `percent` % of all do not exceed; None where there is none."""
        if not self.count:
            return None
        rank = max(1, math.ceil(percent / 100 * self.count))
        if rank == self.count:
            return self.largest
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= rank:
                break
        return min(float(_RATIO ** (bucket + 0.5)), self.largest)

    @property
    def mean(self) -> float | None:
        """Their mean, exactly; None where there is none."""
        return self.total / self.count if self.count else None
