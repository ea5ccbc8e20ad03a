"""Servers that make up clusters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from support.clusters import MEMBER
from support.serving import Serving, serve


@pytest.fixture(scope="package")
def servers() -> Iterator[list[Serving]]:
    """Three small servers, which no test ends."""
    with ExitStack() as stack:
        yield [stack.enter_context(serve(*MEMBER)) for _ in range(3)]
