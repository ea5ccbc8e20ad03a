"""The channel over the ring, with a real engine at its other end and peers that break off or break the rules."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import socket
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest

from benchmarks.ring_messages import TokenAnswer, write_request
from blockdex.contract.errors import (
    BlockdexError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from blockdex.contract.messages import SequenceState
from blockdex.ring import client as ring_client
from blockdex.ring.caller import STREAM
from blockdex.ring.handshake import Handles, take
from blockdex.ring.layout import AT, CANCEL, REQUEST_STRUCT, SLOT_BYTES, RequestSlot
from blockdex.ring.listener import RingHost, sizes_of
from blockdex.ring.segment import Segment, Sizes
from blockdex.v1 import indexer_pb2 as pb
from support.asking import Asked, MessageChannel, eventually, waiting_selection, wire_of
from support.naive_engine import NaiveEngine
from support.ring import Bell, Producer
from support.ring_engine import Hosted, hosted
from support.running_engine import (
    LIMITS,
    SPEC,
    TENANT,
    TIMEOUT,
    block_ids,
    close,
    fork,
    get,
    keys_of,
    open_sequence,
    queries_of,
    refusal,
    tokens,
    truncate,
)

LONG = 1600
"""Tokens: 1600 x 4 x 16 x 2 bytes of queries are a good part of a small arena."""


@pytest.mark.parametrize("spin_seconds", [0.0, 0.001])
async def test_every_kind_of_request(random: np.random.Generator, spin_seconds: float) -> None:
    async with hosted(spin_seconds=spin_seconds) as run:
        epoch = (await run.channel.info()).epoch
        naive = NaiveEngine(SPEC, epoch)
        keys, queries = keys_of(random, 40), queries_of(random, 8)
        for request in (
            open_sequence(7),
            tokens(0, [(7, 0, 40, 3)], keys=keys),
            tokens(0, [(7, 36, 4)], queries=queries[:4], scores=True, order="score"),
            tokens(1, [(7, 0, 8)], keys=keys[:8], queries=queries),
            fork(7, 8, 20),
            tokens(0, [(7, 39, 1), (8, 18, 2)], queries=queries[:3, 1:3], first_head=1, scores=True),
            truncate(7, 12),
            get(7),
            get(8),
            get(9),
            get(7, epoch=epoch ^ 1),
            close(7),
            get(7),
        ):
            expected = naive.answer(request)
            try:
                answer = await run.ask(request)
            except BlockdexError as error:
                assert isinstance(expected, BlockdexError)
                assert (type(error), error.reason, error.message) == (type(expected), expected.reason, expected.message)
                continue
            assert type(answer) is type(expected)
            for name in answer.__slots__:
                assert np.array_equal(getattr(answer, name), getattr(expected, name)), name


async def test_the_engine_s_time_is_told(random: np.random.Generator) -> None:
    async with hosted() as run:
        await run.ask(open_sequence(1))
        keys = keys_of(random, 9)
        pending = run.channel.submit(tokens(0, [(1, 0, 9)], keys=keys), TIMEOUT)
        await pending
        assert pending.phase == "append"
        assert set(pending.stage_seconds) == {"queue", "plan", "device", "reply"}
        assert 0 < min(pending.stage_seconds.values()) <= max(pending.stage_seconds.values()) < TIMEOUT


async def test_what_is_asked_about_the_engine(random: np.random.Generator) -> None:
    async with hosted() as run:
        await run.ask(open_sequence(1))
        await run.ask(tokens(0, [(1, 0, 9)], keys=keys_of(random, 9)))
        await eventually(lambda: run.engine.stats().device_seconds["append"] > 0)  # counted after it has answered
        assert await run.channel.info() == run.engine.info()
        asked_for, stats = await run.channel.stats(), run.engine.stats()
        assert dataclasses.replace(asked_for, busy_seconds=stats.busy_seconds) == stats
        asked, there = await run.channel.overview(4), run.engine.overview(4)
        assert all(np.array_equal(getattr(asked, name), getattr(there, name)) for name in asked.__slots__)


async def test_a_deadline_and_a_cancellation_give_everything_back(random: np.random.Generator) -> None:
    async with hosted() as run:
        await run.ask(open_sequence(1))
        waits = tokens(0, [(1, 0, 1)], queries=queries_of(random, 1), wait=True)
        late = run.channel.submit(waits, 0.05)
        given_up = run.channel.submit(waits, TIMEOUT)
        assert (await refusal(late)).reason == Reason.DEADLINE_EXCEEDED
        await eventually(lambda: run.engine.stats().waiting == 1)
        given_up.cancel()
        await eventually(lambda: run.engine.stats().dropped["cancelled"] == 1)
        await run.ask(get(1))
        link = run.channel._link
        assert link is not None and link.waiting == 0
        await run.ask(get(1))
        slot = REQUEST_STRUCT.unpack_from(link._handles.segment.memory, _last_slot(link._handles.segment))
        assert RequestSlot._make(slot).payload_offset == 0, "all room is there"


def _last_slot(segment: Segment) -> int:
    """Offset of the slot that was written last."""
    written = segment.counters[AT["requests_written"] // 8]
    return int(segment.request_slots_offset + (written - 1) % segment.request_slots * SLOT_BYTES)


async def test_answers_that_are_kept_stay_as_they_are(random: np.random.Generator) -> None:
    """What comes later is written where they were."""
    async with hosted() as run:
        await run.ask(open_sequence(1))
        keys, queries = keys_of(random, 64), queries_of(random, 64)
        await run.ask(tokens(0, [(1, 0, 64)], keys=keys))
        kept = [
            (row, block_ids(await run.ask(tokens(0, [(1, row, 1)], queries=queries[row : row + 1]))))
            for row in range(0, 64, 5)
        ]
        copies = [ids.copy() for _, ids in kept]
        for _ in range(200):
            await run.ask(tokens(0, [(1, 63, 1)], queries=queries[:1]))
        assert all(np.array_equal(ids, copy) for (_, ids), copy in zip(kept, copies, strict=True))


@contextlib.asynccontextmanager
async def cramped(
    monkeypatch: pytest.MonkeyPatch, *, requests: int, answers: int, slots: int = 8
) -> AsyncIterator[Hosted]:
    """An engine behind a ring with little room."""
    monkeypatch.setattr("blockdex.ring.listener.sizes_of", lambda spec, limits: Sizes(slots, requests, answers))
    async with hosted() as run:
        await run.ask(open_sequence(1))
        yield run


async def test_requests_wait_for_room_in_their_order(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(random, LONG)
    async with cramped(monkeypatch, requests=100_000, answers=1 << 20, slots=2) as run:
        appends = [
            run.channel.submit(tokens(0, [(1, 100 * step, 100)], keys=keys[100 * step : 100 * step + 100]), TIMEOUT)
            for step in range(16)
        ]
        gone = run.channel.submit(tokens(0, [(1, 0, 1)], keys=keys[:1]), TIMEOUT)
        gone.cancel()
        await asyncio.wait_for(asyncio.gather(*appends), TIMEOUT)
        state = await run.ask(get(1))
        assert isinstance(state, SequenceState) and state.lengths is not None
        assert state.lengths[0] == LONG, "had one overtaken another, there would have been a gap; the last was given up"


async def test_no_room_for_long_is_overload(random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_client, "ROOM_SECONDS", 0.2)
    async with cramped(monkeypatch, requests=250_000, answers=1 << 20) as run:
        queries = queries_of(random, LONG)
        waits = run.channel.submit(tokens(0, [(1, 0, LONG)], queries=queries, wait=True), TIMEOUT)
        error = await refusal(run.channel.submit(tokens(0, [(1, 0, LONG)], queries=queries), TIMEOUT))
        assert (type(error), error.reason) == (ResourceExhaustedError, Reason.OVERLOADED)
        waits.cancel()
        await run.ask(tokens(0, [(1, 0, LONG)], keys=keys_of(random, LONG)))
        await run.ask(tokens(0, [(1, 0, LONG)], queries=queries))


async def test_a_deadline_beyond_what_a_ring_can_say_is_as_good_as_none() -> None:
    async with hosted() as run:
        for sequence, timeout in enumerate((1e10, 3.6e11, math.inf)):
            await run.channel.submit(open_sequence(sequence), timeout)
            await run.ask(get(sequence))


async def test_answers_wait_for_room_and_the_engine_does_not(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frontend that does not look at its answers holds up its own, and nobody else's."""
    async with cramped(monkeypatch, requests=1 << 20, answers=256_000) as run:
        await run.ask(tokens(0, [(1, 0, LONG)], keys=keys_of(random, LONG)))
        queries = queries_of(random, LONG)
        request = tokens(0, [(1, 0, LONG)], queries=queries)  # answered with 102,400 bytes
        link = run.channel._link
        assert link is not None
        bell, counters = link._handles.client_bell, link._handles.segment.counters
        link._loop.remove_reader(bell)
        three = [run.channel.submit(request, TIMEOUT) for _ in range(3)]
        await eventually(lambda: run.engine.stats().tokens["prefill"] == 3 * LONG)
        await eventually(lambda: counters[AT["answers_written"] // 8] == 2 + 2)
        await asyncio.sleep(0.05)
        assert counters[AT["answers_written"] // 8] == 2 + 2, "there is room for two; two came before"
        async with another(run) as other:
            await asyncio.wait_for(other.submit(get(1), TIMEOUT), TIMEOUT)
        link._loop.add_reader(bell, link._woken)
        for answer in await asyncio.wait_for(asyncio.gather(*three), TIMEOUT):
            assert block_ids(answer).shape == (LONG, 4, SPEC.topk)


async def test_an_answer_beyond_all_room_is_a_fault_and_not_a_hang(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cramped(monkeypatch, requests=1 << 20, answers=50_000) as run:
        await run.ask(tokens(0, [(1, 0, LONG)], keys=keys_of(random, LONG)))
        queries = queries_of(random, LONG)
        error = await refusal(run.channel.submit(tokens(0, [(1, 0, LONG)], queries=queries), TIMEOUT))
        assert error.reason == Reason.INTERNAL
        assert "102400 bytes" in error.message
        await run.ask(get(1))


def test_the_room_is_enough_for_the_largest() -> None:
    sizes = sizes_of(SPEC, LIMITS)
    assert sizes.slots == LIMITS.max_queued_requests
    assert sizes.request_bytes > 2 * (LIMITS.max_message_bytes + 32 * LIMITS.max_spans)
    largest_answer = LIMITS.max_message_bytes // SPEC.head_dim * SPEC.topk * 8  # fp8 queries, with scores
    assert sizes.answer_bytes > 2 * largest_answer


async def test_too_many_requests_are_refused_wherever_they_come_from() -> None:
    limits = LIMITS.__class__(
        **{**{name: getattr(LIMITS, name) for name in LIMITS.__slots__}, "max_queued_requests": 6}
    )
    async with hosted(limits=limits) as run, another(run) as other:
        await run.ask(open_sequence(1))
        waits = tokens(0, [(1, 0, 1)], queries=np.zeros((1, 4, SPEC.head_dim), np.float32), wait=True)
        pending = [run.channel.submit(waits, TIMEOUT) for _ in range(4)]
        await eventually(lambda: run.engine.stats().waiting == 4)
        pending += [other.submit(waits, TIMEOUT) for _ in range(2)]
        await eventually(lambda: run.engine.stats().waiting == 6)
        error = await refusal(other.submit(get(1), TIMEOUT))
        assert (error.message, error.reason) == ("queue: at most 6 requests may wait, 6 do", Reason.OVERLOADED)
        pending += [run.channel.submit(waits, TIMEOUT) for _ in range(2)]
        error = await refusal(run.channel.submit(waits, TIMEOUT))
        assert (error.message, error.reason) == ("queue: at most 6 requests may wait, 6 do", Reason.OVERLOADED)
        for one in pending:
            one.cancel()


@contextlib.asynccontextmanager
async def another(run: Hosted) -> AsyncIterator[MessageChannel]:
    """One more channel to an engine."""
    there = asyncio.Event()
    channel = MessageChannel(run.address, changed=lambda connected: there.set() if connected else None)
    running = asyncio.create_task(channel.run())
    await asyncio.wait_for(there.wait(), TIMEOUT)
    yield channel
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_frontend_that_goes_takes_only_its_own_with_it(random: np.random.Generator) -> None:
    async with hosted() as run:
        await run.ask(open_sequence(1))
        waits = tokens(0, [(1, 0, 1)], queries=queries_of(random, 1), wait=True)
        own = run.channel.submit(waits, TIMEOUT)
        async with another(run) as other:
            lost = other.submit(waits, TIMEOUT)
            await eventually(lambda: run.engine.stats().waiting == 2)
        assert isinstance(lost.exception(), UnavailableError)
        await eventually(lambda: run.engine.stats().dropped["cancelled"] == 1)
        await run.ask(tokens(0, [(1, 0, 1)], keys=keys_of(random, 1)))
        assert isinstance(await own, TokenAnswer)


async def test_an_engine_that_goes_and_comes_back() -> None:
    async with hosted() as run:
        await run.ask(open_sequence(1))
        waits = tokens(0, [(1, 0, 1)], queries=np.zeros((1, 4, SPEC.head_dim), np.float32), wait=True)
        lost = run.channel.submit(waits, TIMEOUT)
        run.hosting.cancel()
        error = await refusal(lost)
        assert (type(error), error.reason) == (UnavailableError, Reason.UNREACHABLE)
        with pytest.raises(UnavailableError, match="engine: it is gone"):
            run.channel.submit(get(1), TIMEOUT)
        with pytest.raises(UnavailableError, match="engine: it is gone"):
            await run.channel.info()
        hosting = asyncio.create_task(RingHost(run.engine, run.inbox, run.listening).run())
        await asyncio.wait_for(run.there.wait(), TIMEOUT)
        assert isinstance(await run.ask(get(1)), SequenceState)
        hosting.cancel()


async def test_requests_of_a_stream(random: np.random.Generator) -> None:
    async with hosted() as run:
        await run.ask(open_sequence(1))
        asker, send = Asked(), run.channel.send
        assert send(asker, STREAM, TENANT, TIMEOUT, waiting_selection(1))
        assert send(asker, STREAM, TENANT, TIMEOUT, waiting_selection(2, timeout_ms=30))
        assert send(asker, STREAM, TENANT, 0.03, waiting_selection(3))
        assert send(asker, STREAM, TENANT, TIMEOUT, waiting_selection(4))
        for number in (2, 3):
            assert (await asker.error(number)).reason == Reason.DEADLINE_EXCEEDED
        given_up = run.channel.give_up(asker, 4)
        assert given_up is not None and (given_up.number, given_up.rpc) == (4, "Stream/SelectBlocks")
        await eventually(lambda: run.engine.stats().dropped["cancelled"] == 1)
        assert run.channel.give_up(asker, 4) is None
        await run.ask(tokens(0, [(1, 0, 1)], keys=keys_of(random, 1)))
        await eventually(lambda: 1 in asker.told)
        response = asker.told[1]
        assert isinstance(response, bytes)
        ids = np.frombuffer(pb.StreamResponse.FromString(response).select_blocks.block_ids.data, "<i4")
        np.testing.assert_array_equal(ids.reshape(4, SPEC.topk), [[0] + [-1] * (SPEC.topk - 1)] * 4)
        assert set(asker.told) == {1, 2, 3}, "nobody is told of what was given up"


async def test_requests_end_with_the_engine() -> None:
    async with hosted() as run:
        await run.ask(open_sequence(1))
        asker = Asked()
        assert run.channel.send(asker, STREAM, TENANT, TIMEOUT, waiting_selection(1))
        run.hosting.cancel()
        assert (await asker.error(1)).reason == Reason.UNREACHABLE
        assert not run.channel.send(asker, STREAM, TENANT, TIMEOUT, waiting_selection(2))


async def test_nothing_overtakes_what_waits_for_room(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cramped(monkeypatch, requests=250_000, answers=1 << 20) as run:
        queries = queries_of(random, LONG)
        long_one = tokens(0, [(1, 0, LONG)], queries=queries, wait=True)
        first, second, short = Asked(), Asked(), Asked()
        for asker in (first, second):
            _, message = wire_of(long_one)
            assert run.channel.send(asker, 1, TENANT, TIMEOUT, message)
        assert run.channel.send(short, STREAM, TENANT, TIMEOUT, waiting_selection(1, layer=1))
        await asyncio.sleep(0.05)
        assert run.engine.stats().waiting == 1
        run.channel.give_up(second, 0)
        await eventually(lambda: run.engine.stats().waiting == 2)
        run.channel.give_up(first, 0)
        await eventually(lambda: run.engine.stats().waiting == 1)
        run.channel.give_up(short, 1)


async def test_draining() -> None:
    async with hosted() as run:
        await run.ask(open_sequence(1))
        waits = tokens(0, [(1, 0, 1)], queries=np.zeros((1, 4, SPEC.head_dim), np.float32), wait=True)
        pending, soon = run.channel.submit(waits, TIMEOUT), run.channel.submit(waits, 0.01)
        run.channel.refuse_new()
        with pytest.raises(UnavailableError, match="takes no new requests"):
            run.channel.submit(waits, TIMEOUT)
        assert not run.channel.send(Asked(), STREAM, TENANT, TIMEOUT, waiting_selection(3))
        await run.channel.drain(0.05)
        assert (await refusal(soon)).reason == Reason.DEADLINE_EXCEEDED
        assert (await refusal(pending)).message == "server: shutting down, the request was not done within 0.05 s"
        await asyncio.wait_for(run.channel.drain(TIMEOUT), TIMEOUT)


async def _connected(run: Hosted) -> tuple[socket.socket, Handles]:
    """A bare link."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connected, run.address)
    return connected, await asyncio.wait_for(take(connected), TIMEOUT)


@pytest.mark.parametrize("what", ["kind", "payload", "counter", "ticket"])
async def test_who_breaks_the_rules_loses_its_link(what: str, caplog: pytest.LogCaptureFixture) -> None:
    async with hosted() as run:
        await run.ask(open_sequence(1))
        connected, handles = await _connected(run)
        segment = handles.segment
        producer = Producer(segment, "request", Bell(segment, "engine_sleeps", handles.engine_bell))
        waits = tokens(0, [(1, 0, 1)], queries=np.zeros((1, 4, SPEC.head_dim), np.float32), wait=True)
        now = time.monotonic()
        write_request(segment, producer.claim(), 0, 1, waits, now, now + TIMEOUT)
        producer.publish()
        await eventually(lambda: run.engine.stats().waiting == 1)
        match what:
            case "kind":
                REQUEST_STRUCT.pack_into(segment.memory, producer.claim(), *RequestSlot(kind=77))
            case "payload":
                REQUEST_STRUCT.pack_into(segment.memory, producer.claim(), *RequestSlot(kind=2, payload_bytes=2**60))
            case "ticket":
                write_request(segment, producer.claim(), 0, 1, waits, now, now + TIMEOUT)
        producer.publish()
        if what == "counter":
            segment.counters[AT["requests_written"] // 8] = 1 << 40
            producer._bell.ring()
        loop = asyncio.get_running_loop()
        assert await asyncio.wait_for(loop.sock_recv(connected, 1), TIMEOUT) == b"", "it is hung up"
        connected.close()
        handles.close()
        await eventually(lambda: run.engine.stats().waiting == 0)
        assert "link broken" in caplog.text
        await run.ask(get(1))


async def test_a_request_that_comes_while_the_engine_lies_down_is_seen() -> None:
    """Too early for the bell, since nobody sleeps yet, and too late for the look before: one of many does."""
    async with hosted() as run:
        connected, handles = await _connected(run)
        segment = handles.segment
        producer = Producer(segment, "request", Bell(segment, "engine_sleeps", handles.engine_bell))
        read, sleeps = AT["requests_read"] // 8, AT["engine_sleeps"] // 4
        for number in range(1000):
            deadline = time.monotonic() + TIMEOUT
            while segment.counters[read] < number or (number % 2 and not segment.flags[sleeps]):
                assert time.monotonic() < deadline, f"request {number} was not seen"
            REQUEST_STRUCT.pack_into(segment.memory, producer.claim(), *RequestSlot(ticket=1, kind=CANCEL))
            producer.publish()
        connected.close()
        handles.close()


async def test_who_goes_while_it_connects_harms_nobody() -> None:
    async with hosted() as run:
        for seconds in (0.0, 0.01):
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connected.connect(run.address)
            await asyncio.sleep(seconds)
            connected.close()
        await run.ask(open_sequence(1))
        await eventually(lambda: len(run.inbox._links) == 1)


async def test_a_stranger_s_greeting_is_refused() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.sendall(b"HTTP/1.1")
        with pytest.raises(Exception, match="version 3 and 3 files, got 312e312f50545448, 0, 0"):
            await asyncio.wait_for(take(left), TIMEOUT)
        right.close()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(take(left), TIMEOUT)
