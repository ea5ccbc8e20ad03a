"""Clients over rings: which way `connect` takes and why, and what becomes of calls when a server or a client ends."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blockdex
from blockdex import DeadlineExceededError, UnavailableError
from blockdex.client import ring
from blockdex.client.core import Core
from blockdex.client.endpoint import Endpoint
from support.clients import FLAVOURS, connect, new_sequence
from support.serving import SMALL, Serving, serve
from support.tcp_proxy import proxy_to

KEYS = np.ones((2, 128), np.float32)
QUERIES = np.ones((1, 4, 128), np.float32)
RINGS = [name for name, flavour in FLAVOURS.items() if flavour.transport == "ring"]


@pytest.fixture(params=RINGS)
def client(request: pytest.FixtureRequest, server: Serving) -> Iterator[blockdex.Client]:
    with connect(FLAVOURS[request.param], server.grpc_address, timeout=20) as client:
        yield client


def wait_for(client: blockdex.Client, sequence: int, timeout: float | None = None) -> Any:
    """A selection whose keys do not come."""
    return client.select_blocks(
        0, sequences=sequence, queries=QUERIES, starts=0, revisions=5, wait_for_keys=True, timeout=timeout
    )


# --- connect ---


def test_connect_takes_the_ring(server: Serving) -> None:
    with blockdex.connect(server.grpc_address) as client:
        assert (client.transport, client.why) == ("ring", "")
        sequence = new_sequence()
        client.open_sequence(sequence)
        block_ids = client.append_and_select(0, sequences=sequence, keys=KEYS, queries=np.repeat(QUERIES, 2, axis=0))
        assert block_ids[:, :, 0].tolist() == [[0] * 4] * 2
        client.close_sequence(sequence)


def test_connect_takes_the_ring_for_asyncio_too(server: Serving) -> None:
    async def use() -> tuple[str, str]:
        async with await blockdex.connect_async(server.grpc_address) as client:
            await client.close_sequence(new_sequence())
            return client.transport, client.why

    assert asyncio.run(use()) == ("ring", "")


def test_connect_takes_the_stream_where_there_is_no_ring_and_says_why(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core(Endpoint(server.grpc_address), None, 5.0)
    with blockdex.Client(server.grpc_address) as client:
        info = client.info()

    def why(**change: Any) -> str:
        return ring.obstacle(core, dataclasses.replace(info, **change), 5.0)

    assert why() == ""
    assert why(transports=("grpc",)) == "the server offers no ring: it was started without --socket"
    assert "cannot connect to /no/such/ring" in why(transports=("ring:/no/such/ring",))
    assert f"another server listens on {server.socket}" in why(epoch=3)
    monkeypatch.setattr(ring, "SUPPORTED", False)
    assert why().startswith("this install has no compiled module")
    with blockdex.connect(server.grpc_address) as client:
        assert (client.transport, client.why) == ("stream", why())


def test_connect_finds_out_whether_channels_work(server: Serving) -> None:
    with blockdex.connect(server.grpc_address, tenant="channels", device="cpu") as client:
        assert (client.transport, client.channel_device, client.why) == ("ring", "cpu", "")
        client.device_channel(device="cpu").close()
    with blockdex.connect(server.grpc_address, tenant="channels", device="cuda:99") as client:
        assert (client.transport, client.channel_device) == ("ring", None)
        assert client.why.startswith("no device channel from cuda:99: ")


def test_connect_finds_it_out_for_asyncio_too(server: Serving) -> None:
    async def use() -> tuple[str | None, str]:
        async with await blockdex.connect_async(server.grpc_address, tenant="channels", device="cpu") as client:
            return client.channel_device, client.why

    assert asyncio.run(use()) == ("cpu", "")


# --- Ends ---


def test_a_deadline_leaves_the_link_as_it_is(client: blockdex.Client) -> None:
    sequence = new_sequence()
    client.open_sequence(sequence)
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        wait_for(client, sequence, timeout=0.2)
    assert 0.1 < time.monotonic() - began < 5
    client.append_keys(0, sequences=sequence, keys=KEYS, revisions=5)
    assert wait_for(client, sequence).shape == (1, 4, 16)
    client.close_sequence(sequence)


@pytest.mark.parametrize("timeout", [1e10, 1.7e308])
def test_a_timeout_may_be_longer_than_anybody_can_wait(client: blockdex.Client, timeout: float) -> None:
    client.open_sequence(new_sequence(), timeout=timeout)


def test_closing_ends_what_is_in_flight(server: Serving) -> None:
    client = blockdex.Client(server.grpc_address, transport="ring")
    sequence = new_sequence()
    client.open_sequence(sequence)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for, client, sequence)
        time.sleep(0.2)
        client.close()
        with pytest.raises(blockdex.CancelledError):
            waiting.result(timeout=10)
    with pytest.raises(blockdex.CancelledError):
        client.close_sequence(sequence)


@pytest.mark.parametrize("name", RINGS)
def test_a_server_that_is_killed_ends_the_call(name: str) -> None:
    with serve(*SMALL, "--processes=single") as serving, connect(FLAVOURS[name], serving.grpc_address) as client:
        client.open_sequence(1)
        killing = threading.Timer(0.3, serving.process.send_signal, (signal.SIGKILL,))
        killing.start()
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            client.append_keys(0, sequences=1, keys=KEYS, starts=0)
            client.truncate_sequence(1, 1)
            while True:
                client.append_keys(0, sequences=1, keys=KEYS)
        assert time.monotonic() - began < 10
        killing.join()
        serving.wait()


def test_threads_share_a_client(server: Serving) -> None:
    with blockdex.Client(server.grpc_address, transport="ring") as client:
        ids = [new_sequence() for _ in range(8)]

        def work(sequence: int) -> tuple[int, ...]:
            client.open_sequence(sequence)
            for _ in range(50):
                client.append_keys(0, sequences=sequence, keys=KEYS)
            lengths = client.get_sequence(sequence).lengths
            client.close_sequence(sequence)
            return lengths

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, ids)) == [(100, 0, 0)] * 8


def test_no_file_is_left_open(server: Serving) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with blockdex.Client(server.grpc_address, transport="ring") as client:
            client.close_sequence(new_sequence())
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 8  # gRPC keeps some of its own


def test_grpc_is_not_in_the_path(server: Serving) -> None:
    with proxy_to(server.grpc_address) as proxy, blockdex.Client(proxy.address, transport="ring") as client:
        client.info()
        proxy.accepts = False
        proxy.cut()
        sequence = new_sequence()
        client.open_sequence(sequence)
        client.append_keys(0, sequences=sequence, keys=KEYS)
        client.close_sequence(sequence)
