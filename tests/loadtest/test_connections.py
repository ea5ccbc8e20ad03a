"""Each client has a connection of its own, so that several frontends share clients, those of one process too."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from blockdex.client import AsyncClient, Client
from support.serving import SMALL, Serving, serve

_CLIENTS = 32
_ESTABLISHED = "01"


@pytest.fixture(scope="module")
def split() -> Iterator[Serving]:
    """A server with two frontends behind one port."""
    with serve(*SMALL, "--frontends", "2") as serving:
        yield serving


def connections(serving: Serving) -> Counter[int]:
    """Connections to the server's gRPC port, by the process that took them."""
    port = int(serving.grpc_address.rpartition(":")[2])
    inodes = {
        fields[9]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text("ascii").splitlines()[1:]
        if (fields := line.split())[3] == _ESTABLISHED and int(fields[1].partition(":")[2], 16) == port
    }
    counted: Counter[int] = Counter()
    for pid in serving.pids():
        links = (str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir())
        counted[pid] = sum(match[1] in inodes for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link)))
    return +counted


def with_clients(split: Serving) -> Counter[int]:
    with ExitStack() as stack:
        for _ in range(_CLIENTS):
            stack.enter_context(Client(split.grpc_address)).info()
        return connections(split)


async def with_async_clients(split: Serving) -> Counter[int]:
    async with AsyncExitStack() as stack:
        for _ in range(_CLIENTS):
            client = await stack.enter_async_context(AsyncClient(split.grpc_address))
            await client.info()
        return connections(split)


@pytest.mark.parametrize("kind", ["clients", "async clients"])
def test_two_frontends_share_the_clients_of_a_process(split: Serving, kind: str) -> None:
    shares = with_clients(split) if kind == "clients" else asyncio.run(with_async_clients(split))
    assert shares.total() == _CLIENTS
    # The kernel draws the frontend of each; that one gets fewer than 4 of 32 happens once in 390,000 times.
    assert len(shares) == 2
    assert min(shares.values()) >= 4
