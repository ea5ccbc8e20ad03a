"""Who sends a stream's requests looks for them for a while: what that hands over, and where it does not look."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import blockdex
from blockdex import _native
from blockdex.client import transports
from blockdex.client.stream import SPIN_SECONDS
from blockdex.client.transports import StreamTransport
from support.clients import new_sequence
from support.serving import Serving

KEYS = np.ones((1, 128), np.float32)
QUERIES = np.ones((1, 4, 128), np.float32)


def test_nobody_waits() -> None:
    baton = _native.Baton()
    began = time.thread_time()
    assert not any(baton.pass_on() for _ in range(100))
    assert time.thread_time() - began < 0.002, "it lets go of nothing"


def test_nothing_comes() -> None:
    """It waits without the interpreter's lock, for as long as it is told; what was not taken is not kept for later."""
    baton, ticks, over = _native.Baton(), [], threading.Event()

    def others() -> None:
        while not over.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=others)
    thread.start()
    began = time.monotonic()
    assert not baton.wait(0.2)
    ended = time.monotonic()
    over.set()
    thread.join()
    assert 0.2 <= ended - began < 10
    assert len([tick for tick in ticks if began < tick < ended]) > 5
    assert not baton.pass_on()
    assert not baton.wait(0.001)


def test_what_is_passed_on_is_there_when_the_other_goes_on() -> None:
    baton = _native.Baton()
    put: list[None] = []
    seen: list[int] = []

    def wait() -> None:
        while len(seen) < 50:
            if baton.wait(10.0):
                seen.append(len(put))

    thread = threading.Thread(target=wait)
    thread.start()
    deadline = time.monotonic() + 60
    while len(seen) < 50 and time.monotonic() < deadline:
        put.append(None)
        baton.pass_on()
        time.sleep(0)
    thread.join(60)
    assert len(seen) == 50
    assert seen == sorted(seen) and seen[0] > 0
    assert not baton.wait(0.001), "it was taken"


def batons(client: blockdex.Client) -> list[bool]:
    transport = client._transport
    assert isinstance(transport, StreamTransport)
    return sorted(stream._baton is not None for stream in transport._all)


@pytest.mark.parametrize("cores", [1, 1 << 20])
def test_the_first_stream_looks_where_there_are_cores(
    server: Serving, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    """And answers are what they were; a client that calls nobody does not look."""
    monkeypatch.setattr(transports, "SPIN_CORES", cores)
    with blockdex.Client(server.grpc_address, timeout=30) as client:
        sequences = [new_sequence() for _ in range(4)]
        for sequence in sequences:
            client.open_sequence(sequence)

        def steps(sequence: int) -> None:
            for step in range(40):
                keys = np.full_like(KEYS, step)
                ids = client.append_and_select(1, sequences=sequence, keys=keys, queries=QUERIES)
                np.testing.assert_array_equal(ids[0, 0, :2], (0, -1))
            assert client.get_sequence(sequence).lengths[1] == 40

        steps(sequences[0])
        assert batons(client) == [cores == 1]
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(steps, sequences[1:]))
        assert sum(batons(client)) == (cores == 1)
        time.sleep(10 * SPIN_SECONDS)
        took = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - took < 0.25
