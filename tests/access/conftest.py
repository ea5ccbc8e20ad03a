"""A server with TLS that knows callers by tokens, once as one process and once as several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.credentials import Guarded, Papers, tls_flags
from support.serving import SMALL, serve


@pytest.fixture(scope="module", params=["single", "split"])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The server; tests that change its files put them back."""
    papers = Papers(Path(tmp_path_factory.mktemp("papers")))
    with serve(*SMALL, "--processes", request.param, *tls_flags(papers)) as serving:
        yield Guarded(papers, serving)
