"""From the engine core's birth until frontends are let in, and what a lost device does."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

import blockdex
from blockdex.contract.credentials import Credentials
from blockdex.frontend.http.readiness import Readiness
from blockdex.server import child_process as child
from blockdex.server import supervisor as supervising
from blockdex.server.bootstrap import StartError
from blockdex.server.config import load_settings
from blockdex.server.supervisor import Supervisor
from support import strange_core
from support.processes import command_of
from support.serving import SMALL

SECONDS = 60.0


@pytest.fixture(autouse=True)
def _strange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "CORE", "strange_core")
    folder = str(Path(strange_core.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))


@asynccontextmanager
async def started() -> AsyncIterator[tuple[Supervisor, Readiness]]:
    """A supervisor whose engine core is born."""
    readiness = Readiness()
    made = Supervisor(load_settings([*SMALL, "--grpc-address", "127.0.0.1:0"]), readiness, Credentials())
    try:
        assert await made.start(asyncio.Event())
        yield made, readiness
    finally:
        await made.close()


async def eventually(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def children(module: str) -> list[int]:
    """Process ids of this process's, by their program."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text("ascii").split()
    return [pid for pid in map(int, pids) if module in command_of(pid)]


async def test_progress_is_told_and_a_lost_device_is_a_new_core() -> None:
    async with started() as (made, readiness):
        opening = asyncio.create_task(made.open(asyncio.Event()))
        assert (await made.reports.info()).device == "cpu", "it can be asked before it is ready"
        said = set()
        while not opening.done():
            said.add(readiness.obstacle)
            await asyncio.sleep(0.01)
        assert {f"compiling kernels, {done} of 3" for done in (1, 2)} <= said
        assert await opening and readiness.ready

        async with blockdex.AsyncClient(made.grpc_address) as client:
            epoch = (await client.info()).epoch
            await client.open_sequence(1)
            with pytest.raises(blockdex.BlockdexError) as failed:
                await client.append_keys(0, sequences=1, keys=np.zeros((1, 128), np.float32))
            assert failed.value.reason in {"INTERNAL", "UNREACHABLE"}
            await eventually(lambda: not readiness.ready)
            await eventually(lambda: readiness.ready)
            assert made.restarts == {"core": 1, "frontend": 0}
            assert (await client.info()).epoch != epoch


async def test_a_core_that_hangs_up_and_stays_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (child, supervising):
        monkeypatch.setattr(module, "END_SECONDS", 0.2)
    monkeypatch.setenv("STRANGE_CORE_HANGS", "ready")
    async with started() as (made, _):
        with pytest.raises(StartError, match="the engine core ended with -9 before it was ready"):
            await asyncio.wait_for(made.open(asyncio.Event()), SECONDS)
    monkeypatch.setenv("STRANGE_CORE_HANGS", "not ready")
    with pytest.raises(StartError, match="strange_core ended with -9 before it was ready"):
        async with asyncio.timeout(SECONDS), started():
            pass


async def test_told_to_stop_while_the_core_is_born(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRANGE_CORE_HANGS", "connected")
    made = Supervisor(load_settings(SMALL), Readiness(), Credentials())
    told = asyncio.Event()
    starting = asyncio.create_task(made.start(told))
    try:
        await eventually(lambda: children("strange_core"))
        told.set()
        assert not await asyncio.wait_for(starting, SECONDS)
        assert not children("strange_core")
    finally:
        await made.close()


async def test_told_to_stop_while_it_compiles() -> None:
    async with started() as (made, _):
        told = asyncio.Event()
        told.set()
        assert not await made.open(told)
        await asyncio.wait_for(made.stop(0.0, 1.0), SECONDS)


async def test_told_to_stop_while_a_frontend_waits_for_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "END_SECONDS", 0.5)
    async with started() as (made, readiness):
        await eventually(lambda: readiness.obstacle == "no frontend serves")
        os.kill(int(made.pids()["core_pid"]), signal.SIGSTOP)
        told = asyncio.Event()
        opening = asyncio.create_task(made.open(told))
        await eventually(lambda: children("frontend"))
        told.set()
        assert not await asyncio.wait_for(opening, SECONDS)
        assert not children("frontend")
        await asyncio.wait_for(made.stop(0.0, 1.0), SECONDS)


async def test_a_kernel_that_does_not_compile_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRANGE_CORE_FAILS", "1")
    async with started() as (made, _):
        with pytest.raises(StartError, match="kernels, step 1: ArithmeticError: made for this test"):
            await asyncio.wait_for(made.open(asyncio.Event()), SECONDS)
