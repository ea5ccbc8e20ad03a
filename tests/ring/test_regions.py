"""Memory that clients share: what is read and written there, what is refused, and when it is let go of."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from benchmarks.ring_messages import Request, TokenAnswer
from blockdex.contract.errors import BlockdexError, InvalidArgumentError, ResourceExhaustedError
from blockdex.executor.cpu import CpuExecutor
from blockdex.ring import regions
from blockdex.ring.sharing import release, share
from support.asking import eventually
from support.foreign_frontend import ForeignFrontend
from support.foreign_host import DIM, HEADS, LENGTH, SMALL, both, fill, host, told
from support.naive_engine import NaiveEngine, check_same
from support.running_engine import SPEC, TIMEOUT, open_sequence, tokens, values
from support.shared_memory import files, mappings, shared_memory

BYTES = 1 << 16
ROW = (1, LENGTH, 1)
ALL = {"keys": 0, "queries": 1 << 12, "block_ids": 1 << 14, "scores": 1 << 15}
"""Where in a region each tensor lies."""


@pytest.fixture(autouse=True)
def _nothing_left() -> None:
    """Of the tests before: what is mapped is counted."""
    gc.collect()
    regions._start_closing()
    regions._to_close.put((lambda: None, last := Future[None]()))
    last.result(TIMEOUT)


def queries(count: int, *, seed: int = 7) -> Any:
    return values(np.random.default_rng(seed), count, HEADS, DIM)


REQUESTS: dict[str, Any] = {
    "a decode": both((1, LENGTH, 2)),
    "one of several sequences": both((1, LENGTH, 1), (2, LENGTH, 3)),
    "by score, with scores": both(ROW, order="score", scores=True),
    "with raw scores": both(ROW, scores=True, raw=True),
    "in fp32": both((1, LENGTH, 3), dtype="fp32"),
    "in fp8": both((1, LENGTH, 3), dtype="fp8_e4m3", scores=True),
    "some of the heads": tokens(0, [(1, 3, 2)], queries=queries(2)[:, :2], first_head=1),
    "keys alone": tokens(0, [ROW], keys=np.ones((1, DIM), np.float32)),
    "many keys": tokens(0, [(1, 9, 9)], keys=np.full((9, DIM), 2, np.float32)),
    "a prefill": both((1, 0, LENGTH)),
    "a prefill with scores": both((1, 0, LENGTH), order="score", scores=True),
    "prefills beside a decode": tokens(0, [(1, 0, 20), (2, 5, 2), (3, 1, 17)], queries=queries(39), scores=True),
    "a refusal": both((1, LENGTH + 3, 1)),
}


def named(request: Any) -> set[str]:
    """The tensors that a request and its answer have."""
    every = {"keys": request.keys, "queries": request.queries, "block_ids": request.queries}
    every["scores"] = request.queries and request.queries.return_scores
    return {name for name, there in every.items() if there}


def let_go(before: int) -> bool:
    """Whether no more is mapped than before."""
    return mappings() == before


async def release_soon(frontend: ForeignFrontend, region: int) -> None:
    assert frontend.connected is not None
    await asyncio.to_thread(release, frontend.connected, region)


@pytest.mark.parametrize("name", REQUESTS)
async def test_whatever_lies_in_a_region_is_answered_as_all_is(name: str) -> None:
    """Any of its tensors, the others in the arenas; nothing else of the region is written."""
    async with host() as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)

        async def ask(request: Request) -> None:
            naive.answer(request)
            await run.ask(request)

        await fill(ask, 1, 2, 3)
        frontend, request = await run.connect(), REQUESTS[name]
        names = sorted(named(request))
        with shared_memory(BYTES) as memory:
            region = await run.share(frontend, memory)
            subsets = itertools.chain.from_iterable(
                itertools.combinations(names, count) for count in range(1, len(names) + 1)
            )
            for ticket, subset in enumerate(subsets):
                memory.bytes[:] = 0xA5
                frontend.write(frontend.lay(request, ticket, {part: (region, ALL[part]) for part in subset}))
                expected = naive.answer(request)
                assert expected is not None
                answer = await told(frontend, ticket)
                check_same(answer, expected, str(subset))
                numbers = frontend.told[ticket].numbers
                answered = {"block_ids", "scores"} & set(names)
                if answered <= set(subset) and isinstance(answer, TokenAnswer):
                    assert not numbers.payload_bytes, "what has a region is in no arena"
                for part, end in zip(ALL, (*list(ALL.values())[1:], BYTES), strict=True):
                    assert part in subset or (memory.bytes[ALL[part] : end] == 0xA5).all(), f"{part} with {subset}"


async def test_ranks_of_a_prefill_share_its_read_and_are_answered_in_their_regions() -> None:
    async with host() as run:
        await fill(run.ask, 1)
        whole = await run.select(tokens(0, [(1, 0, 20)], queries=queries(20)))
        with shared_memory(BYTES) as memory:
            frontends = [await run.connect() for _ in range(HEADS)]
            shared = [await run.share(frontend, memory) for frontend in frontends]
            with run.backend.held("append") as entered:
                run.submit(tokens(2, [(1, LENGTH, 1)], keys=np.zeros((1, DIM), np.float32)))
                await run.reached(entered)
                for head, (frontend, region) in enumerate(zip(frontends, shared, strict=True)):
                    own = tokens(0, [(1, 0, 20)], queries=queries(20)[:, head : head + 1], first_head=head)
                    at = head << 14
                    frontend.write(
                        frontend.lay(own, 0, {"queries": (region, at), "block_ids": (region, at + (1 << 13))})
                    )
            before = run.backend.tokens("prefill")
            for head, frontend in enumerate(frontends):
                answer = await told(frontend, 0)
                np.testing.assert_array_equal(answer.block_ids, whole[:, head : head + 1])
            assert run.backend.tokens("prefill") - before <= 20


# --- What is refused ---


def lay(frontend: ForeignFrontend, region: int, ticket: int, **changes: int) -> Any:
    """A request all of whose tensors lie in a region, of which something is changed."""
    places = {name: (region, at) for name, at in ALL.items()}
    return frontend.lay(both(ROW, scores=True), ticket, places)._replace(**changes)


WRONG: dict[str, tuple[dict[str, int], str]] = {
    **{
        f"{name} {what}": ({f"{name}_{field}": value}, words.format(name=name))
        for name in ALL
        for what, field, value, words in (
            ("of no region", "region", 99, "{name}_region: the link has no region 99"),
            ("of a region of another link", "region", 1, "{name}_region: the link has no region 1"),
            ("of the last region", "region", 2**32 - 1, "{name}_region: the link has no region 4294967295"),
            ("not aligned", "offset", 32, "{name}_offset: must be a multiple of 64, got 32"),
            ("beyond its end", "offset", BYTES, " bytes at 65536 are not in region 2 of 65536"),
            ("far beyond", "offset", 2**64 - 64, " bytes at 18446744073709551552 are not in region 2 of 65536"),
        )
    },
    "an offset in the arena": ({"block_ids_region": 0}, "block_ids_offset: must be 0 where block_ids_region is 0"),
    "scores that nobody asks for": ({"flags": 4}, "scores_region: the request has no scores, got 2"),
}


async def test_what_is_wrong_of_a_region_is_refused_in_words_and_changes_nothing() -> None:
    async with host() as run:
        await fill(run.ask, 1)
        frontend, other = await run.connect(), await run.connect()
        with shared_memory(BYTES) as memory, shared_memory(BYTES) as others:
            assert await run.share(other, others) == 1
            assert await run.share(frontend, memory) == 1
            assert await run.share(frontend, memory) == 2
            await release_soon(frontend, 1)
            taken = run.step_requests
            memory.bytes[:] = 0
            for ticket, (name, (changes, words)) in enumerate(WRONG.items()):
                frontend.write(lay(frontend, 2, ticket, **changes))
                answer = await told(frontend, ticket)
                assert isinstance(answer, BlockdexError), name
                assert words in answer.message, (name, answer.message)
                assert answer.reason == "INVALID_REGION", name
            assert run.step_requests == taken
            assert not memory.bytes[ALL["block_ids"] :].any()
            frontend.write(lay(frontend, 2, 1000))
            assert isinstance(await told(frontend, 1000), TokenAnswer)


async def test_tensors_end_where_their_region_does() -> None:
    async with host() as run:
        await fill(run.ask, 1)
        frontend = await run.connect()
        request = both((1, LENGTH, 2))  # 64 bytes of keys, 256 of queries, 128 of ids
        with shared_memory(BYTES - 32) as memory:
            region = await run.share(frontend, memory)
            ticket = itertools.count()
            for name, size in (("keys", 64), ("queries", 256), ("block_ids", 128)):
                last = (BYTES - 32 - size) // 64 * 64
                number = next(ticket)
                frontend.write(frontend.lay(request, number, {name: (region, last)}))
                assert isinstance(await told(frontend, number), TokenAnswer), name
                number = next(ticket)
                frontend.write(
                    frontend.lay(request, number, {name: (region, 0)})._replace(**{f"{name}_offset": last + 64})
                )
                assert f"{name}: {size} bytes at {last + 64} are not" in (await told(frontend, number)).message


async def test_a_tensor_in_a_region_and_in_the_payload_is_refused() -> None:
    async with host() as run:
        await fill(run.ask, 1)
        frontend = await run.connect()
        with shared_memory(BYTES) as memory:
            region = await run.share(frontend, memory)
            for ticket, name in enumerate(("keys", "queries")):
                frontend.write(frontend.lay(both(ROW), ticket)._replace(**{f"{name}_region": region}))
                answer = await told(frontend, ticket)
                assert answer.reason == "INVALID_REGION"
                assert "request: what is in no region takes" in answer.message
            frontend.write(frontend.lay(open_sequence(8), 3)._replace(keys_region=region))
            assert "keys_region: the request has no keys" in (await told(frontend, 3)).message


@contextlib.contextmanager
def pipe() -> Iterator[int]:
    ends = os.pipe()
    try:
        yield ends[0]
    finally:
        for end in ends:
            os.close(end)


@contextlib.contextmanager
def memfd(num_bytes: int = BYTES, seals: int = fcntl.F_SEAL_SHRINK, mode: int = os.O_RDWR) -> Iterator[int]:
    fd = os.memfd_create("blockdex-test", os.MFD_ALLOW_SEALING)
    again = -1
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        again = os.open(f"/proc/self/fd/{fd}", mode)
        yield again
    finally:
        for each in (fd, again):
            if each >= 0:
                os.close(each)


@contextlib.contextmanager
def folder() -> Iterator[int]:
    fd = os.open("/", os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


HUGE = {"handle": "00" * 64, "device": "00" * 16}
REFUSED: dict[str, tuple[str, Any, int, dict[str, Any], str]] = {
    "a pipe": ("memfd", pipe, 1, {}, "memfd: the file is none"),
    "a folder": ("memfd", folder, 1, {}, "memfd: the file is none"),
    "not sealed": ("memfd", lambda: memfd(seals=0), 1, {}, "must be sealed against shrinking"),
    "sealed against growing": ("memfd", lambda: memfd(seals=fcntl.F_SEAL_GROW), 1, {}, "must be sealed against shrink"),
    "for reading alone": ("memfd", lambda: memfd(mode=os.O_RDONLY), 1, {}, "cannot be mapped to be read and written"),
    "empty": ("memfd", lambda: memfd(0), 1, {}, "memfd: must have at least 1 byte, got 0"),
    "too large": (
        "memfd",
        lambda: memfd(SMALL.max_link_region_bytes + 1),
        1,
        {},
        "17179869185 bytes, 17179869184 more may be",
    ),
    "no file": ("memfd", memfd, 0, {}, "memfd: 1 files must come with it, got 0"),
    "two files": ("memfd", memfd, 2, {}, "memfd: 1 files must come with it, got 2"),
    "many files": ("memfd", memfd, 100, {}, "memfd: 1 files must come with it, got 4"),
    "another kind": ("file", memfd, 1, {}, "share: must be memfd, cuda_fd or cuda_ipc, got 'file'"),
    "no kind": (["memfd"], memfd, 1, {}, "share: must be memfd, cuda_fd or cuda_ipc, got ['memfd']"),  # type: ignore[dict-item]
    "memory of a GPU": ("cuda_fd", memfd, 1, {"bytes": 1 << 21}, "cuda_fd: is for a server on a GPU, this one is on"),
    "a handle of a GPU's": ("cuda_ipc", memfd, 0, HUGE, "cuda_ipc: is for a server on a GPU, this one is on cpu"),
    "a short handle": ("cuda_ipc", memfd, 0, HUGE | {"handle": "00"}, "cuda_ipc: handle must have 64 bytes, got 1"),
    "no handle": ("cuda_ipc", memfd, 0, HUGE | {"handle": 7}, "handle and device must be hexadecimal digits"),
    "no bytes": ("cuda_fd", memfd, 1, {"bytes": "many"}, "cuda_fd: bytes must be below"),
    "fewer than no bytes": ("cuda_fd", memfd, 1, {"bytes": -1}, "cuda_fd: bytes must be below"),
}


async def test_memory_that_cannot_be_shared_is_refused_and_leaves_nothing() -> None:
    async with host() as run:
        await fill(run.ask, 1)
        frontend = await run.connect()
        assert frontend.connected is not None
        before = files(), mappings()
        for name, (kind, made, count, more, words) in REFUSED.items():
            with made() as fd, pytest.raises(BlockdexError) as refused:
                await asyncio.to_thread(share, frontend.connected, kind, [fd] * count, **more)
            assert words in refused.value.message, (name, refused.value.message)
        for region in (1, 0, -1, 2**40, "1", None):
            with pytest.raises(BlockdexError, match="release: the link has no region"):
                await asyncio.to_thread(release, frontend.connected, region)  # type: ignore[arg-type]
        assert (files(), mappings()) == before
        with shared_memory(BYTES) as memory:
            region = await run.share(frontend, memory)
            frontend.write(lay(frontend, region, 1))
            assert isinstance(await told(frontend, 1), TokenAnswer)


async def test_memory_that_a_device_does_not_take_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def pin(executor: CpuExecutor, address: int, num_bytes: int) -> None:
        raise RuntimeError(f"no room for {num_bytes} bytes, made for this test")

    monkeypatch.setattr(CpuExecutor, "pin", pin)
    async with host() as run:
        frontend = await run.connect()
        with shared_memory(BYTES) as memory:
            gc.collect()  # of what other tests have left
            before = mappings()
            with pytest.raises(InvalidArgumentError, match=f"memfd: no room for {BYTES} bytes"):
                await run.share(frontend, memory)
            assert mappings() == before


async def test_what_nobody_asked_for_is_closed() -> None:
    """Files beside other words, and without any."""
    async with host() as run:
        frontend = await run.connect()
        assert frontend.connected is not None
        before = files()
        with memfd() as fd:
            for _ in range(20):
                body = b'{"ask":"info"}'
                socket.send_fds(frontend.connected, [len(body).to_bytes(4, "little") + body], [fd] * 3)
            socket.send_fds(frontend.connected, [b"\x0e"], [fd])
        await eventually(lambda: files() <= before + 1)
        run.leave(frontend)
        await eventually(lambda: files() < before)


async def test_more_regions_than_there_may_be_are_refused_and_cost_nothing() -> None:
    async with host() as run:
        await fill(run.ask, 1)
        frontend = await run.connect()
        assert frontend.connected is not None
        connected = frontend.connected

        def ask_for_many(fd: int) -> tuple[list[int], set[str]]:
            shared, words = list[int](), set[str]()
            for _ in range(10_000):
                try:
                    shared.append(share(connected, "memfd", [fd]).region)
                except ResourceExhaustedError as refused:
                    words.add(refused.message)
            return shared, words

        with shared_memory(BYTES) as memory:
            before = files(), mappings()
            began = time.monotonic()
            shared, words = await asyncio.to_thread(ask_for_many, memory.fd)
            assert time.monotonic() - began < 3 * TIMEOUT
            assert len(set(shared)) == SMALL.max_link_regions
            assert words == {
                f"regions: a link may share {SMALL.max_link_regions} at once, it shares {SMALL.max_link_regions}"
            }
            await eventually(lambda: (files(), mappings()) == (before[0], before[1] + SMALL.max_link_regions))
            frontend.regions[shared[-1]] = memory.bytes
            frontend.write(lay(frontend, shared[-1], 1))
            assert isinstance(await told(frontend, 1), TokenAnswer)
            for region in shared:
                await release_soon(frontend, region)
            assert (files(), mappings()) == before
            assert await run.share(frontend, memory) not in shared, "a number does not come again soon"


async def test_all_regions_of_a_link_and_of_all_links_have_so_many_bytes() -> None:
    limits = replace(SMALL, max_link_region_bytes=3 * BYTES, max_region_bytes=5 * BYTES)
    async with host(limits) as run:
        frontend, other = await run.connect(), await run.connect()
        with shared_memory(2 * BYTES) as memory, shared_memory(BYTES) as small:
            region = await run.share(frontend, memory)
            words = f"memfd: {2 * BYTES} bytes, {BYTES} more may be shared of the {3 * BYTES} of a link"
            with pytest.raises(ResourceExhaustedError, match=words):
                await run.share(frontend, memory)
            await run.share(frontend, small)
            await run.share(other, memory)
            words = f"memfd: {BYTES} bytes, 0 more may be shared of the {5 * BYTES} of all links"
            with pytest.raises(ResourceExhaustedError, match=words):
                await run.share(other, small)
            await release_soon(frontend, region)
            await run.share(other, small)
            await run.share(frontend, small)
            run.leave(other)
            await eventually(lambda: run.engine.stats().links.region_bytes == 2 * BYTES)
            await run.share(frontend, small)
            run.leave(frontend)
            await eventually(lambda: run.engine.stats().links.region_bytes == 0)
            assert run.engine.stats().links.regions == 0


# --- When it is let go of ---


async def test_a_region_is_let_go_of_when_no_request_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the release is not answered; new requests are refused, and what is on its way is answered."""
    async with host() as run:
        await fill(run.ask, 1)
        frontend = await run.connect()
        expected = await run.select(tokens(0, [(1, 3, 1)], queries=queries(1)))
        with shared_memory(BYTES) as memory:
            before = mappings()
            region = await run.share(frontend, memory)
            waits = tokens(0, [(1, LENGTH, 1)], queries=queries(1), wait=True)
            places = {name: (region, ALL[name]) for name in ("queries", "block_ids")}
            frontend.write(frontend.lay(waits, 1, places))
            await eventually(lambda: run.engine.stats().waiting)
            monkeypatch.setattr(regions, "_RELEASE_SECONDS", 0.05)
            with pytest.raises(ResourceExhaustedError, match=f"requests have used region {region} for 0.05 s more"):
                await release_soon(frontend, region)
            monkeypatch.setattr(regions, "_RELEASE_SECONDS", TIMEOUT)
            releasing = asyncio.create_task(release_soon(frontend, region))
            frontend.write(
                frontend.lay(tokens(0, [(1, 3, 1)], queries=queries(1)), 2)._replace(block_ids_region=region)
            )
            assert f"the link has no region {region}" in (await told(frontend, 2)).message
            assert not releasing.done() and mappings() == before + 1
            await run.ask(tokens(0, [(1, LENGTH, 1)], keys=np.zeros((1, DIM), np.float32)))
            assert isinstance(await told(frontend, 1), TokenAnswer)
            await asyncio.wait_for(releasing, TIMEOUT)
            assert mappings() == before
            other = await run.share(frontend, memory)
            frontend.write(frontend.lay(tokens(0, [(1, 3, 1)], queries=queries(1)), 4, {"block_ids": (other, 0)}))
            np.testing.assert_array_equal((await told(frontend, 4)).block_ids, expected)


async def test_a_link_that_goes_takes_its_regions_along_when_nothing_reads_them() -> None:
    """A kernel that runs reads and writes them to its end."""
    async with host() as run:
        await fill(run.ask, 1)
        held: dict[str, Callable[[], Any]] = {
            "prefill": lambda: tokens(0, [(1, 0, 20)], queries=queries(20)),
            "append": lambda: both((1, LENGTH, 1)),
        }
        for phase, request in held.items():
            frontend = await run.connect()
            with shared_memory(BYTES) as memory:
                before = mappings()
                region = await run.share(frontend, memory)
                with run.backend.held(phase) as entered:  # type: ignore[arg-type]
                    places = {name: (region, ALL[name]) for name in ("queries", "block_ids")}
                    frontend.write(frontend.lay(request(), 1, places))
                    await run.reached(entered)
                    run.leave(frontend)
                    await asyncio.sleep(0.05)
                    assert mappings() == before + 1
                await eventually(partial(let_go, before))
        await run.ask(both((1, LENGTH + 1, 1)))


async def test_links_that_wait_go_with_their_regions() -> None:
    async with host() as run:
        await fill(run.ask, 1)
        with shared_memory(BYTES) as memory:
            before = mappings(), files()
            frontends = [await run.connect() for _ in range(40)]
            for ticket, frontend in enumerate(frontends):
                region = await run.share(frontend, memory)
                waits = tokens(1, [(1, LENGTH, 1)], queries=queries(1), wait=True)
                at = 1 << 10
                frontend.write(
                    frontend.lay(waits, 0, {"queries": (region, ticket * at), "block_ids": (region, ticket * at + 512)})
                )
            await eventually(lambda: run.engine.stats().waiting == 40)
            for frontend in frontends[::2]:
                run.leave(frontend)
            await eventually(lambda: mappings() == before[0] + 20)
            await run.ask(tokens(1, [(1, LENGTH, 1)], keys=np.zeros((1, DIM), np.float32)))
            answers = [await told(frontend, 0) for frontend in frontends[1::2]]
            for answer in answers:
                np.testing.assert_array_equal(answer.block_ids, answers[0].block_ids)
            for frontend in frontends[1::2]:
                run.leave(frontend)
            del frontend, frontends
            await eventually(lambda: (mappings(), files()) == before)


async def test_the_file_cannot_be_taken_from_under_the_engine() -> None:
    async with host() as run:
        await fill(run.ask, 1)
        frontend = await run.connect()
        with shared_memory(BYTES) as memory:
            region = await run.share(frontend, memory)
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fd, 0)
        # The client's own file is closed.
        frontend.write(lay(frontend, region, 1))
        assert isinstance(await told(frontend, 1), TokenAnswer)


def test_a_region_is_collected_in_the_middle_of_anything() -> None:
    """The collector runs wherever memory is allocated: inside a lock, too, of what another region is opened by."""
    closed: list[bool] = []

    def collect() -> None:
        region = regions.Region(0, 1, False, lambda: closed.append(True))
        region.itself = region  # type: ignore[attr-defined]
        del region
        with regions._opener._shutdown_lock:
            gc.collect()

    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    collector.join(5)
    assert not collector.is_alive()
    deadline = time.monotonic() + 5
    while not closed:
        assert time.monotonic() < deadline
        time.sleep(0.001)
