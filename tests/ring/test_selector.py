"""The selector that looks before it sleeps: how long, what it sees meanwhile, and that it sleeps through nothing."""

from __future__ import annotations

import asyncio
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from blockdex._native import SENT
from blockdex.ring.caller import RPCS
from blockdex.ring.client import Spinning
from blockdex.ring.layout import AT, GET
from blockdex.ring.segment import Segment, Sizes
from blockdex.ring.selector import RingSelector
from support.links import link_of
from support.ring_engine import hosted
from support.running_engine import TIMEOUT, get, open_sequence

pytestmark = pytest.mark.alone

LONG = 5.0
"""Seconds of spinning that no test waits for."""

SHORT = 0.005

BUSY = 60.0
"""Seconds for which others may keep it from looking."""


class Frontend:
    """A frontend's side of a ring of which this test is the engine, and the selector of its loop."""

    def __init__(self, spin_seconds: float) -> None:
        self.segment = Segment.create(Sizes(8, 4096, 4096), epoch=1)
        self.bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.link = link_of(self.segment, self.bells[0], spin_seconds=spin_seconds)
        self.selector = RingSelector()
        self.selector.register(self.bells[1], selectors.EVENT_READ)
        self.selector.watch(self.link, self.bells[1])

    def close(self) -> None:
        self.selector.close()
        for fd in (self.segment.fd, *self.bells):
            os.close(fd)

    @property
    def sleeps(self) -> bool:
        return bool(self.segment.flags[AT["client_sleeps"] // 4])

    def ask(self) -> None:
        """Sends a request, which the engine takes."""
        assert (
            self.link.send_sequence(object(), 0, RPCS.index("GetSequence"), "t", 1.0, GET, 0, 1, 0, 0, 0, b"") == SENT
        )
        self.segment.counters[AT["requests_read"] // 8] += 1

    def answer(self) -> None:
        """Shows an answer, and rings nobody's bell."""
        self.segment.counters[AT["answers_written"] // 8] += 1

    def may_sleep(self, seconds: float = LONG) -> tuple[bool, float]:
        """Whether it may, and the seconds that it looked: CPU time, which others do not take part in."""
        began = time.thread_time()
        return self.link.may_sleep(self.selector.fileno(), seconds), time.thread_time() - began


def eventually(succeeds: Callable[[], bool]) -> None:
    """Tries again: where others want the core it does not look at all."""
    deadline = time.monotonic() + BUSY
    while not succeeds():
        assert time.monotonic() < deadline, "never, or this machine is too busy"
        time.sleep(SHORT)


@pytest.fixture
def make() -> Iterator[Callable[[float], Frontend]]:
    frontends: list[Frontend] = []

    def one(spin_seconds: float) -> Frontend:
        frontends.append(Frontend(spin_seconds))
        return frontends[-1]

    yield one
    for frontend in frontends:
        frontend.close()


@pytest.mark.parametrize("spin_seconds", [0.0, LONG])
def test_it_sleeps_at_once_where_nothing_was_asked(make: Callable[[float], Frontend], spin_seconds: float) -> None:
    frontend = make(spin_seconds)
    for _ in range(50):
        may, seconds = frontend.may_sleep()
        assert may
        assert frontend.sleeps
        assert seconds < SHORT / 5


def test_it_looks_for_as_long_as_it_spins_after_a_request_and_then_sleeps(make: Callable[[float], Frontend]) -> None:
    def looks() -> bool:
        frontend = make(SHORT)
        frontend.ask()
        may, seconds = frontend.may_sleep()
        assert may
        assert frontend.sleeps
        assert seconds < LONG / 2
        time.sleep(SHORT)  # others may have ended the first look before its time
        assert frontend.may_sleep()[1] < SHORT / 5
        return seconds > SHORT / 2

    eventually(looks)


def test_it_looks_no_longer_than_a_timer_waits(make: Callable[[float], Frontend]) -> None:
    # Many times: others end its looking, too.
    for _ in range(50):
        frontend = make(LONG)
        frontend.ask()
        may, seconds = frontend.may_sleep(SHORT)
        assert may
        assert frontend.sleeps
        assert seconds < 2 * SHORT


def test_it_leaves_its_core_to_who_has_something_to_do(make: Callable[[float], Frontend]) -> None:
    frontend = make(LONG)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=-1) as other:
            assert other.stdout is not None
            other.stdout.readline()
            looked = 0.0
            for _ in range(20):
                frontend.ask()
                may, seconds = frontend.may_sleep()
                assert may
                assert frontend.sleeps
                looked += seconds
            other.kill()
    finally:
        os.sched_setaffinity(0, cores)
    # Without that it would look each time until it is sent away, which is a few milliseconds.
    assert looked < 0.04


@pytest.mark.parametrize("what", ["answer", "event"])
def test_it_sees_what_comes_while_it_looks(make: Callable[[float], Frontend], what: str) -> None:
    """From another thread, too, which runs meanwhile: it holds no lock."""

    def sees() -> bool:
        frontend = make(LONG)
        assert frontend.may_sleep()[0]
        frontend.ask()
        came = 0.0

        def come() -> None:
            nonlocal came
            came = time.monotonic()
            if what == "answer":
                frontend.answer()
            else:
                os.eventfd_write(frontend.bells[1], 1)

        coming = threading.Timer(SHORT, come)
        coming.start()
        began = time.monotonic()
        may, seconds = frontend.may_sleep()
        coming.join()
        assert seconds < LONG / 2
        assert frontend.sleeps or not may
        assert may or [key.fd for key, _ in frontend.selector.select(0)] == [frontend.bells[1]]
        return came > began and not (may or frontend.sleeps)

    eventually(sees)


def test_an_answer_keeps_it_awake_though_its_bell_is_silent(make: Callable[[float], Frontend]) -> None:
    frontend = make(LONG)
    frontend.answer()
    for timeout in (0, None, LONG):
        ((key, events),) = frontend.selector.select(timeout)
        assert (key.fd, events) == (frontend.bells[1], selectors.EVENT_READ)
    frontend.selector.forget()
    assert frontend.selector.select(0) == []


def test_no_answer_is_slept_through() -> None:
    """Requests come while it looks, while it sleeps and when it goes to sleep, and are answered in their order."""
    selector = RingSelector()
    random = np.random.default_rng(5)

    async def ask(spin_seconds: float) -> None:
        async with hosted(spinning=Spinning(selector, spin_seconds)) as run:
            await run.ask(open_sequence(1))
            for pause in random.uniform(0, 3 * spin_seconds, 300):
                time.sleep(pause)
                pending = [run.channel.submit(get(1), TIMEOUT) for _ in range(3)]
                done: list[object] = []
                for each in pending:
                    each.add_done_callback(done.append)
                await asyncio.wait_for(asyncio.gather(*pending), TIMEOUT)
                assert done == pending

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as executor:
        for spin_seconds in (0.00005, 0.0002, 0.001):
            executor.run(ask(spin_seconds))
