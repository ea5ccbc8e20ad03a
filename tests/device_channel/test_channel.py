"""A channel and a real engine, on a CPU: a memfd takes the place of the device's memory, Triton's interpreter that of it.

What it takes a GPU to show is in `tests/gpu/test_device_channel.py`.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from blockdex.contract.errors import (
    BlockdexError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    UnavailableError,
)
from blockdex.device_channel.channel import DeviceChannel
from blockdex.ring import channel_layout
from support.channel_twins import interpreted
from support.ring_engine import Hosted, hosted
from support.running_engine import SPEC, TENANT, block_ids, open_sequence, tokens

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted(monkeypatch.setattr)


@pytest.fixture
async def run() -> AsyncIterator[Hosted]:
    async with hosted() as run:
        for sequence in (1, 2, 3):
            await run.ask(open_sequence(sequence))
        yield run


@pytest.fixture
async def channel(run: Hosted) -> AsyncIterator[DeviceChannel]:
    channel = await asyncio.to_thread(opened, run)
    yield channel
    await asyncio.to_thread(channel.close)


def opened(run: Hosted, **options: Any) -> DeviceChannel:
    options = {"device": "cpu", "max_tokens": 32, "bound_seconds": 20.0, "own_bytes": 8192, **options}
    return DeviceChannel(run.address, TENANT, SPEC, run.engine.info().epoch, **options)


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def rows(*each: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Columns of rows (sequence, start, length)."""
    names = ("sequences", "starts", "lengths")
    return {name: numbers(*column) for name, column in zip(names, zip(*each, strict=True), strict=True)}


async def test_it_answers_what_a_ring_answers(run: Hosted, channel: DeviceChannel) -> None:
    keys, queries = random(3, 4, SPEC.head_dim), random(3, 4, 4, SPEC.head_dim)
    ids = await asyncio.to_thread(
        channel.append_and_select, 1, **rows((1, 0, 4), (0, 0, 0), (3, 0, 2)), keys=keys, queries=queries
    )
    channel.check()
    sent = torch.cat((queries[0, :4], queries[2, :2])).view(torch.uint16).numpy()
    expected = block_ids(await run.ask(tokens(1, [(1, 0, 4), (3, 0, 2)], queries=sent)))
    assert torch.equal(torch.cat((ids[0, :4], ids[2, :2])), torch.from_numpy(expected.copy()))
    assert (ids[1] == -1).all() and (ids[2, 2:] == -1).all()
