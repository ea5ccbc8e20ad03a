"""Frontends of another make: whatever they write, the engine lives, and who asks rightly beside them is answered."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.ring_messages import Places, Request, Spans, TokenAnswer, TokenRequest
from blockdex.contract.errors import BlockdexError
from blockdex.ring.layout import AT, CANCEL, REQUEST, REQUEST_STRUCT, RequestSlot
from blockdex.ring.sharing import release
from support.asking import eventually
from support.foreign_frontend import ForeignFrontend
from support.foreign_host import DIM, HEADS, LENGTH, SMALL, both, fill, host, told
from support.naive_engine import NaiveEngine, check_same
from support.ring import wake
from support.running_engine import SPEC, block_ids, fork, get, open_sequence, tokens, truncate, values
from support.shared_memory import shared_memory

ROW = (1, LENGTH, 1)
NO_SPANS = Spans(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64))
WORDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    # More bytes than the spans have tokens, and fewer: the sizes agree with each other, not with the spans.
    "two keys": (both(ROW), {"num_spans": 1, "keys": 2}, "keys: [1, 16] of bf16 takes 32 bytes, got 64"),
    "no keys": (both(ROW), {"keys": 0}, "keys: [1, 16] of bf16 takes 32 bytes, got 0"),
    "two queries": (both(ROW), {"queries": 2}, "queries: [1, 4, 16] of bf16 takes 128 bytes, got 256"),
    "keys of another dtype": (both(ROW), {"keys_dtype": 3}, "keys: [1, 16] of fp32 takes 64 bytes, got 32"),
    "queries of another dtype": (
        both(ROW),
        {"queries_dtype": 4},
        "queries: [1, 4, 16] of fp8_e4m3 takes 64 bytes, got 128",
    ),
    "fewer heads": (both(ROW), {"num_heads": 3}, "queries: [1, 3, 16] of bf16 takes 96 bytes, got 128"),
    "no heads": (both(ROW), {"num_heads": 0}, "num_heads must be at least 1, got 0"),
    "more heads": (both(ROW), {"num_heads": 5}, "first_head + num_heads must be at most 4, got 0 + 5"),
    "heads that there are not": (both(ROW), {"first_head": 2**32 - 1}, "first_head must be below 4, got 4294967295"),
    "a layer that there is not": (both(ROW), {"layer": 3}, "layer must be below 3, got 3"),
    "a long tensor for a short span": (both((1, LENGTH, 2)), {"length": 1}, "takes 32 bytes, got 64"),
    "no tokens": (both(ROW), {"length": 0}, "sequence 1: length must be at least 1, got 0"),
    "fewer than no tokens": (both(ROW), {"length": -1}, "sequence 1: length must be at least 1, got -1"),
    "tokens without end": (both(ROW), {"length": 2**62}, "start + length must be at most 4096, got 30 + 4611686"),
    "a start below 0": (both(ROW), {"start": -1}, "sequence 1: start must be at least 0, got -1"),
    "no spans": (dataclasses.replace(tokens(0, [ROW]), spans=NO_SPANS), {}, "spans: must be 1 to 64, got 0"),
    "many spans": (both(*[(name, 0, 1) for name in range(65)]), {}, "spans: must be 1 to 64, got 65"),
    "a sequence twice": (both(ROW, ROW), {}, "spans: sequence 1 is named 2 times, at most 1 is allowed"),
    "neither": (tokens(0, [ROW]), {}, "request: has neither keys nor queries"),
    "a large message": (
        tokens(0, [(1, 0, 2100)], keys=np.zeros((2100, DIM), np.float32)),
        {},
        "keys and queries together must be at most 65536 bytes, got 67200",
    ),
    "no tenant": (get(1, tenant=""), {}, "blockdex-tenant: must have 1 to 256 characters, got 0"),
    "a long tenant": (get(1, tenant="t" * 257), {}, "blockdex-tenant: must have 1 to 256 characters, got 257"),
    "a tenant of no text": (get(1, tenant="\x07"), {}, r"blockdex-tenant: must be printable ASCII, got '\x07'"),
    "a fork beyond all lengths": (fork(1, 9, 5), {"number": 2**64 - 1}, "length must be 0 to 4096, got 1844674407"),
    "a truncation beyond all": (truncate(1, 5), {"number": 2**63}, "sequence 1: length must be 0 to 4096, got 922337"),
}
"""What is wrong, by name: a request, what is changed of it, and the words that refuse it."""


def tampered(frontend: ForeignFrontend, request: Any, ticket: int, changes: dict[str, Any]) -> RequestSlot:
    """Lays a request of which something was changed."""
    changes = dict(changes)
    if "keys" in changes or "queries" in changes:
        halves = {
            half: dataclasses.replace(
                getattr(request, half),
                tensor=dataclasses.replace(
                    getattr(request, half).tensor,
                    data=getattr(request, half).tensor.data * changes.pop(half, 1),
                ),
            )
            for half in ("keys", "queries")
        }
        request = dataclasses.replace(request, **halves)
    columns = {"start": "starts", "length": "lengths"}
    for name, column in columns.items():
        if name in changes:
            spans = dataclasses.replace(request.spans, **{column: np.array([changes.pop(name)], np.int64)})
            request = dataclasses.replace(request, spans=spans)
    return frontend.lay(request, ticket)._replace(**changes)


async def test_a_wrong_request_is_refused_in_words(caplog: pytest.LogCaptureFixture) -> None:
    async with host() as run:
        await fill(run.ask, 1, 2)
        frontend = await run.connect()
        await run.ask(both((2, LENGTH, 1)))
        taken = run.step_requests
        for ticket, (name, (request, changes, words)) in enumerate(WORDS.items()):
            frontend.write(tampered(frontend, request, ticket, changes))
            answer = await told(frontend, ticket)
            assert isinstance(answer, BlockdexError), name
            assert words in answer.message, name
            assert answer.reason != "INTERNAL", name
        assert run.step_requests == taken
        frontend.write(frontend.lay(both(ROW), 1000))
        assert isinstance(await told(frontend, 1000), TokenAnswer)
        assert run.step_requests == taken + 1
        assert not frontend.is_hung_up()
        assert "batch failed" not in caplog.text


async def test_a_link_of_one_tenant_serves_no_other() -> None:
    async with host() as run:
        await fill(run.ask, 1)
        frontend = await run.connect("tenant")
        taken = run.step_requests
        frontend.write(
            *[frontend.lay(request, ticket) for ticket, request in enumerate((both(ROW, tenant=""), get(1, tenant="")))]
        )
        assert isinstance(await told(frontend, 0), TokenAnswer)
        assert run.step_requests == taken + 1
        assert (await told(frontend, 1)).lengths[0] == LENGTH + 1
        for ticket, request in enumerate((both(ROW), get(1), get(1, tenant="another")), start=2):
            frontend.write(frontend.lay(request, ticket))
            refused = await told(frontend, ticket)
            assert refused.reason == "INVALID_TENANT"
            words = f"tenant: the link's is 'tenant', a request of it names none, got {request.tenant!r}"
            assert refused.message == words
        stranger = await run.connect("another")
        stranger.write(stranger.lay(both(ROW, tenant=""), 0))
        assert (await told(stranger, 0)).reason == "UNKNOWN_SEQUENCE"


UNUSUAL: dict[str, tuple[Any, dict[str, Any]]] = {
    "by score, with scores": (both(ROW, order="score", scores=True), {}),
    "in fp32": (both(ROW, dtype="fp32"), {}),
    "keys alone": (tokens(0, [ROW], keys=np.ones((1, DIM), np.float32)), {}),
    "many keys, and an order of no queries": (
        tokens(0, [(1, 9, 9)], keys=np.ones((9, DIM), np.float32)),
        {"order": 77},
    ),
    "queries alone": (tokens(0, [(1, 3, 1)], queries=np.ones((1, HEADS, DIM), np.float32)), {}),
    "some of the heads": (tokens(0, [(1, 3, 1)], queries=np.ones((1, 1, DIM), np.float32), first_head=2), {}),
    "another epoch": (both(ROW, epoch=3), {}),
    "too late": (both(ROW), {"deadline": 5}),
    "a gap": (both((1, LENGTH + 2, 1)), {}),
    "an unknown sequence": (both((77, LENGTH, 1)), {}),
    "an unknown tenant": (both(ROW, tenant="another"), {}),
    "a revision": (both((1, LENGTH, 1, 7)), {}),
    "the same again": (both((1, LENGTH, 1, 7)), {}),
    "a stale one": (both((1, LENGTH, 1, 6)), {}),
    "a new page": (both((1, LENGTH, 4)), {}),
    "a page less": (both((1, 9, 2)), {}),
    "a prefill": (both((1, 9, 9)), {}),
}
"""What is right, or wrong for the cache alone."""


async def test_what_is_less_common_is_answered_as_all_is() -> None:
    async with host() as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)

        async def ask(request: Request) -> None:
            naive.answer(request)
            await run.ask(request)

        await fill(ask, 1)
        frontend = await run.connect()
        for ticket, (name, (request, changes)) in enumerate(UNUSUAL.items()):
            frontend.write(frontend.lay(request, ticket)._replace(**changes))
            answer = await told(frontend, ticket)
            if name == "too late":
                assert answer.reason == "DEADLINE_EXCEEDED"
            else:
                expected = naive.answer(request)
                assert expected is not None
                check_same(answer, expected, name)


BROKEN: dict[str, dict[str, Any]] = {
    "no kind": {"kind": 0},
    "another kind": {"kind": 11},
    "keys of no dtype": {"keys_dtype": 5},
    "queries of no dtype": {"queries_dtype": 255},
    "keys without a dtype": {"keys_dtype": 0},
    "queries without a dtype": {"queries_dtype": 0},
    "no order": {"order": 0},
    "another order": {"order": 3},
    "another flag": {"flags": 32},
    "an offset that is not aligned": {"payload_offset": 8},
    "an offset beyond the arena": {"payload_offset": 2**64 - 64},
    "a payload beyond the arena": {"payload_bytes": 2**64 - 1},
    "a tenant beyond the payload": {"tenant_bytes": 2**16 - 1},
    "more spans than there is room for": {"num_spans": 2**32 - 1},
    "more keys": {"keys_bytes": 2**64 - 1},
    "more queries": {"queries_bytes": 2**63},
}


@pytest.mark.parametrize("name", BROKEN)
async def test_what_means_nothing_ends_the_link(name: str, caplog: pytest.LogCaptureFixture) -> None:
    async with host() as run:
        await fill(run.ask, 1)
        frontend = await run.connect()
        frontend.write(frontend.lay(both(ROW), 1)._replace(**BROKEN[name]), frontend.lay(get(1), 2))
        await eventually(frontend.is_hung_up)
        assert "link broken" in caplog.text
        assert not frontend.read()
        assert block_ids(await run.ask(both(ROW))).shape == (1, HEADS, SPEC.topk)


FLOOD = """
import contextlib, mmap, os, sys
fd, bell, read, written, slots = map(int, sys.argv[1:])
counters = memoryview(mmap.mmap(fd, 0)).cast("Q")
while True:
    with contextlib.suppress(BlockingIOError):
        os.write(bell, b"0")
    for _ in range(100):
        counters[written] = counters[read] + slots
"""


async def test_who_never_stops_is_not_the_only_one_who_is_served() -> None:
    """Its ring is always full of what is done with at once."""
    async with host() as run:
        await fill(run.ask, 1)
        frontend = await run.connect()
        segment, slots = frontend.handles.segment, SMALL.max_queued_requests
        read, written = AT["requests_read"] // 8, AT["requests_written"] // 8
        frontend.write(*[RequestSlot(ticket=1, kind=CANCEL)] * slots)
        files = (segment.fd, frontend.handles.engine_bell)
        arguments = [str(number) for number in (*files, read, written, slots)]
        with subprocess.Popen([sys.executable, "-c", FLOOD, *arguments], pass_fds=files) as flooding:
            try:
                await eventually(lambda: segment.counters[read] > 10 * slots)
                for _ in range(5):
                    await run.ask(both(ROW, dtype="fp32"))
                    await run.ask(both(ROW))
            finally:
                flooding.kill()


# --- Whatever comes ---

EDGES = (0, 1, 2, 3, 4, 5, 7, 8, 31, 63, 64, 65, 127, 128, 255, 256, 4095, 4096, 2**16 - 1, 2**31, 2**32 - 1, 2**62)
REGION_BYTES = 1 << 14
TOP = (2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1)


class Fuzzer:
    """Requests of another tenant, most of which something was done to; what is right about them is theirs alone."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._ticket = 0

    def request(self) -> Request:
        """A request that is right, or nearly."""
        random, sequence = self._random, int(self._random.integers(1, 5))
        length = int(random.choice([1, 1, 1, 2, 4, 9]))
        start = int(random.choice([0, 8, LENGTH, LENGTH - 1, LENGTH + 3]))
        keys, queries = values(random, length, DIM), values(random, length, HEADS, DIM)
        usual: list[Any] = [
            open_sequence(sequence, tenant="foreign"),
            get(sequence, tenant="foreign"),
            fork(sequence, int(random.integers(1, 9)), start, tenant="foreign"),
            truncate(sequence, max(start, LENGTH), tenant="foreign"),
            tokens(1, [(sequence, start, length)], keys=keys, tenant="foreign"),
            tokens(1, [(sequence, 0, length)], queries=queries, tenant="foreign"),
            *[both((sequence, LENGTH, min(length, 4)), tenant="foreign")] * 2,
            *[both((1, LENGTH, 1), (2, LENGTH - 1, 2), tenant="foreign")] * 2,
        ]
        request: Request = usual[random.integers(len(usual))]
        return request

    def _places(self, frontend: ForeignFrontend, request: Request) -> Places:
        """Some of a token request's tensors lie in regions, where these have them, mostly."""
        random, regions = self._random, list(frontend.regions)
        if not isinstance(request, TokenRequest) or random.random() < 0.5:
            return {}
        halves = {"keys": request.keys, "queries": request.queries, "block_ids": request.queries}
        return {
            name: (int(random.choice(regions)), 64 * int(random.integers(REGION_BYTES // 64 - 32)))
            for name, half in halves.items()
            if half is not None and random.random() < 0.6
        }

    def write(self, frontend: ForeignFrontend) -> None:
        """Lays and shows a request; now and then its payload changes afterwards."""
        random = self._random
        self._ticket += 1
        request = self.request()
        slot = frontend.lay(request, self._ticket, self._places(frontend, request))
        arena, begin = frontend.arena, slot.payload_offset
        columns = slice(begin, begin + min(slot.payload_bytes, 8 + 32 * slot.num_spans))
        what = random.random()
        written: RequestSlot | bytes = slot
        if what < 0.35:
            written = self._with_a_field_changed(slot)
        elif what < 0.55 and columns.stop > columns.start:
            for _ in range(random.integers(1, 4)):
                arena[random.integers(columns.start, columns.stop)] = random.choice([0, 1, 2, 255, 127, 30])
        elif what < 0.65:
            garbled = bytearray(REQUEST_STRUCT.pack(*slot))
            for _ in range(random.integers(1, 6)):
                garbled[random.integers(8, len(garbled))] = random.integers(256)
            written = bytes(garbled)
        elif what < 0.68:
            written = REQUEST_STRUCT.pack(*slot)[:8] + random.bytes(120)
        frontend.write(written)
        if what > 0.85 and columns.stop > columns.start:
            for _ in range(20):
                arena[random.integers(columns.start, columns.stop)] = random.choice([0, 1, 30, 31, 255])

    def _with_a_field_changed(self, slot: RequestSlot) -> RequestSlot:
        random, field = self._random, REQUEST[self._random.integers(1, len(REQUEST))]
        value = int(getattr(slot, field.name))
        bits = 8 * field.size
        choices = (*EDGES, *TOP, value + 1, value - 1, value + 64, value - 64, 2 * value)
        changed = choices[random.integers(len(choices))] % 2**bits
        if field.code.islower() and changed >= 2 ** (bits - 1):
            changed -= 2**bits
        return slot._replace(**{field.name: changed})


async def fuzz(seed: int, rounds: int) -> int:
    """Asks rightly over one link while anything comes over others; answers how many of those were hung up."""
    fuzzer, broken = Fuzzer(seed), 0
    random = np.random.default_rng([seed, 1])
    async with contextlib.AsyncExitStack() as shared:
        run = await shared.enter_async_context(host(num_pages=4096))
        naive = NaiveEngine(SPEC, run.engine.info().epoch)

        async def ask(request: Request) -> None:
            answer = await run.ask(request)
            expected = naive.answer(request)
            assert expected is not None
            check_same(answer, expected, str(request))

        await fill(ask, 1, 2, 3)
        await fill(run.ask, 1, 2, tenant="foreign")

        async def connect() -> ForeignFrontend:
            frontend = await run.connect()
            for _ in range(3):
                await run.share(frontend, memory)
            assert frontend.connected is not None
            await asyncio.to_thread(release, frontend.connected, 2)
            return frontend

        memory = shared.enter_context(shared_memory(REGION_BYTES))
        frontends = [await connect() for _ in range(2)]
        for number in range(rounds):
            for index, frontend in enumerate(frontends):
                for _ in range(random.integers(1, 8)):
                    if frontend.free:
                        fuzzer.write(frontend)
                frontend.told.clear()
                with contextlib.suppress(AssertionError, ValueError):  # a ticket, or a region, that it has spoilt
                    frontend.read()
                if frontend.is_hung_up():
                    broken += 1
                    run.leave(frontend)
                    frontends[index] = await connect()
            sequence = int(random.integers(1, 4))
            at = LENGTH - int(random.integers(0, 2))
            await ask(both((sequence, at, 1)) if number % 3 else both((1, LENGTH, 1), (2, LENGTH, 1), order="score"))
        assert run.step_requests > rounds // 2
        assert run.engine.stats().dropped["deadline"] < rounds * 16
    return broken


@pytest.mark.parametrize("seed", [0, 1])
async def test_whatever_comes_over_one_link_the_others_are_served(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    assert await fuzz(seed, rounds=150) > 10
    assert "batch failed" not in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(2, 10))
async def test_whatever_comes_for_long(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    assert await fuzz(seed, rounds=1500) > 100
    assert "batch failed" not in caplog.text


@pytest.mark.parametrize("lies", [False, True], ids=["", "says that there is room"])
@pytest.mark.parametrize("request_", [get(1), both(ROW), both(ROW, dtype="fp32")], ids=["sequence", "core", "batch"])
async def test_who_does_not_read_waits_and_harms_nobody(request_: Request, lies: bool) -> None:
    """Nothing is lost: it may only be slow, on a machine where others want its core."""
    async with host() as run:
        await fill(run.ask, 1, 2)
        frontend, sent = await run.connect(), 0
        counters, slots = frontend.handles.segment.counters, frontend.handles.segment.answer_slots

        def all_taken() -> bool:
            if lies:
                frontend.handles.segment.flags[AT["engine_waits_for_room"] // 4] = 0
                wake(frontend.handles.engine_bell)
            return counters[AT["requests_read"] // 8] == sent

        while all_taken() and sent < 3 * slots:
            frontend.send(request_, first_ticket=sent)
            sent += 1
            with contextlib.suppress(AssertionError):
                await eventually(all_taken, seconds=1.0)
        assert counters[AT["answers_written"] // 8] == slots
        assert slots < sent < 2 * slots, "what nobody reads the answers of stays in the ring"
        busy = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - busy < 0.15, "it sleeps meanwhile"
        await run.ask(both((2, LENGTH, 1)))
        assert not frontend.is_hung_up()
        while len(frontend.told) < sent:
            frontend.read(1)
            await asyncio.sleep(0)
        assert list(frontend.told) == list(range(sent))
        assert not [told for told in frontend.told.values() if isinstance(told.answer, BlockdexError)]


def links() -> int:
    """Memory of links that this process holds, the frontend's mapping beside the engine's."""
    return Path("/proc/self/maps").read_text("ascii").count("blockdex-ring")


async def ask_one_too_many(frontend: ForeignFrontend) -> None:
    """Asks for one answer more than there are slots for."""
    slots = frontend.handles.segment.answer_slots
    frontend.send(*[get(1)] * slots)
    await eventually(lambda: frontend.free)
    frontend.send(get(1), first_ticket=slots)


@pytest.mark.parametrize("waits", [False, True], ids=["has answers that were not written", "is waited for"])
async def test_the_memory_of_a_link_goes_with_its_frontend(waits: bool) -> None:
    """At once, not when garbage is next collected: it is as large as the largest requests."""
    async with host() as run:
        await fill(run.ask, 1)
        gc.collect()
        before = links()
        gc.disable()
        try:
            for _ in range(4):
                frontend = await run.connect()
                if waits:
                    frontend.send(tokens(0, [ROW], queries=values(np.random.default_rng(5), 1, HEADS, DIM), wait=True))
                    await eventually(lambda: run.engine.stats().waiting)
                else:
                    await ask_one_too_many(frontend)
                run.leave(frontend)
                del frontend
            await eventually(lambda: links() == before)
        finally:
            gc.enable()


async def test_a_counter_that_runs_away_ends_the_link() -> None:
    async with host() as run:
        await fill(run.ask, 1)
        for written in (65, 2**63, 2**64 - 1):
            frontend = await run.connect()
            frontend.handles.segment.counters[AT["requests_written"] // 8] = written
            frontend.bell.ring()
            await eventually(frontend.is_hung_up)
        await run.ask(both(ROW))
