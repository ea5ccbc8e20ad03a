"""A child and its supervisor: how it starts, how it fails to, and that it does not outlive it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockdex.server.bootstrap import StartError
from blockdex.server.child_process import Child
from blockdex.server.config import load_settings
from support import hanging_child
from support.processes import SECONDS, command_of, eventually
from support.serving import SMALL, environment


def test_a_child_that_hangs_ends_with_its_supervisor() -> None:
    folder = str(Path(hanging_child.__file__).parent)
    variables = environment(PYTHONPATH=os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, hanging_child.__file__]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        child, number = map(int, supervisor.stdout.readline().split())
        assert number == 7
        supervisor.kill()
    eventually(lambda: "hanging_child" not in command_of(child), "it is gone", SECONDS)


async def test_one_that_ends_before_it_is_ready_is_told_of() -> None:
    with pytest.raises(StartError, match="this ended with 0 before it was ready"):
        await Child.start("this", load_settings([]))


async def test_one_that_refuses_is_told_of() -> None:
    settings = load_settings(["--cache-bytes", "1", "--device", "cpu"])
    with pytest.raises(StartError, match="cache_bytes: one page takes 1867776 bytes, got 1"):
        await Child.start("blockdex.server.engine_process", settings, listening=0)


async def test_a_core_that_cannot_let_anybody_in_ends() -> None:
    """What it is given to listen on is no socket."""
    read, write = os.pipe()
    try:
        core, _ = await Child.start("blockdex.server.engine_process", load_settings(SMALL), [read], listening=read)
        hearing = asyncio.create_task(_hear(core))
        assert await asyncio.wait_for(core.ended, SECONDS) == 1
        await hearing
    finally:
        os.close(read)
        os.close(write)


async def _hear(child: Child) -> None:
    async for _ in child.heard:
        pass
