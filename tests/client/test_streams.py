"""Streams of the blocking client: one caller at a time has each, deadlines end them, and broken ones are not used."""

from __future__ import annotations

import _thread
import math
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import blockdex
from blockdex import DeadlineExceededError
from blockdex.client.alarm import Alarm
from blockdex.client.stream import Stream
from blockdex.client.transports import StreamTransport
from support.clients import new_sequence
from support.serving import Serving
from support.tcp_proxy import TcpProxy

KEYS = np.ones((2, 128), np.float32)
QUERIES = np.ones((1, 4, 128), np.float32)


@pytest.fixture
def client(proxy: TcpProxy) -> Iterator[blockdex.Client]:
    with blockdex.Client(proxy.address, timeout=20) as client:
        yield client


@pytest.fixture
def sequence(client: blockdex.Client) -> int:
    sequence = new_sequence()
    client.open_sequence(sequence)
    client.append_keys(0, sequences=sequence, keys=KEYS)
    return sequence


def free(client: blockdex.Client) -> list[Stream]:
    transport = client._transport
    assert isinstance(transport, StreamTransport)
    return list(transport._free)


def wait_for(client: blockdex.Client, sequence: int, revision: int, timeout: float | None = None) -> Any:
    return client.select_blocks(
        0, sequences=sequence, queries=QUERIES, starts=0, revisions=revision, wait_for_keys=True, timeout=timeout
    )


def test_calls_one_after_the_other_share_a_stream_and_others_have_their_own(
    client: blockdex.Client, sequence: int
) -> None:
    (first,) = free(client)
    client.append_keys(0, sequences=sequence, keys=KEYS)
    assert free(client) == [first]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for, client, sequence, 5)
        while free(client):
            time.sleep(0.001)
        client.append_keys(0, sequences=sequence, keys=KEYS, revisions=5)
        assert waiting.result().shape == (1, 4, 16)
    assert len(free(client)) == 2
    client.append_keys(0, sequences=sequence, keys=KEYS)
    assert len(free(client)) == 2


def test_a_deadline_leaves_other_callers_alone(client: blockdex.Client, sequence: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for, client, sequence, 5)
        time.sleep(0.05)
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            wait_for(client, sequence, 6, timeout=0.2)
        assert 0.1 < time.monotonic() - began < 5, "though the other one waits for much longer"
        client.append_keys(0, sequences=sequence, keys=KEYS, revisions=5)
        assert waiting.result().shape == (1, 4, 16)


def test_the_client_keeps_its_deadline_when_the_server_is_silent(
    client: blockdex.Client, sequence: int, proxy: TcpProxy
) -> None:
    proxy.answers = False
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            wait_for(client, sequence, 0, timeout=0.15)
        assert 0.1 < time.monotonic() - began < 5


def test_a_deadline_ends_with_its_call(client: blockdex.Client, sequence: int) -> None:
    (stream,) = free(client)
    client.append_keys(0, sequences=sequence, keys=KEYS, timeout=3)
    time.sleep(3.3)
    client.append_keys(0, sequences=sequence, keys=KEYS)
    assert free(client) == [stream]
    assert not stream.ended


def test_a_stream_that_broke_while_nobody_used_it_costs_no_call(
    client: blockdex.Client, sequence: int, proxy: TcpProxy
) -> None:
    (stream,) = free(client)
    proxy.cut()
    deadline = time.monotonic() + 10
    while not stream.ended and time.monotonic() < deadline:
        time.sleep(0.01)
    client.info()  # repeated until the connection is whole again
    client.append_keys(0, sequences=sequence, keys=KEYS)
    assert client.get_sequence(sequence).lengths[0] == 4
    assert stream not in free(client)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own answer to SIGINT, which a script's jobs in the background and a run's workers ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_who_is_interrupted_leaves_no_answer_behind(client: blockdex.Client, sequence: int) -> None:
    (stream,) = free(client)
    threading.Timer(0.2, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        wait_for(client, sequence, 5)
    assert stream.ended
    assert free(client) == []
    client.append_keys(0, sequences=sequence, keys=KEYS, revisions=5)
    assert wait_for(client, sequence, 5).shape == (1, 4, 16)


def test_many_threads_have_as_many_streams_and_no_more(server: Serving) -> None:
    with blockdex.Client(server.grpc_address) as client, ThreadPoolExecutor(8) as pool:

        def one_engine(number: int) -> None:
            sequence = new_sequence()
            client.open_sequence(sequence)
            for step in range(20):
                client.append_keys(number % 3, sequences=sequence, keys=KEYS)
                assert client.get_sequence(sequence).lengths[number % 3] == 2 * (step + 1)
            client.close_sequence(sequence)

        list(pool.map(one_engine, range(24)))
        assert 1 <= len(free(client)) <= 8


# --- The alarm ---


class Sleeper:
    """Who waits, and when it was woken."""

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self.woken = threading.Event()

    def end_if_late(self, now: float) -> None:
        if self.deadline <= now:
            self.deadline = math.inf
            self.woken.set()


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    alarm = Alarm()
    yield alarm
    alarm.close()


def test_it_rings_for_each_when_it_is_time(alarm: Alarm) -> None:
    sleepers = [Sleeper() for _ in range(5)]
    for sleeper in sleepers:
        alarm.watch(sleeper)
    began = time.monotonic()
    for place, sleeper in enumerate(sleepers):
        sleeper.deadline = began + (60, 0.3, 0.1, 50, 0.2)[place]
        alarm.expect(sleeper.deadline)
    for place, seconds in ((2, 0.1), (4, 0.2), (1, 0.3)):
        assert sleepers[place].woken.wait(10)
        assert time.monotonic() - began >= seconds
    assert not sleepers[0].woken.is_set()
    assert not sleepers[3].woken.is_set()


def test_it_forgets(alarm: Alarm) -> None:
    gone, there = Sleeper(), Sleeper()
    for sleeper in (gone, there):
        alarm.watch(sleeper)
        sleeper.deadline = time.monotonic() + 0.2
        alarm.expect(sleeper.deadline)
    alarm.forget(gone)
    assert there.woken.wait(10)
    assert not gone.woken.is_set()


def test_it_ends() -> None:
    alarm = Alarm()
    alarm.watch(Sleeper(time.monotonic() + 60))
    alarm.close()
    assert alarm._thread is not None
    alarm._thread.join(timeout=10)
    assert not alarm._thread.is_alive()
