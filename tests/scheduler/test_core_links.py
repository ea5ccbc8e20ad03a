"""The core and its frontends: those that go, those that do not read, and how it sleeps until one of them asks."""

from __future__ import annotations

import os
import queue
import resource
import threading
import time

import pytest

from blockdex import _native as native
from blockdex.ring import layout
from blockdex.ring.layout import AT, SLOT_BYTES
from blockdex.ring.segment import Sizes
from support.bare_core import (
    ALL,
    LENGTH,
    BareCore,
    bare_core,
    check_answer,
    usual,
)
from support.running_engine import TIMEOUT, get

MANY_LINES = 10_000


# --- Frontends that go, or do not read ---


def test_a_door_that_goes_with_requests_and_answers_on_their_way(device_core: BareCore) -> None:
    bare = device_core
    small = Sizes(slots=2, request_bytes=1 << 16, answer_bytes=1 << 16)
    gone, other = bare.open_client(small), bare.open_client()
    gone.send(*[bare.both(layer, (1, LENGTH, 1)) for layer in (0, 1)])
    bare.look()
    bare.device.end()
    gone.send(*[bare.both(layer, (1, LENGTH + 1, 1)) for layer in (0, 1)], first_ticket=2)
    request = bare.both(2, (1, LENGTH, 1))
    other.send(request)
    bare.look()  # two answers fill its ring; two requests are on their way
    gone.send(bare.both(0, (3, LENGTH, 1)), first_ticket=4)
    bare.core.drop(bare.lines[0])
    bare.device.end()
    bare.look()
    other.read()
    check_answer(other, 0, request)
    assert gone.handles.segment.counters[AT["answers_written"] // 8] == 2, "nothing is written for it"
    assert not bare.lines[0].has_unwritten
    assert bare.lines[0].gone
    assert sum(bare.counted["stages"][4][0]) == 3, "those that were answered"
    with pytest.raises(ValueError, match="is not one of its links"):
        bare.core.drop(bare.lines[0])


def test_a_line_that_is_gone_is_not_served_until_it_is_dropped(bare: BareCore) -> None:
    frontend, other = bare.open_client(), bare.open_client()
    bare.lines[0].gone = True
    frontend.send(bare.both(0, (1, LENGTH, 1)))
    other.send(bare.both(0, (2, LENGTH, 1)))
    for _ in range(2):
        bare.look()
    assert (frontend.read(), other.read()) == (0, 1)
    assert (bare.lines[0].filled, bare.core.steps) == (1, 1)
    bare.core.run(0.02)
    assert not frontend.handles.segment.flags[AT["engine_sleeps"] // 4], "it is not told that it should ring"
    bare.core.notice()
    assert bare.core.run(TIMEOUT) == native.NOTICED


def test_nothing_is_written_for_who_is_gone(device_core: BareCore) -> None:
    bare = device_core
    frontend = bare.open_client()
    frontend.send(bare.both(0, (1, LENGTH, 1)))
    bare.look()
    bare.lines[0].gone = True
    bare.device.end()
    bare.look()
    segment = frontend.handles.segment
    assert not any(segment.memory[segment.answer_slots_offset :][:SLOT_BYTES])


def test_a_short_answer_does_not_overtake_a_long_one_that_waits_for_room(bare: BareCore) -> None:
    frontend = bare.open_client(Sizes(8, 1 << 16, 256))
    rows = [(1, LENGTH, 3), (2, LENGTH, 1)]
    frontend.send(*[bare.both(layer, row) for layer in (0, 1) for row in rows])
    bare.look()
    bare.look()
    assert bare.lines[0].has_unwritten, "of 256 bytes 64 are left, of which the third one needs twice as many"
    while len(frontend.told) < 4:
        bare.look()
        frontend.read(1)
    assert list(frontend.told) == [0, 1, 2, 3]


def test_answers_that_wait_for_room_go_with_who_goes(bare: BareCore) -> None:
    frontend = bare.open_client(Sizes(2, 1 << 16, 1 << 16))
    for ticket in range(3):
        frontend.send(bare.both(0, (1, LENGTH + ticket, 1)), first_ticket=ticket)
        bare.look()
        bare.look()
    assert bare.lines[0].has_unwritten
    bare.lines[0].gone = True
    bare.look()
    assert not bare.lines[0].has_unwritten


@pytest.mark.parametrize("sizes", [Sizes(2, 1 << 16, 1 << 16), Sizes(64, 1 << 16, 256)], ids=["slots", "arena"])
def test_who_does_not_read_is_served_no_more_and_harms_nobody(bare: BareCore, sizes: Sizes) -> None:
    frontend, other = bare.open_client(sizes), bare.open_client()
    requests = [bare.both(layer, (sequence, LENGTH, 1)) for sequence in (1, 2, 3, 4) for layer in range(3)]
    sent = 0
    while sent < len(requests) and frontend.free:
        frontend.send(requests[sent], first_ticket=sent)
        bare.look()
        bare.look()
        sent += 1
    (line, _) = bare.lines
    assert line.has_unwritten and line.filled > 0, "what there is no room for stays where it is"
    steps, flag = bare.core.steps, AT["engine_waits_for_room"] // 4
    assert frontend.handles.segment.flags[flag] == 1
    request = bare.both(0, (9, LENGTH, 1))
    other.send(request)
    bare.look()
    bare.look()
    other.read()
    check_answer(other, 0, request)
    assert bare.core.steps == steps + 1
    # One answer is read: there is room for another one, and the engine is told so.
    assert frontend.read(1) == 1
    assert frontend.handles.segment.flags[flag] == 0
    while len(frontend.told) < len(requests):
        bare.look()
        frontend.read(1)
        if sent < len(requests) and frontend.free:
            frontend.send(requests[sent], first_ticket=sent)
            sent += 1
    for ticket, asked in enumerate(requests):
        check_answer(frontend, ticket, asked)
    assert list(frontend.told) == sorted(frontend.told), "in their order"
    assert not line.has_unwritten


# --- Sleeping ---


def test_a_bell_that_is_full_holds_nobody_up(bare: BareCore) -> None:
    """Whatever the flags of its ends say."""
    frontend, engine = bare.open_client(), bare.engine_sides[-1]
    with pytest.raises(BlockingIOError):
        while True:
            os.write(engine.client_bell, b"0")
    for bell in (engine.client_bell, engine.engine_bell):
        os.set_blocking(bell, True)
    frontend.handles.segment.flags[AT["client_sleeps"] // 4] = 1
    request = usual(bare)
    frontend.send(request)
    # Once to begin the step, and once to answer.
    looking = threading.Thread(target=lambda: [bare.look() for _ in range(2)])
    looking.start()
    looking.join(TIMEOUT)
    held_up = looking.is_alive()
    os.read(frontend.handles.client_bell, 1)  # which lets it go on
    looking.join()
    assert not held_up
    frontend.read()
    check_answer(frontend, 0, request)


@pytest.mark.alone
def test_it_sleeps_until_the_time_is_up(bare: BareCore) -> None:
    bare.open_client()
    began, busy = time.monotonic(), time.thread_time()
    assert bare.core.run(0.3) == 0
    assert 0.3 <= time.monotonic() - began < 1
    assert time.thread_time() - busy < 0.05
    assert bare.frontends[0].handles.segment.flags[AT["engine_sleeps"] // 4] == 0, "it is awake again"


@pytest.mark.alone
def test_it_spins_for_as_long_as_it_is_told_to() -> None:
    with bare_core(spin_seconds=0.1) as bare:
        bare.open_client().send(bare.both(0, (1, LENGTH, 1)))
        bare.look()
        busy = time.thread_time()
        bare.core.run(0.4)
        assert 0.01 < time.thread_time() - busy < 0.2


@pytest.mark.alone
def test_it_spins_after_an_answer() -> None:
    with bare_core(spin_seconds=TIMEOUT, replays=ALL) as bare:
        bare.open_client().send(bare.both(0, (1, LENGTH, 1)))
        bare.look()
        bare.device.end()
        busy = time.thread_time()
        bare.core.run(0.2)
        assert time.thread_time() - busy > 0.01


@pytest.mark.alone
@pytest.mark.parametrize("what", ["request", "notice"])
def test_a_sleeper_is_woken(bare: BareCore, what: str) -> None:
    """Once, and held up by no bell that would wait for another time."""
    frontend, quiet = bare.open_client(), bare.open_client()
    os.set_blocking(bare.engine_sides[0].engine_bell, True)
    flags = frontend.handles.segment.flags
    sleeping = AT["engine_sleeps"] // 4

    def wake() -> None:
        while not flags[sleeping]:
            time.sleep(0)
        time.sleep(0.01)
        if what == "notice":
            bare.core.notice()
        else:
            frontend.send(get(1))

    waker = threading.Thread(target=wake)
    waker.start()
    began = time.monotonic()
    assert bare.core.run(TIMEOUT) == (native.NOTICED if what == "notice" else native.FOR_PYTHON)
    assert time.monotonic() - began < 1
    waker.join()
    answer_states(bare)
    busy = time.thread_time()
    assert bare.core.run(0.2) == 0
    assert time.thread_time() - busy < 0.05, "it sleeps again"
    assert not quiet.read()


def answer_states(bare: BareCore) -> None:
    """Answers what was asked of sequences."""
    for number, *_ in bare.take():
        bare.core.answer(number, layout.IS_STATE, 0, 0, 0, 0, None, None)


def test_a_request_that_is_written_while_it_lies_down_is_seen() -> None:
    """No bell rings for it, since its line does not sleep yet when it comes; the last look before was too early.

    Lines lie down one after another. The first one is in the core many times over, which takes long enough for the last
    one's request to be written in between.
    """
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < MANY_LINES + 2:  # poll takes as many
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(MANY_LINES + 2, most), most))
    with bare_core(spin_seconds=0.0005) as bare:  # this thread is awake by then
        first, last = bare.open_client(), bare.open_client()
        bare.core.drop(bare.lines[1])
        bare.lines[1].gone = False
        for _ in range(min(MANY_LINES, most) - 2):
            bare.core.add(bare.lines[0])
        bare.core.add(bare.lines[1])
        sleeping = AT["engine_sleeps"] // 4
        flags = [frontend.handles.segment.flags for frontend in (first, last)]
        counters = last.handles.segment.counters
        turns: queue.SimpleQueue[bool] = queue.SimpleQueue()
        barrier = threading.Lock()

        def serve() -> None:
            while turns.get():
                bare.core.run(TIMEOUT)
                answer_states(bare)

        serving = threading.Thread(target=serve)
        serving.start()
        slot = last.lay(get(1), 0)
        hits = number = 0
        end = time.monotonic() + 5  # where both cores are busy, few are in time
        try:
            while hits < 5 and time.monotonic() < end:
                number += 1
                last.put(slot)
                turns.put(True)
                while not flags[0][sleeping]:
                    pass
                counters[AT["requests_written"] // 8] = number
                with barrier:
                    hits += not flags[1][sleeping]
                last.bell.ring()
                deadline = time.monotonic() + 2
                while not last.read():
                    assert time.monotonic() < deadline, f"request {number} is slept through"
                    time.sleep(0)
                last.told.clear()
        finally:
            turns.put(False)
            bare.core.notice()
            serving.join()
