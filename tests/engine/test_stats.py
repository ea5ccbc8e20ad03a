"""Histograms: their quantiles, and what was observed since."""

from __future__ import annotations

import pytest

from blockdex.engine.stats import Histogram


def observed(*values: float) -> Histogram:
    histogram = Histogram((1.0, 2.0, 4.0))
    for value in values:
        histogram.observe(value)
    return histogram


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ((), 0.5, None),
        ((0.7,), 0.5, 0.5),  # half of the first bucket, which begins at 0
        ((0.7,), 1.0, 1.0),
        ((1.5, 1.5, 3.0, 3.0), 0.5, 2.0),
        ((1.5, 1.5, 3.0, 3.0), 0.75, 3.0),
        ((1.5, 1.5, 3.0, 3.0), 0.25, 1.5),
        ((0.5, 3.0), 0.99, 2.0 + 2.0 * 0.98),  # the empty bucket between them is passed over
        ((9.0,), 0.5, 4.0),  # above the last bound: that bound
        ((0.5, 9.0, 9.0), 0.99, 4.0),
        ((1.0, 2.0, 4.0), 1.0, 4.0),  # a bound belongs to the bucket below it
    ],
)
def test_quantiles_are_interpolated_inside_their_bucket(
    values: tuple[float, ...], share: float, expected: float | None
) -> None:
    assert observed(*values).quantile(share) == (None if expected is None else pytest.approx(expected))


def test_what_was_observed_since() -> None:
    histogram = observed(0.5, 3.0)
    earlier = observed(0.5, 3.0)
    for value in (1.5, 9.0):
        histogram.observe(value)
    since = histogram.since(earlier)
    assert (since.counts, since.total, since.count) == ([0, 1, 0, 1], 10.5, 2)
    assert histogram.since(histogram).quantile(0.5) is None
