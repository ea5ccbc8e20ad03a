"""A server of several processes under everything that clients do, for a while: right answers, and nothing that grows.

`BLOCKDEX_SOAK_SECONDS` is how long. The first third warms up; what is held in the second is compared with the third.
"""

from __future__ import annotations

import collections
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import blockdex
from benchmarks.doors import connect
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc
from support.processes import Split, eventually, split
from support.soak_caller import WEIGHTS
from support.wire import SPEC

SECONDS = float(os.environ.get("BLOCKDEX_SOAK_SECONDS", "60"))
TESTS = Path(__file__).parents[1]
TRANSPORTS = ("stream", "unary", "stream", "unary")
CACHE_BYTES = 96 << 20
KEYS = np.zeros((2048, SPEC.head_dim), np.float32)
"""No larger than what callers send, lest the heaps are as large as that once was."""

LIBRARIES = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_ARENA_MAX": "2",
    "LRU_CACHE_CAPACITY": "8",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
}
"""What the server's libraries are told. The C library: what is freed leaves the process. torch and oneDNN: to keep 8
compiled products of a shape instead of 1,024. Prefills of ever other lengths otherwise fill these for minutes (60 MiB
in 18 seconds were seen), and a leak would hide behind them."""
ANONYMOUS_BYTES = 4 << 20
"""Private memory that a process may hold more of. Heaps are not packed, and their edge moves with what happens to be in
flight. In a minute this finds a few KB kept of each request; what is 100 bytes of each takes some ten minutes."""
SHARED_BYTES = 0
"""Mapped memory of memfds: rings are as large as they were made."""
DESCRIPTORS = 6
"""Files that a process may have open more of while callers run: at times all of them are at one frontend, and
connections that they left are on their way out."""
LEFT_OVER = 1
"""Files that a process may have open more of when they are gone than before they came."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 300)]


@dataclass(frozen=True)
class Held:
    """What a process holds: bytes of memory of its own, bytes of memfds mapped, open files."""

    anonymous: int
    shared: int
    descriptors: int


def held_by(pid: int) -> Held:
    """What a process holds now."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii")
    (anonymous,) = [int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss_Anon:")]
    shared = 0
    for line in Path(f"/proc/{pid}/maps").read_text("utf-8").splitlines():
        if "/memfd:" in line:
            first, _, last = line.split()[0].partition("-")
            shared += int(last, 16) - int(first, 16)
    return Held(anonymous * 1024, shared, len(os.listdir(f"/proc/{pid}/fd")))  # noqa: PTH208 - names, not paths


def touch_every_page(address: str) -> None:
    """Writes the whole cache once: the operating system gives a page of memory when it is first written."""
    with blockdex.Client(address, transport="unary") as client:
        count = client.info().cache.capacity_tokens // len(KEYS)
        for sequence in range(count):
            client.open_sequence(sequence)
            for layer in range(SPEC.num_layers):
                client.append_keys(layer, sequences=sequence, keys=KEYS)
        for sequence in range(count):
            client.close_sequence(sequence)


def open_files(server: Split) -> dict[int, int]:
    """How many files each process of the server has open, once every frontend has had a client."""
    for frontend in server.frontends:
        with connect(server.serving.grpc_address, frontend) as channel:
            pb_grpc.IndexerServiceStub(channel).GetInfo(pb.GetInfoRequest(), timeout=20)
    time.sleep(1)  # Until these are gone.
    return {pid: held_by(pid).descriptors for pid in server.serving.pids()}


def more_files(before: dict[int, int]) -> list[int]:
    """How many more each process has open than before."""
    return [held_by(pid).descriptors - count for pid, count in before.items()]


def watch(server: Split, callers: list[subprocess.Popen[str]]) -> dict[int, list[Held]]:
    """What each process of the server holds, once a second, as long as callers run."""
    pids = server.serving.pids()
    samples: dict[int, list[Held]] = {pid: [] for pid in pids}
    deadline = time.monotonic() + SECONDS + 120
    while any(caller.poll() is None for caller in callers):
        assert time.monotonic() < deadline, "callers do not end"
        assert server.serving.pids() == pids, "a process was started again"
        for pid, taken in samples.items():
            taken.append(held_by(pid))
        time.sleep(1)
    return samples


def growth(samples: list[Held], what: Callable[[Held], int]) -> float:
    """How much more of something is held in the last third than in the one before: the difference of the medians."""
    third = len(samples) // 3
    before, after = (statistics.median(map(what, part)) for part in (samples[third : 2 * third], samples[-third:]))
    return after - before


def test_nothing_grows_and_every_answer_is_right() -> None:
    flags = ("--frontends", "2", "--cache-bytes", str(CACHE_BYTES))
    with split(*flags, **LIBRARIES) as server:
        address = server.serving.grpc_address
        touch_every_page(address)
        commands = [
            [sys.executable, "-m", "support.soak_caller", address, transport, str(seed), str(SECONDS)]
            for seed, transport in enumerate(TRANSPORTS, start=1)
        ]
        before = open_files(server)
        callers = [subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, text=True) for command in commands]
        try:
            samples = watch(server, callers)
        finally:
            for caller in callers:
                caller.kill()
        done = [json.loads(caller.communicate()[0]) for caller in callers if caller.returncode == 0]
        assert len(done) == len(callers), "a caller found something wrong"
        counts: collections.Counter[str] = sum(map(collections.Counter, done), collections.Counter())
        assert counts.keys() >= WEIGHTS.keys(), "all of it was done"
        names = {server.supervisor: "supervisor", server.core: "core"}
        for pid, taken in samples.items():
            grown = Held(*(int(growth(taken, what)) for what in (_anonymous, _shared, _descriptors)))
            print(f"{names.get(pid, 'frontend')}: {taken[-1]}, grown by {grown}")
            assert grown.anonymous <= ANONYMOUS_BYTES
            assert grown.shared <= SHARED_BYTES
            assert grown.descriptors <= DESCRIPTORS
        for what in ("core", "frontend"):
            assert server.metric("blockdex_restarts_total", process=what) == 0
        eventually(lambda: server.metric("blockdex_pages", state="free") == _pages(address), "every page is free again")
        eventually(lambda: all(left <= LEFT_OVER for left in more_files(before)), "connections are closed")
        print(f"open files, more than before: {more_files(before)}")
        print(dict(counts))


def _pages(address: str) -> int:
    with blockdex.Client(address) as client:
        return client.info().cache.pages_total


def _anonymous(held: Held) -> int:
    return held.anonymous


def _shared(held: Held) -> int:
    return held.shared


def _descriptors(held: Held) -> int:
    return held.descriptors
