"""Lanes without an engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bare_lane import ALL, BareLane, bare_lane


@pytest.fixture
def bare() -> Iterator[BareLane]:
    """A lane that runs its steps at once."""
    with bare_lane() as made:
        yield made


@pytest.fixture
def device_lane() -> Iterator[BareLane]:
    """A lane whose steps are on their way until the test ends them."""
    with bare_lane(replays=ALL) as made:
        yield made
