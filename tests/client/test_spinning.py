"""A caller that looks for its answer without pause: for how long, when at all, and what it leaves to others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import blockdex
from blockdex import CancelledError, DeadlineExceededError
from blockdex._native import Signal
from blockdex.client import transports
from clients import new_sequence
from serving import Serving
from tcp_proxy import TcpProxy

KEYS = np.ones((2, 128), np.float32)
QUERIES = np.ones((2, 4, 128), np.float32)


class Watched:
    """A signal, and how often somebody spun on it."""

    def __init__(self) -> None:
        self._signal = Signal()
        self.spins = 0
        self.seconds = 0.0
        self.found = 0

    def give(self) -> None:
        self._signal.give()

    def take_back(self) -> None:
        self._signal.take_back()

    def spin(self, seconds: float) -> bool:
        self.spins += 1
        began = time.monotonic()
        found = self._signal.spin(seconds)
        self.seconds += time.monotonic() - began
        self.found += found
        return found


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Callers spin, whatever this machine is, and for longer than an answer takes."""
    watched = Watched()
    monkeypatch.setattr(transports, "_new_signal", lambda: watched)
    monkeypatch.setattr(transports, "_SPIN_SECONDS", 5.0)
    return watched


@pytest.fixture
def client(watched: Watched, server: Serving) -> Iterator[blockdex.Client]:
    with blockdex.Client(server.grpc_address) as client:
        yield client


def test_a_lone_caller_finds_its_answer(client: blockdex.Client, watched: Watched) -> None:
    sequence = new_sequence()
    client.open_sequence(sequence)
    for _ in range(20):
        client.append_and_select(0, sequences=sequence, keys=KEYS, queries=QUERIES)
    assert (watched.spins, watched.found) == (20, 20)
    client.close_sequence(sequence)


def test_who_is_not_alone_does_not_spin(client: blockdex.Client, watched: Watched) -> None:
    sequence = new_sequence()
    client.open_sequence(sequence)

    def wait() -> Any:
        return client.select_blocks(
            0, sequences=sequence, queries=QUERIES[:1], starts=2, revisions=1, wait_for_keys=True, timeout=30
        )

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        while watched.spins == 0:
            time.sleep(0.001)
        client.append_keys(0, sequences=sequence, keys=KEYS, starts=0)
        client.append_keys(0, sequences=sequence, keys=KEYS[:1], revisions=1)
        assert waiting.result().shape == (1, 4, 16)
    assert watched.spins == 1
    client.close_sequence(sequence)


def test_many_threads_share_a_client_that_spins(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "_SPIN_CORES", 1)
    with blockdex.Client(server.grpc_address) as client, ThreadPoolExecutor(8) as pool:

        def one_engine(number: int) -> None:
            sequence = new_sequence()
            client.open_sequence(sequence)
            for step in range(30):
                client.append_and_select(number % 3, sequences=sequence, keys=KEYS, queries=QUERIES)
                assert client.get_sequence(sequence).lengths[number % 3] == 2 * (step + 1)
            client.close_sequence(sequence)

        list(pool.map(one_engine, range(8)))


def test_a_deadline_ends_it(proxy: TcpProxy, watched: Watched) -> None:
    with blockdex.Client(proxy.address) as client:
        sequence = new_sequence()
        client.open_sequence(sequence)
        client.append_keys(0, sequences=sequence, keys=KEYS)
        proxy.answers = False
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            client.append_keys(0, sequences=sequence, keys=KEYS, timeout=0.2)
        assert 0.1 < time.monotonic() - began < 2
        assert watched.found == 1


def test_closing_the_client_is_seen_once_the_spin_is_over(
    proxy: TcpProxy, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "_SPIN_SECONDS", 0.4)
    client = blockdex.Client(proxy.address)
    client.open_sequence(new_sequence())
    proxy.answers = False
    closing = threading.Timer(0.1, client.close)
    closing.start()
    began = time.monotonic()
    with pytest.raises(CancelledError):
        client.append_keys(0, sequences=1, keys=KEYS, starts=0)
    assert time.monotonic() - began < 5
    closing.join()


def test_the_interpreter_is_free_meanwhile() -> None:
    signal, steps = Signal(), 0
    spinning = threading.Thread(target=signal.spin, args=(30.0,))
    spinning.start()
    began = time.monotonic()
    while time.monotonic() - began < 0.05:
        steps += 1
    assert spinning.is_alive()
    assert steps > 100
    signal.give()
    spinning.join(timeout=10)
    assert not spinning.is_alive()
    signal.take_back()
    assert not signal.spin(0.001)


@pytest.mark.parametrize(("cores", "spins"), [(3, False), (4, True)])
def test_it_takes_cores(monkeypatch: pytest.MonkeyPatch, cores: int, spins: bool) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert (transports._new_signal() is not None) is spins
