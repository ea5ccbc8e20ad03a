"""More callers on one stream than the server allows requests on it: who waits where, and what cancelling does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest

import blockdex
from support.clients import new_sequence
from support.serving import SMALL, Serving, serve

ALLOWED = 4
KEYS = np.ones((1, 128), np.float32)
QUERIES = np.ones((1, 4, 128), np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serve(*SMALL, "--max-stream-requests", str(ALLOWED)) as serving:
        yield serving


@pytest.fixture
async def client(server: Serving) -> AsyncIterator[blockdex.AsyncClient]:
    async with blockdex.AsyncClient(server.grpc_address, timeout=25) as client:
        yield client


@pytest.fixture
async def sequence(client: blockdex.AsyncClient) -> AsyncIterator[int]:
    sequence = new_sequence()
    await client.open_sequence(sequence)
    yield sequence
    await client.close_sequence(sequence)


async def crowd(
    client: blockdex.AsyncClient, sequence: int, counted: Callable[..., int], **others: Any
) -> list[asyncio.Task[Any]]:
    """Twice as many selections as may be in flight, that wait for keys; as many as may do so on the server."""
    waiting = [
        asyncio.create_task(
            client.select_blocks(0, sequences=sequence, queries=QUERIES, starts=0, wait_for_keys=True, **others)
        )
        for _ in range(2 * ALLOWED)
    ]
    deadline = time.monotonic() + 20
    while counted("blockdex_waiting_requests") < ALLOWED:
        assert time.monotonic() < deadline, "they do not wait"
        await asyncio.sleep(0.02)
    return waiting


async def test_who_is_cancelled_makes_room(
    client: blockdex.AsyncClient, sequence: int, counted: Callable[..., int]
) -> None:
    waiting = await crowd(client, sequence, counted)
    for one in waiting:
        one.cancel()
    ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in ended)
    await client.append_keys(1, sequences=sequence, keys=KEYS, timeout=20)
    assert counted("blockdex_requests_total", rpc="Stream/SelectBlocks", code="CANCELLED") == ALLOWED


async def test_who_waits_here_comes_next(
    client: blockdex.AsyncClient, sequence: int, counted: Callable[..., int]
) -> None:
    waiting = await crowd(client, sequence, counted)
    appending = asyncio.create_task(client.append_keys(0, sequences=sequence, keys=KEYS))
    await asyncio.sleep(0)
    for one in waiting[: ALLOWED + 1]:
        one.cancel()
    await appending
    for one in waiting[ALLOWED + 1 :]:
        assert (await one).shape == (1, 4, 16)
