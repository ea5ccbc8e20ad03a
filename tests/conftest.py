"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving import Serving, serve


@pytest.fixture(scope="session")
def server() -> Iterator[Serving]:
    """One small CPU server for all tests; each of them uses a tenant or sequence ids of its own."""
    with serve() as serving:
        yield serving
