"""Durations in buckets of equal ratio."""

from __future__ import annotations

import numpy as np
import pytest

from blockdex.loadtest.histogram import RELATIVE_ERROR, Histogram


def counted(durations: list[float]) -> Histogram:
    histogram = Histogram()
    for seconds in durations:
        histogram.observe(seconds)
    return histogram


@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 99.9, 100])
def test_percentiles_are_within_the_stated_error(percent: float) -> None:
    durations = np.random.default_rng(1).lognormal(-6, 2, 10_000)
    exact = float(np.percentile(durations, percent, method="inverted_cdf"))
    assert counted(durations.tolist()).percentile(percent) == pytest.approx(exact, rel=RELATIVE_ERROR * 1.0001)


def test_mean_and_largest_are_exact() -> None:
    histogram = counted([0.001, 0.002, 0.006])
    assert histogram.mean == pytest.approx(0.003)
    assert histogram.largest == histogram.percentile(100) == 0.006


def test_merging_is_counting_together() -> None:
    durations = np.random.default_rng(2).exponential(0.01, 1000).tolist()
    merged = counted(durations[:300])
    merged.merge(counted(durations[300:]))
    together = counted(durations)
    assert merged.buckets == together.buckets
    assert (merged.count, merged.largest) == (together.count, together.largest)
    assert merged.total == pytest.approx(together.total)


def test_nothing_has_no_percentile() -> None:
    assert (Histogram().percentile(50), Histogram().mean) == (None, None)


def test_no_duration_is_too_short() -> None:
    assert counted([0.0]).percentile(50) == 0.0
