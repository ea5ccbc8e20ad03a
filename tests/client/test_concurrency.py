"""Many callers on one client, callers that give up, and what closing means to them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import blockdex
from blockdex import CancelledError, DeadlineExceededError, FailedPreconditionError, Reason, UnavailableError
from support.clients import FLAVOURS, Transport, new_sequence
from support.serving import Serving
from support.tcp_proxy import TcpProxy

TRANSPORTS: list[Transport] = ["ring", "stream", "unary"]
BLOCKS = 6


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def async_client(server: Serving, transport: Transport) -> AsyncIterator[blockdex.AsyncClient]:
    async with blockdex.AsyncClient(server.grpc_address, transport=transport) as client:
        yield client


def block(number: int) -> NDArray[np.float32]:
    """128 keys that all point one way, which a query of the same way finds again."""
    keys = np.zeros((128, 128), np.float32)
    keys[:, number] = 1
    return keys


def ways(first: int) -> NDArray[np.float32]:
    """Queries whose four heads look for four blocks."""
    queries = np.zeros((1, 4, 128), np.float32)
    for head in range(4):
        queries[0, head, (first + head) % BLOCKS] = 1
    return queries


def best(block_ids: NDArray[np.int32], scores: NDArray[np.float32]) -> list[int]:
    """The block of each head that is not there because it is local."""
    scores[np.isposinf(scores)] = -np.inf
    return [int(ids[np.argmax(row)]) for ids, row in zip(block_ids[0], scores[0], strict=True)]


def found(first: int) -> list[int]:
    return [(first + head) % BLOCKS for head in range(4)]


def test_many_threads_share_a_client(server: Serving, transport: Transport) -> None:
    with blockdex.Client(server.grpc_address, transport=transport) as client:

        def one_engine(number: int) -> None:
            sequence, layer = new_sequence(), number % 3
            client.open_sequence(sequence)
            order = np.random.default_rng(number).permutation(BLOCKS)
            for way in order:
                client.append_keys(layer, sequences=sequence, keys=block(int(way)))
            client.append_keys(layer, sequences=sequence, keys=np.zeros((1, 128), np.float32))
            for first in range(BLOCKS):
                block_ids, scores = client.select_blocks(
                    layer, sequences=sequence, queries=ways(first), return_scores=True
                )
                assert [int(order[place]) for place in best(block_ids, scores)] == found(first)
            assert client.get_sequence(sequence).lengths[layer] == 128 * BLOCKS + 1
            client.close_sequence(sequence)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one_engine, range(8)))


async def test_many_tasks_share_a_client(async_client: blockdex.AsyncClient) -> None:
    client = async_client

    async def one_engine(number: int) -> None:
        sequence, layer = new_sequence(), number % 3
        await client.open_sequence(sequence)
        order = np.random.default_rng(number).permutation(BLOCKS)
        for way in order:
            await client.append_keys(layer, sequences=sequence, keys=block(int(way)))
        await client.append_keys(layer, sequences=sequence, keys=np.zeros((1, 128), np.float32))
        asked = [
            client.select_blocks(layer, sequences=sequence, queries=ways(first), return_scores=True)
            for first in range(BLOCKS)
        ]
        for first, (block_ids, scores) in enumerate(await asyncio.gather(*asked)):
            assert [int(order[place]) for place in best(block_ids, scores)] == found(first)
        await client.close_sequence(sequence)

    await asyncio.gather(*(one_engine(number) for number in range(8)))


async def test_waiting_for_keys_does_not_hold_up_others(async_client: blockdex.AsyncClient) -> None:
    client, sequence = async_client, new_sequence()
    await client.open_sequence(sequence)
    waiting = asyncio.create_task(
        client.select_blocks(
            0, sequences=sequence, queries=ways(0), starts=128, revisions=9, wait_for_keys=True, return_scores=True
        )
    )
    await client.append_keys(0, sequences=sequence, keys=block(0), revisions=8)
    assert not waiting.done()
    await client.append_keys(0, sequences=sequence, keys=np.zeros((1, 128), np.float32), revisions=9)
    block_ids, _ = await waiting
    assert block_ids[0, 0].tolist() == [0, 1] + [-1] * 14
    await client.close_sequence(sequence)


async def test_a_cancelled_task_gives_its_request_up(
    async_client: blockdex.AsyncClient, transport: Transport, counted: Callable[..., int]
) -> None:
    client, sequence = async_client, new_sequence()
    await client.open_sequence(sequence)
    waiting = asyncio.create_task(
        client.select_blocks(0, sequences=sequence, queries=ways(0), starts=0, wait_for_keys=True)
    )
    deadline = time.monotonic() + 20
    while counted("blockdex_waiting_requests") == 0:
        assert time.monotonic() < deadline, "it does not wait"
        await asyncio.sleep(0.02)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    rpc = "Stream/SelectBlocks" if transport == "stream" else "SelectBlocks"
    deadline = time.monotonic() + 20
    # No frontend counts what goes over a ring.
    while (
        counted("blockdex_waiting_requests") > 0
        if transport == "ring"
        else counted("blockdex_requests_total", rpc=rpc, code="CANCELLED") == 0
    ):
        assert time.monotonic() < deadline, "the server was not told"
        await asyncio.sleep(0.02)
    await client.append_keys(0, sequences=sequence, keys=block(0))
    await client.close_sequence(sequence)


@pytest.mark.parametrize("transport", ["stream", "unary"])
async def test_a_cancelled_append_has_an_unknown_outcome(async_client: blockdex.AsyncClient) -> None:
    client, sequence = async_client, new_sequence()
    await client.open_sequence(sequence)
    appending = asyncio.create_task(client.append_keys(0, sequences=sequence, keys=block(0)))
    await asyncio.sleep(0)
    appending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await appending
    with pytest.raises(FailedPreconditionError) as refused:
        await client.append_keys(0, sequences=sequence, keys=block(0))
    assert refused.value.reason == Reason.OUTCOME_UNKNOWN
    await client.get_sequence(sequence)
    await client.append_keys(0, sequences=sequence, keys=block(0))
    await client.close_sequence(sequence)


async def test_everything_in_flight_fails_with_its_stream(proxy: TcpProxy) -> None:
    async with blockdex.AsyncClient(proxy.address, transport="stream", timeout=10) as client:
        sequences = [new_sequence() for _ in range(5)]
        for sequence in sequences:
            await client.open_sequence(sequence)
        proxy.answers = False
        appends = [asyncio.create_task(client.append_keys(0, sequences=s, keys=block(0))) for s in sequences]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(proxy.cut)
        proxy.answers = True
        for failure in await asyncio.gather(*appends, return_exceptions=True):
            assert isinstance(failure, UnavailableError)
            assert failure.reason == Reason.UNREACHABLE
        for sequence in sequences:
            with pytest.raises(FailedPreconditionError):
                await client.append_keys(0, sequences=sequence, keys=block(0))
            await client.get_sequence(sequence)
            await client.append_keys(0, sequences=sequence, keys=block(0))
            await client.close_sequence(sequence)


def test_a_request_that_was_not_sent_when_its_caller_left_is_never_sent(
    proxy: TcpProxy, other: blockdex.Client
) -> None:
    with blockdex.Client(proxy.address, transport="stream", timeout=30) as client, ThreadPoolExecutor(1) as pool:
        large, small = new_sequence(), new_sequence()
        for sequence in (large, small):
            client.open_sequence(sequence)
            client.append_keys(1, sequences=sequence, keys=block(0))
        proxy.requests = False
        keys = np.zeros((16_000, 128), np.float32)
        appending = pool.submit(lambda: client.append_keys(0, sequences=large, keys=keys))
        time.sleep(1.0)  # The large one is on its way and fills the connection.
        with pytest.raises(DeadlineExceededError):
            client.append_keys(0, sequences=small, keys=block(0), timeout=0.2)
        proxy.requests = True
        appending.result()
        client.append_keys(2, sequences=small, keys=block(0))
        assert other.get_sequence(small).lengths == (0, 128, 128)
        for sequence in (large, small):
            client.close_sequence(sequence)


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_closing_fails_what_is_in_flight_and_what_comes_after(proxy: TcpProxy, transport: Transport) -> None:
    client = blockdex.Client(proxy.address, transport=transport)
    sequence = new_sequence()
    client.open_sequence(sequence)
    client.append_keys(1, sequences=sequence, keys=block(0))
    proxy.answers = False
    closing = threading.Timer(0.2, client.close)
    closing.start()
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(CancelledError) as refused:
            client.append_keys(0, sequences=sequence, keys=block(0), starts=0)
        assert refused.value.reason == Reason.CANCELLED
    assert time.monotonic() - began < 5
    closing.join()
    client.close()
    with pytest.raises(CancelledError):
        client.info()


async def test_closing_fails_what_is_in_flight_on_a_loop_too(server: Serving, transport: Transport) -> None:
    client = blockdex.AsyncClient(server.grpc_address, transport=transport)
    sequence = new_sequence()
    await client.open_sequence(sequence)
    waiting = asyncio.create_task(
        client.select_blocks(0, sequences=sequence, queries=ways(0), starts=0, wait_for_keys=True)
    )
    await asyncio.sleep(0.1)
    await client.close()
    with pytest.raises(CancelledError) as refused:
        await waiting
    assert refused.value.reason == Reason.CANCELLED
    with pytest.raises(CancelledError):
        await client.info()
    await client.close()


@pytest.mark.parametrize("kind", [blockdex.Client, blockdex.AsyncClient])
def test_a_transport_that_is_none(kind: Any) -> None:
    with pytest.raises(ValueError, match="transport must be one of ring, stream, unary, got 'carrier pigeon'"):
        kind("127.0.0.1:1", transport="carrier pigeon")


def test_a_client_that_is_never_used_closes_quietly() -> None:
    for kind, transport, _ in FLAVOURS.values():
        client = kind("127.0.0.1:1", transport=transport)
        closing = client.close()
        if closing is not None:
            asyncio.run(closing)
