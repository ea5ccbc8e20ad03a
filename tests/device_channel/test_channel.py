"""A channel and a real engine on a CPU: a memfd takes the place of the device's memory, numpy that of its kernels.

What it takes a GPU to show is in `tests/gpu/test_device_channel.py`.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from blockdex.contract.errors import (
    BlockdexError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    ResourceExhaustedError,
    UnavailableError,
)
from blockdex.contract.messages import FloatDtype, Order
from blockdex.device_channel import channel as module
from blockdex.device_channel.channel import DeviceChannel
from blockdex.device_channel.connection import Connection
from blockdex.ring import channel_layout
from blockdex.ring.layout import AT, HEADER_BYTES
from blockdex.ring.segment import Segment, Sizes
from blockdex.scheduler.large_request import TORCH_DTYPES
from support.asking import eventually
from support.channel_twins import launch_numpy
from support.ring_engine import Hosted, hosted
from support.running_engine import SPEC, TENANT, block_ids, create_pool, get, open_sequence, set_cells, tokens

LAYER = 1


def open_files() -> int:
    """How many files the process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "launch", launch_numpy)


@pytest.fixture
async def run() -> AsyncIterator[Hosted]:
    async with hosted() as run:
        for sequence in (1, 2, 3):
            await run.ask(open_sequence(sequence))
        yield run


def opened(run: Hosted, **options: Any) -> DeviceChannel:
    options = {"device": "cpu", "max_tokens": 64, "bound_seconds": 20.0, "own_bytes": 8192, **options}
    return DeviceChannel(run.address, TENANT, SPEC, run.engine.info().epoch, **options)


@pytest.fixture
async def channel(run: Hosted) -> AsyncIterator[DeviceChannel]:
    channel = await asyncio.to_thread(opened, run)
    yield channel
    await asyncio.to_thread(channel.close)


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def rows(*each: tuple[int, int, int]) -> dict[str, Any]:
    """Columns of rows (sequence, start, length)."""
    names = ("sequences", "starts", "lengths")
    return {name: numbers(*column) for name, column in zip(names, zip(*each, strict=True), strict=True)}


async def append(channel: DeviceChannel, sequence: int, length: int, seed: int = 0) -> torch.Tensor:
    """Appends a history, four tokens a call; bfloat16 `[length, D]`."""
    keys = random(length, SPEC.head_dim, seed=seed)
    for start in range(0, length, 4):
        part = keys[None, start : start + 4].contiguous()
        await asyncio.to_thread(channel.append_keys, LAYER, **rows((sequence, start, part.shape[1])), keys=part)
    channel.check()
    return keys


async def lengths_of(run: Hosted, sequence: int) -> list[int]:
    state: Any = await run.ask(get(sequence))
    return [int(length) for length in state.lengths]


async def over_the_ring(
    run: Hosted, spans: Sequence[tuple[int, int, int]], queries: torch.Tensor, pool: int = 0
) -> torch.Tensor:
    """What a ring answers to packed queries."""
    answer = await run.ask(tokens(LAYER, spans, queries=queries.float().numpy(), pool=pool))
    return torch.from_numpy(block_ids(answer).copy())


async def test_it_answers_what_a_ring_answers(run: Hosted, channel: DeviceChannel) -> None:
    for sequence in (1, 2, 3):
        await append(channel, sequence, 100, seed=sequence)
    asked = [(1, 100, 4), (2, 0, 0), (3, 98, 2)]
    keys, queries = random(3, 4, SPEC.head_dim), random(3, 4, 4, SPEC.head_dim)
    ids = await asyncio.to_thread(
        channel.append_and_select, LAYER, **rows(*asked), keys=keys, queries=queries, rollback=True
    )
    channel.check()
    packed = torch.cat((queries[0, :4], queries[2, :2]))
    assert torch.equal(torch.cat((ids[0, :4], ids[2, :2])), await over_the_ring(run, [asked[0], asked[2]], packed))
    assert (ids[0] >= 0).all() and (ids[1] == -1).all() and (ids[2, 2:] == -1).all()
    assert await lengths_of(run, 1) == [0, 104, 0]
    out = torch.full_like(ids, 5)
    again = await asyncio.to_thread(
        channel.select_blocks, LAYER, **rows(*asked), queries=queries, out=out, wait_for_keys=True
    )
    assert again is out and torch.equal(out, ids)


async def test_rows_of_a_pool(run: Hosted, channel: DeviceChannel) -> None:
    """Cells change between calls of the same tensors; a row without pages ends the channel."""
    await run.ask(create_pool(7, 32, 3, 16))
    asked, keys, queries = rows((0, 0, 30), (2, 8, 0)), random(2, 30, SPEC.head_dim), random(2, 30, 4, SPEC.head_dim)
    answers = []
    for pages in ([9, 3, 30, 1], [4, 5, 6, 7]):
        await run.ask(set_cells(7, (0, 0, pages)))
        answers.append(
            await asyncio.to_thread(
                channel.append_and_select, LAYER, **asked, keys=keys, queries=queries, rollback=True, pool=7
            )
        )
        channel.check()
        assert torch.equal(answers[-1][0], await over_the_ring(run, [(0, 0, 30)], queries[0], pool=7))
    assert torch.equal(*answers) and (answers[0][1] == -1).all()
    one = rows((1, 0, 1))
    none = await asyncio.to_thread(channel.select_blocks, LAYER, **one, queries=queries[:1, :1].contiguous(), pool=7)
    assert (none == -1).all()
    with pytest.raises(FailedPreconditionError, match="pool 7, row 1, layer 1: block 0 has no page"):
        channel.check()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8_e4m3"])
@pytest.mark.parametrize(("order", "raw"), [("ascending", False), ("score", True)])
async def test_dtypes_orders_and_scores_are_those_of_a_ring(
    run: Hosted, channel: DeviceChannel, dtype: FloatDtype, order: Order, raw: bool
) -> None:
    """Also rows of heads of their own, and padding, beside which there is no score."""
    kind = TORCH_DTYPES[dtype]
    keys = random(1, 40, SPEC.head_dim).to(kind)
    part = await asyncio.to_thread(opened, run, first_head=1, num_heads=2)
    queries, scores = random(2, 4, 2, SPEC.head_dim, seed=1).to(kind), torch.full((2, 4, 2, SPEC.topk), 7.0)
    for start in range(0, 40, 4):
        rest = keys[:, start : start + 4].contiguous()
        await asyncio.to_thread(part.append_keys, LAYER, **rows((1, start, 4)), keys=rest)
    asked = {**rows((1, 36, 4), (2, 0, 0)), "queries": queries, "scores": scores}
    ids = await asyncio.to_thread(part.select_blocks, LAYER, **asked, order=order, raw_scores=raw)
    part.check()
    packed = queries[0].float().numpy()
    answer: Any = await run.ask(
        tokens(LAYER, [(1, 36, 4)], queries=packed, first_head=1, order=order, scores=True, raw=raw, dtype=dtype)
    )
    assert torch.equal(ids[0], torch.tensor(answer.block_ids)) and (ids[1] == -1).all()
    assert torch.equal(scores[0], torch.tensor(answer.scores)) and (scores[1] == -torch.inf).all()
    await asyncio.to_thread(part.close)


async def test_rows_that_fit_no_step(run: Hosted, channel: DeviceChannel) -> None:
    """Longer than a decode: the engine runs them as prefills, and writes their ids into the channel all the same."""
    keys, queries = random(2, 30, SPEC.head_dim), random(2, 30, 4, SPEC.head_dim)
    ids = await asyncio.to_thread(
        channel.append_and_select, LAYER, **rows((1, 0, 30), (2, 0, 17)), keys=keys, queries=queries
    )
    channel.check()
    packed = torch.cat((queries[0], queries[1, :17]))
    assert torch.equal(torch.cat((ids[0], ids[1, :17])), await over_the_ring(run, [(1, 0, 30), (2, 0, 17)], packed))
    assert (ids[1, 17:] == -1).all()


async def test_own_tensors_are_read_where_they_lie(run: Hosted, channel: DeviceChannel) -> None:
    await append(channel, 1, 40)
    queries = channel.empty((1, 4, 4, SPEC.head_dim), torch.bfloat16)
    queries.copy_(random(*queries.shape))
    ids = await asyncio.to_thread(channel.select_blocks, LAYER, **rows((1, 36, 4)), queries=queries)
    channel.check()
    assert torch.equal(ids[0], await over_the_ring(run, [(1, 36, 4)], queries[0]))
    with pytest.raises(ValueError, match=r"own_bytes: \d+ bytes are left, 16384 are needed"):
        channel.empty((8192,), torch.bfloat16)


async def test_ranks_of_one_head_each(run: Hosted) -> None:
    """The first appends, the others wait for its revision."""
    channels = [await asyncio.to_thread(opened, run, first_head=head, num_heads=1) for head in range(4)]
    queries, keys = random(1, 1, 4, SPEC.head_dim), random(1, 4, SPEC.head_dim)
    base = numbers(10)
    asked = {**rows((1, 3, 1)), "revisions": base, "replays": numbers(7)}
    waiting = [
        asyncio.create_task(
            asyncio.to_thread(
                channel.select_blocks,
                LAYER,
                **asked,
                queries=queries[:, :, head : head + 1].contiguous(),
                wait_for_keys=True,
            )
        )
        for head, channel in enumerate(channels[1:], start=1)
    ]
    await eventually(lambda: run.engine._core.waiting == 3)
    await asyncio.to_thread(channels[0].append_keys, LAYER, **rows((1, 0, 4)), keys=keys, revisions=numbers(17))
    first = await asyncio.to_thread(channels[0].select_blocks, LAYER, **asked, queries=queries[:, :, :1].contiguous())
    ids = torch.cat((first, *await asyncio.gather(*waiting)), dim=2)
    assert torch.equal(ids[0], await over_the_ring(run, [(1, 3, 1)], queries[0]))
    for channel in channels:
        channel.check()
        await asyncio.to_thread(channel.close)


REFUSALS: dict[str, tuple[dict[str, Any], type[BlockdexError], str]] = {
    "a gap": ({**rows((1, 5, 1))}, OutOfRangeError, "sequence 1, layer 1: append starts at 5, length is 0"),
    "unknown": ({**rows((99, 0, 1))}, NotFoundError, "sequence 99: unknown"),
    "twice": ({**rows((1, 0, 1), (1, 1, 1))}, InvalidArgumentError, "spans: sequence 1 is named 2 times"),
    "start": ({**rows((2, -3, 1))}, InvalidArgumentError, "sequence 2: start must be at least 0, got -3"),
    "length": ({**rows((2, 0, 3))}, InvalidArgumentError, "lengths: must be 0 to the tokens of a row"),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_a_refused_call_changes_nothing_and_ends_the_channel(
    run: Hosted, channel: DeviceChannel, case: str
) -> None:
    columns, error, message = REFUSALS[case]
    count = len(columns["lengths"])
    tensors: dict[str, Any] = {"keys": random(count, 1, SPEC.head_dim), "queries": random(count, 1, 4, SPEC.head_dim)}
    good = {**rows((1, 0, 1)), "keys": tensors["keys"][:1], "queries": tensors["queries"][:1]}
    ids = await asyncio.to_thread(channel.append_and_select, LAYER, **columns, **tensors)
    assert (ids == -1).all()
    with pytest.raises(error, match=message):
        channel.check()
    assert (await asyncio.to_thread(channel.append_and_select, LAYER, **good) == -1).all()
    assert await lengths_of(run, 1) == [0, 0, 0]
    await asyncio.to_thread(channel.reopen, run.address, run.engine.info().epoch)
    channel.check()
    assert (await asyncio.to_thread(channel.append_and_select, LAYER, **good))[..., 0].eq(0).all()
    channel.check()
    assert await lengths_of(run, 1) == [0, 1, 0]


async def test_a_wait_that_ends_at_its_bound(run: Hosted) -> None:
    channel = await asyncio.to_thread(opened, run, bound_seconds=0.3)
    ask: dict[str, Any] = {
        **rows((1, 0, 1)),
        "keys": random(1, 1, SPEC.head_dim),
        "queries": random(1, 1, 4, SPEC.head_dim),
    }
    with run.backend.held("decode"):
        began = time.monotonic()
        ids = await asyncio.to_thread(channel.append_and_select, LAYER, **ask)
        assert 0.3 <= time.monotonic() - began < 2 and (ids == -1).all()
        with pytest.raises(DeadlineExceededError, match=r"channel: no answer within 0.3 s"):
            channel.check()
    # The answer that comes too late is none: the next opening begins with other numbers.
    await asyncio.to_thread(channel.reopen, run.address, run.engine.info().epoch)
    ask |= rows((1, 1, 1))
    assert (await asyncio.to_thread(channel.append_and_select, LAYER, **ask))[..., 0].eq(0).all()
    channel.check()
    await asyncio.to_thread(channel.close)


async def test_a_core_that_was_held_up_drops_what_nobody_waits_for(run: Hosted) -> None:
    """It cannot know when a request was written, but that it was not there when it looked last."""
    first, second = [await asyncio.to_thread(opened, run, bound_seconds=0.3) for _ in range(2)]
    ask: dict[str, Any] = {"keys": random(1, 1, SPEC.head_dim)}
    select: dict[str, Any] = {**rows((1, 0, 1)), "keys": ask["keys"], "queries": random(1, 1, 4, SPEC.head_dim)}
    with run.backend.held("decode") as entered:
        holding = asyncio.create_task(asyncio.to_thread(first.append_and_select, LAYER, **select))
        await asyncio.to_thread(entered.wait, 10)
        await asyncio.to_thread(second.append_keys, LAYER, **rows((2, 0, 1)), **ask)
        # As if its kernels had not said that they gave up.
        second._memory.segment.flags[AT["channel_error"] // 4] = 0
        await holding
    await eventually(lambda: second._memory.segment.counters[AT["answers_written"] // 8] == 1)
    with pytest.raises(DeadlineExceededError, match=r"timeout: 0.300 s were allowed, 0.[3-9]\d+ s have passed"):
        raise second._memory.refusal()
    assert await lengths_of(run, 2) == [0, 0, 0]
    for each in (first, second):
        await asyncio.to_thread(each.close)


async def test_requests_of_a_dead_channel_are_dropped(run: Hosted) -> None:
    channel = await asyncio.to_thread(opened, run, bound_seconds=0.2)
    holder = await asyncio.to_thread(opened, run)
    select: dict[str, Any] = {
        **rows((1, 0, 1)),
        "keys": random(1, 1, SPEC.head_dim),
        "queries": random(1, 1, 4, SPEC.head_dim),
    }
    with run.backend.held("decode") as entered:
        holding = asyncio.create_task(asyncio.to_thread(holder.append_and_select, LAYER, **select))
        await asyncio.to_thread(entered.wait, 10)
        await asyncio.to_thread(channel.append_keys, LAYER, **rows((2, 0, 1)), keys=random(1, 1, SPEC.head_dim))
    await holding
    await eventually(
        lambda: (
            channel._memory.segment.counters[AT["requests_read"] // 8]
            == channel._memory.segment.counters[AT["requests_written"] // 8]
        )
    )
    assert await lengths_of(run, 2) == [0, 0, 0]
    assert channel._memory.segment.counters[AT["answers_written"] // 8] == 0
    for each in (channel, holder):
        await asyncio.to_thread(each.close)


async def test_a_channel_outlives_its_engine(run: Hosted, channel: DeviceChannel) -> None:
    """The addresses that kernels were captured with stay as they are."""
    memory = channel._memory
    addresses = (memory.address, memory.segment_address)
    ask: dict[str, Any] = {
        **rows((1, 0, 1)),
        "keys": random(1, 1, SPEC.head_dim),
        "queries": random(1, 1, 4, SPEC.head_dim),
    }
    run.hosting.cancel()
    await eventually(lambda: memory.error == channel_layout.ENGINE_GONE)
    with pytest.raises(UnavailableError, match="engine: it is gone, and so is the channel"):
        channel.check()
    assert (await asyncio.to_thread(channel.append_and_select, LAYER, **ask) == -1).all()
    with pytest.raises(UnavailableError, match="nobody answers at 'nowhere'"):
        await asyncio.to_thread(channel.reopen, "nowhere", 1)
    assert (await asyncio.to_thread(channel.append_and_select, LAYER, **ask) == -1).all()
    async with hosted() as other:
        await other.ask(open_sequence(1))
        await asyncio.to_thread(channel.reopen, other.address, other.engine.info().epoch)
        assert (await asyncio.to_thread(channel.append_and_select, LAYER, **ask))[..., 0].eq(0).all()
        channel.check()
        assert (memory.address, memory.segment_address) == addresses
        await asyncio.to_thread(channel.close)


async def test_a_cache_that_is_born_anew_is_another_epoch(run: Hosted, channel: DeviceChannel) -> None:
    run.backend.fault = "append"
    ask: dict[str, Any] = {**rows((1, 0, 1)), "keys": random(1, 1, SPEC.head_dim)}
    await asyncio.to_thread(channel.append_keys, LAYER, **ask)
    with pytest.raises(BlockdexError, match="a batch failed"):
        channel.check()
    with pytest.raises(FailedPreconditionError, match=r"epoch: channel names 5, the cache's is \d+"):
        await asyncio.to_thread(channel.reopen, run.address, 5)
    await asyncio.to_thread(channel.reopen, run.address, run.engine.info().epoch)
    await run.ask(open_sequence(1))
    await asyncio.to_thread(channel.append_keys, LAYER, **ask)
    channel.check()


async def test_a_closed_channel(run: Hosted, channel: DeviceChannel) -> None:
    """When `close` returns the engine has let go of its memory."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text("ascii").count("memfd:blockdex-channel")

    files = open_files()
    before = mapped()
    others = [await asyncio.to_thread(opened, run) for _ in range(20)]
    assert mapped() == before + 40
    for other in others:
        await asyncio.to_thread(other.close)
    assert mapped() == before + 20, "the client's stay"
    with pytest.raises(FailedPreconditionError, match="channel: it is closed"):
        others[0].check()
    ask: dict[str, Any] = {
        **rows((1, 0, 1)),
        "keys": random(1, 1, SPEC.head_dim),
        "queries": random(1, 1, 4, SPEC.head_dim),
    }
    assert (await asyncio.to_thread(others[0].append_and_select, LAYER, **ask) == -1).all()
    await asyncio.to_thread(others[0].close)
    await eventually(lambda: open_files() <= files + 4 * len(others), 5)
    await asyncio.to_thread(channel.append_and_select, LAYER, **ask)
    channel.check()


async def test_a_client_that_goes_without_a_word(run: Hosted) -> None:
    channel = await asyncio.to_thread(opened, run)
    assert channel._connection is not None
    with run.backend.held("decode") as entered:
        ask: dict[str, Any] = {
            **rows((1, 0, 1)),
            "keys": random(1, 1, SPEC.head_dim),
            "queries": random(1, 1, 4, SPEC.head_dim),
        }
        asking = asyncio.create_task(asyncio.to_thread(channel.append_and_select, LAYER, **ask))
        await asyncio.to_thread(entered.wait, 10)
        channel._connection.close()
    await asking
    other = await asyncio.to_thread(opened, run)
    await asyncio.to_thread(other.append_keys, LAYER, **rows((2, 0, 1)), keys=random(1, 1, SPEC.head_dim))
    other.check()
    await asyncio.to_thread(other.close)


async def test_an_open_channel_that_nobody_uses_costs_little(run: Hosted, channel: DeviceChannel) -> None:
    """After 100 ms without a request the core naps, and yet sees the next one."""
    await asyncio.sleep(0.3)
    (engine,) = (thread for thread in threading.enumerate() if thread.name.startswith("blockdex-engine"))
    stat = Path(f"/proc/self/task/{engine.native_id}/stat")

    def ticks() -> int:
        return sum(map(int, stat.read_text("ascii").rpartition(")")[2].split()[11:13]))

    before = ticks()
    await asyncio.sleep(1.0)
    used = ticks() - before
    assert used <= 35, f"{used} hundredths of a second"
    await append(channel, 1, 8)


SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
GOOD = {"open_channel": "memfd", "bytes": 0, "device": "", "bound_seconds": 2.0}


def memfd(size: int, seals: int = SEALS, content: bytes = b"") -> int:
    fd = os.memfd_create("made-for-this-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, content, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def segment_file(size: int = 0, seals: int = SEALS, **header: int) -> int:
    """A file with the header of a segment, of which some numbers are other ones."""
    segment = Segment.create(Sizes(2, 4096, 4096), 0)
    content = bytearray(segment.memory)
    for name, number in header.items():
        content[AT[name] : AT[name] + 8] = number.to_bytes(8, "little")
    os.close(segment.fd)
    return memfd(size or len(content), seals, bytes(content))


HAND_OVERS: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "no files": ({}, [], "channel: 2 files must come with it, its segment and its memory, got 0"),
    "one file": ({}, [segment_file], "channel: 2 files must come with it, its segment and its memory, got 1"),
    "kind": ({"open_channel": "cuda_ipc"}, [segment_file, lambda: memfd(8192)], "cuda_ipc: 0 files must come with it"),
    "no kind": ({"open_channel": 7}, [segment_file, lambda: memfd(8192)], "must be memfd, cuda_fd or cuda_ipc, got 7"),
    "device": ({"open_channel": "cuda_fd", "bytes": 8192}, [segment_file, lambda: memfd(8192)], "cuda_fd: "),
    "bound 0": ({"bound_seconds": 0}, [segment_file, lambda: memfd(8192)], "bound_seconds must be above 0 and at most"),
    "bound": ({"bound_seconds": 61}, [segment_file, lambda: memfd(8192)], "at most 60, got 61"),
    "no bound": ({"bound_seconds": "long"}, [segment_file, lambda: memfd(8192)], "at most 60, got 'long'"),
    "epoch": ({"epoch": 12}, [segment_file, lambda: memfd(8192)], "epoch: channel names 12, the cache's is "),
    "unsealed": ({}, [lambda: segment_file(seals=0), lambda: memfd(8192)], "sealed against shrinking and growing"),
    "growing": ({}, [lambda: segment_file(seals=fcntl.F_SEAL_SHRINK), lambda: memfd(8192)], "its seals are 0x2"),
    "no memfd": ({}, [lambda: os.open("/dev/zero", os.O_RDWR), lambda: memfd(8192)], "its segment is no memfd"),
    "large": ({}, [lambda: segment_file((1 << 20) + 64), lambda: memfd(8192)], "may have 1048576 bytes, got 1048640"),
    "small": ({}, [lambda: memfd(64), lambda: memfd(8192)], "segment: 64 bytes cannot be one"),
    "version": ({}, [lambda: segment_file(version=9), lambda: memfd(8192)], "segment: expected magic"),
    "size": ({}, [lambda: segment_file(segment_bytes=64), lambda: memfd(8192)], "segment: expected magic"),
    "outside": ({}, [lambda: segment_file(request_arena_bytes=1 << 40), lambda: memfd(8192)], "parts are not inside"),
    "memory": ({}, [segment_file, lambda: memfd(8192, 0)], "memfd: must be sealed against shrinking"),
    "no room": ({}, [segment_file, lambda: memfd(512)], "channel: its memory has 512 bytes"),
}


@pytest.mark.parametrize("case", HAND_OVERS)
async def test_hand_overs_that_are_refused(run: Hosted, case: str) -> None:
    words, makers, message = HAND_OVERS[case]
    words = GOOD | {"epoch": run.engine.info().epoch} | words
    files = [make() for make in makers]
    gone = threading.Event()
    connection = await asyncio.to_thread(Connection, run.address, TENANT, gone.set)
    with pytest.raises(BlockdexError):  # what the hand-shake took is given back before anything is answered
        await asyncio.to_thread(connection.ask, {"close_channel": 3})
    before = open_files()
    with pytest.raises(BlockdexError) as refusal:
        await asyncio.to_thread(connection.ask, words, files)
    assert message in str(refusal.value)
    await eventually(lambda: open_files() <= before)
    assert not gone.is_set(), "the link goes on"
    for fd in files:
        os.close(fd)
    await asyncio.to_thread(connection.close)
    assert gone.is_set()


async def test_a_link_has_a_tenant_and_few_channels(run: Hosted) -> None:
    words = GOOD | {"epoch": run.engine.info().epoch}
    nobody = await asyncio.to_thread(Connection, run.address, "", lambda: None)
    files = [segment_file(), memfd(8192)]
    with pytest.raises(InvalidArgumentError, match="channel: its link names no tenant"):
        await asyncio.to_thread(nobody.ask, words, files)
    with pytest.raises(InvalidArgumentError, match="channel: the link has none of number 3"):
        await asyncio.to_thread(nobody.ask, {"close_channel": 3})
    own = await asyncio.to_thread(Connection, run.address, TENANT, lambda: None)
    opened = [
        (await asyncio.to_thread(own.ask, words, [segment_file(), memfd(8192)]))["channel"]
        for _ in range(channel_layout.MAX_CHANNELS)
    ]
    with pytest.raises(ResourceExhaustedError, match="channels: a link may have 16 at once, it has 16"):
        await asyncio.to_thread(own.ask, words, files)
    for number in opened[:2]:
        await asyncio.to_thread(own.ask, {"close_channel": number})
    await asyncio.to_thread(own.ask, words, files)
    for connection in (nobody, own):
        await asyncio.to_thread(connection.close)


async def test_a_channel_that_writes_nonsense_is_cut_off_alone(run: Hosted, channel: DeviceChannel) -> None:
    other = await asyncio.to_thread(opened, run)
    segment = channel._memory.segment
    segment.counters[AT["requests_written"] // 8] += 1
    segment.memory[HEADER_BYTES : HEADER_BYTES + 512] = b"\xff" * 512
    await eventually(lambda: channel._memory.error == channel_layout.ENGINE_GONE)
    await asyncio.to_thread(other.append_keys, LAYER, **rows((2, 0, 1)), keys=random(1, 1, SPEC.head_dim))
    other.check()
    await asyncio.to_thread(other.close)


def queries(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": (
        {"queries": queries(1, 1, 4, 16, dtype=torch.float64)},
        r"queries: must be one of bfloat16, float16, float32, float8_e4m3fn, got float64 \[",
    ),
    "shape": ({"queries": queries(1, 4, 16)}, r"queries: must be \[1, tokens, 4, 16\], got bfloat16 \[1, 4"),
    "heads": ({"queries": queries(1, 1, 3, 16)}, r"queries: must be \[1, tokens, 4, 16\]"),
    "order": ({"order": "rising"}, "order: must be one of ascending, score, got 'rising'"),
    "raw": ({"raw_scores": True}, "scores: must be given where they are to be raw"),
    "scores": ({"scores": queries(1, 1, 4, 4)}, r"scores: must be contiguous float32 \[1, 1, 4, 4\] on cpu"),
    "tokens": ({"queries": queries(1, 65, 4, 16)}, "tokens: the channel was opened for 1 to 64, got 1 x 65"),
    "rows": (rows(*[(1, 0, 1)] * 65), "sequences: the channel was opened for 1 to 64 rows, got 65"),
    "columns": ({"starts": numbers(1, 2)}, r"starts: must be int32 or int64 \[1\], got int64 \[2\]"),
    "floats": ({"lengths": torch.ones(1)}, r"lengths: must be int32 or int64 \[1\], got float32 \[1\]"),
    "replays": ({"replays": numbers(1, 2)}, r"replays: must be int32 or int64 \[1\], got int64 \[2\]"),
    "layer": ({"layer": 3}, "layer must be below 3, got 3"),
    "device": ({"starts": torch.zeros(1, dtype=torch.int64, device="meta")}, "starts: must be on cpu, is on meta"),
    "strides": ({"queries": queries(1, 1, 4, 32)[..., ::2]}, "queries: must be contiguous"),
    "out": ({"out": queries(1, 1, 4, 4)}, r"out: must be contiguous int32 \[1, 1, 4, 4\] on cpu"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
async def test_bad_calls(run: Hosted, channel: DeviceChannel, case: str) -> None:
    bad, message = BAD_CALLS[case]
    call: dict[str, Any] = {"layer": LAYER, **rows((1, 0, 1)), "queries": queries(1, 1, 4, 16), **bad}
    with pytest.raises(ValueError, match=message):
        channel.select_blocks(**call)
    channel.check()
    assert channel._memory.segment.counters[AT["requests_written"] // 8] % (1 << 32) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 513}, "max_tokens must be 1 to 512, got 513"),
        ({"max_rows": 257}, "max_rows must be 1 to 256, got 257"),
        ({"num_heads": 5}, "num_heads must be 1 to 4, got 5"),
        ({"first_head": 2, "num_heads": 3}, "num_heads must be 1 to 2, got 3"),
        ({"first_head": -1}, "first_head must be 0 to 3, got -1"),
    ],
)
def test_channels_that_cannot_be(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeviceChannel("nowhere", TENANT, SPEC, 1, device="cpu", **options)
