"""Cores without an engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.bare_core import ALL, BareCore, bare_core


@pytest.fixture
def bare() -> Iterator[BareCore]:
    """A core that runs its steps at once."""
    with bare_core() as made:
        yield made


@pytest.fixture
def device_core() -> Iterator[BareCore]:
    """A core whose steps are on their way until the test ends them."""
    with bare_core(replays=ALL) as made:
        yield made
