"""Slots and bells: whatever is done to them in whatever order, nothing is lost or doubled, and nobody sleeps on."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdex.ring.handshake import new_link
from blockdex.ring.layout import AT, HEADER_BYTES
from blockdex.ring.segment import RingError, Segment, Sizes
from support import ring_echo
from support.ring import Bell, Consumer, Producer

SLOTS = 4
TESTS = Path(__file__).parents[1]


@contextmanager
def new_segment(slots: int = SLOTS) -> Iterator[Segment]:
    segment = Segment.create(Sizes(slots, request_bytes=1 << 16, answer_bytes=1 << 16), epoch=99)
    try:
        yield segment
    finally:
        os.close(segment.fd)


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[int, int]]:
    """The ends of a pair: who wakes, and who is woken."""
    waking, woken = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with waking, woken:
        yield waking.fileno(), woken.fileno()


def test_a_segment_is_what_it_was_made() -> None:
    with new_segment() as segment:
        again = Segment(os.dup(segment.fd))
        os.close(again.fd)
        assert (again.epoch, again.request_slots, again.request_arena_bytes) == (99, SLOTS, 1 << 16)
        again.memory[HEADER_BYTES] = 7
        assert segment.memory[HEADER_BYTES] == 7
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, 0)


@pytest.mark.parametrize("offset", [0, 8, 12, 80])
def test_memory_of_something_else_is_refused(offset: int) -> None:
    with new_segment() as segment:
        segment.memory[offset] ^= 1
        with pytest.raises(RingError, match="segment: expected magic"):
            Segment(segment.fd)


def test_a_file_that_is_cut_off_is_refused() -> None:
    fd = os.memfd_create("cut")
    try:
        for size in (0, 8, HEADER_BYTES, HEADER_BYTES + 1):
            os.ftruncate(fd, size)
            with pytest.raises(RingError):
                Segment(fd)
    finally:
        os.close(fd)


@given(steps=st.lists(st.sampled_from(("write", "publish", "read", "release")), max_size=200))
def test_slots_come_out_as_they_went_in(ends: tuple[int, int], steps: list[str]) -> None:
    """Whatever the order: written, shown, read and given back, round and round."""
    with new_segment() as segment:
        producer = Producer(segment, "request", Bell(segment, "engine_sleeps", ends[0]))
        consumer = Consumer(segment, "request")
        claimed: deque[int] = deque()
        shown: deque[int] = deque()
        number = kept = 0
        for step in steps:
            if step == "write" and not producer.full:
                segment.counters[producer.claim() // 8] = number
                claimed.append(number)
                number += 1
            elif step == "publish":
                producer.publish()
                shown += claimed
                claimed.clear()
            elif step == "read" and consumer.check():
                assert segment.counters[consumer.take() // 8] == shown.popleft()
                kept += 1
            elif step == "release":
                consumer.release()
                kept = 0
            assert consumer.filled == len(shown)
            assert producer.full == (len(claimed) + len(shown) + kept == SLOTS)


@pytest.mark.parametrize("written", [SLOTS + 1, 2**64 - 1])
def test_a_number_that_cannot_be_is_seen(written: int) -> None:
    with new_segment() as segment:
        segment.counters[AT["requests_written"] // 8] = written
        with pytest.raises(RingError, match=f"there are {SLOTS}"):
            Consumer(segment, "request").check()


def test_a_number_that_goes_back_is_seen(ends: tuple[int, int]) -> None:
    with new_segment() as segment:
        producer, consumer = (
            Producer(segment, "answer", Bell(segment, "client_sleeps", ends[0])),
            Consumer(segment, "answer"),
        )
        producer.claim()
        producer.publish()
        consumer.take()
        segment.counters[AT["answers_written"] // 8] = 0
        with pytest.raises(RingError, match="ring: -1 slots"):
            consumer.check()


def test_the_bell_is_rung_only_for_who_sleeps(ends: tuple[int, int]) -> None:
    with new_segment() as segment:
        bell = Bell(segment, "engine_sleeps", ends[0])
        bell.ring()
        assert not select.select([ends[1]], [], [], 0)[0]
        bell.lie_down()
        bell.ring()
        bell.ring()
        woken = Bell(segment, "engine_sleeps", ends[1])
        woken.silence()
        assert not select.select([ends[1]], [], [], 0)[0], "once is enough"


def test_nobody_sleeps_through_a_bell() -> None:
    """Two processes that both go to sleep all the time; a wake-up that is lost would end in silence."""
    count = 20_000
    engine, client = new_link(Sizes(64, request_bytes=1 << 16, answer_bytes=1 << 16), epoch=99)
    with closing(engine), closing(client):
        segment, files = client.segment, (engine.segment.fd, engine.engine_bell, engine.client_bell)
        command = [sys.executable, "-m", ring_echo.__name__, *map(str, files), str(count), "0"]
        with subprocess.Popen(command, cwd=TESTS, pass_fds=files) as process:
            producer = Producer(segment, "request", Bell(segment, "engine_sleeps", client.engine_bell))
            own, consumer = Bell(segment, "client_sleeps", client.client_bell), Consumer(segment, "answer")
            sent = received = 0
            while received < count:
                while sent < count and sent - received < 1 + sent % 48:
                    segment.counters[producer.claim() // 8] = sent
                    producer.publish()
                    sent += 1
                for _ in range(ring_echo.wait(own, consumer)):
                    assert segment.counters[consumer.take() // 8] == received
                    received += 1
                consumer.release()
            assert process.wait(ring_echo.BELL_SECONDS) == 0
