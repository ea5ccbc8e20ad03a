"""What a server costs that nobody asks: however long it looks for work after the last request, it sleeps then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import numpy as np
import pytest

import blockdex
from support.processes import Split, split

SECONDS = 3.0


@pytest.fixture(scope="module")
def server() -> Iterator[Split]:
    """A server that looks for as long as it may, which was asked something over a stream and is not any more."""
    with split("--frontends", "2", "--spin-seconds", "0.01") as running:
        with blockdex.Client(running.serving.grpc_address, transport="stream") as client:
            client.open_sequence(1)
            for _ in range(20):
                client.append_keys(0, sequences=[1], lengths=[1], keys=np.ones((1, 128), np.float32))
        time.sleep(0.5)
        yield running


def seconds_of(pid: int) -> float:
    """CPU seconds of a process so far, to the nanosecond."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text("ascii").split()[0]) for thread in threads) / 1e9


def wakes_of(pid: int) -> int:
    """How often the first thread of a process went to sleep so far."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines() if line[:9] == "voluntary"]
    return int(line.split()[1])


def test_nobody_looks_for_work_that_does_not_come(server: Split) -> None:
    processes = [server.core, *server.frontends]
    before, wakes = [seconds_of(pid) for pid in processes], wakes_of(server.supervisor)
    time.sleep(SECONDS)
    shares = [(seconds_of(pid) - was) / SECONDS for pid, was in zip(processes, before, strict=True)]
    assert max(shares) < 0.1
    # The supervisor wakes for the answers of those that it asks, and for the date of its own; ten ticks a second more
    # would show.
    assert (wakes_of(server.supervisor) - wakes) / SECONDS < 12


def test_answers_of_http_are_dated(server: Split) -> None:
    """After the seconds that the other test slept: a date that stood still would be old."""
    date = httpx.get(f"http://{server.serving.http_address}/healthz").headers["date"]
    assert abs(parsedate_to_datetime(date).timestamp() - time.time()) < 3
