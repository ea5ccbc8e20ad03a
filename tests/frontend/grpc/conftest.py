"""Servers and tenants for the RPC tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.serving import SMALL, Serving, serve
from support.wire import Wire, wire

TIGHT = (
    *("--num-layers", "3", "--device", "cpu", "--cache-bytes", "400KiB"),
    *("--max-message-bytes", "64KiB", "--max-spans", "8"),
    *("--max-queued-requests", "6", "--max-stream-requests", "4"),
)
"""Flags of a server that soon has enough: 4 pages, 64 KiB a message, 8 spans, 6 requests queued, 4 a stream."""


@pytest.fixture(scope="session", params=["single", "split"])
def server(server: Serving, request: pytest.FixtureRequest) -> Iterator[Serving]:
    """The small server, and one of several processes, which looks for work before it sleeps; both answer alike."""
    if request.param == "single":
        yield server
    else:
        with serve(*SMALL, "--processes", "split", "--spin-seconds", "0.001") as serving:
            yield serving


@pytest.fixture(scope="session", params=["single", "split"])
def tight_server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """One server with narrow limits, as one process and as several."""
    with serve(*TIGHT, "--processes", request.param) as serving:
        yield serving


@pytest.fixture
def tight(tight_server: Serving, request: pytest.FixtureRequest) -> Iterator[Wire]:
    """A tenant of its own on the server with narrow limits."""
    with wire(tight_server.grpc_address, request.node.name) as connection:
        yield connection


@pytest.fixture
def tenant(server: Serving, request: pytest.FixtureRequest) -> Iterator[Wire]:
    """A tenant of its own on the small server."""
    with wire(server.grpc_address, request.node.name) as connection:
        yield connection
