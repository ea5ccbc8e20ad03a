"""Fixtures of the client tests: clients of every flavour, and a second server with small limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import blockdex
from support.clients import FLAVOURS, Flavour, connect, new_sequence
from support.serving import SMALL, Serving, serve
from support.tcp_proxy import TcpProxy, proxy_to


@pytest.fixture(scope="session")
def small_server() -> Iterator[Serving]:
    """A server that takes 4 spans and 64 KiB of tensors a request."""
    with serve(*SMALL, "--max-spans", "4", "--max-message-bytes", "64KiB") as serving:
        yield serving


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    """Each client with each transport."""
    return FLAVOURS[request.param]


@pytest.fixture
def client(flavour: Flavour, server: Serving) -> Iterator[blockdex.Client]:
    """A client of the server, in each flavour."""
    with connect(flavour, server.grpc_address) as client:
        yield client


@pytest.fixture
def sequence(client: blockdex.Client) -> Iterator[int]:
    """An empty sequence that `client` opened."""
    sequence = new_sequence()
    client.open_sequence(sequence)
    yield sequence
    client.close_sequence(sequence)


@pytest.fixture
def other(server: Serving) -> Iterator[blockdex.Client]:
    """A client that opened nothing itself, and whose way to the server nothing disturbs."""
    with blockdex.Client(server.grpc_address) as other:
        yield other


@pytest.fixture
def proxy(server: Serving) -> Iterator[TcpProxy]:
    """A way to the server that can be disturbed."""
    with proxy_to(server.grpc_address) as proxy:
        yield proxy


@pytest.fixture
def counted(server: Serving) -> Callable[..., int]:
    """How far a counter of the server has moved since the test began."""
    before = _counters(server)

    def since(name: str, **labels: str) -> int:
        key = (name, tuple(sorted(labels.items())))
        return int(_counters(server).get(key, 0) - before.get(key, 0))

    return since


def _counters(server: Serving) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = httpx.get(f"http://{server.http_address}/metrics", timeout=30).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
