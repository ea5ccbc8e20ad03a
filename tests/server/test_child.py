"""A child and its supervisor: how it starts, how it fails to, and that it does not outlive it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blockdex.server.bootstrap import StartError
from blockdex.server.child_process import Child
from blockdex.server.config import ServeSettings, load_settings
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


async def test_mps_is_asked_to_end_a_child_that_hangs_before_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's programs need a GPU: others of their names note what they are asked, and that the child lives then."""
    server = tmp_path / "nvidia-cuda-mps-server"
    server.symlink_to("/bin/sleep")
    asked, control = tmp_path / "asked", tmp_path / "nvidia-cuda-mps-control"
    monkeypatch.setenv("PYTHONPATH", str(Path(hanging_child.__file__).parent))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    with subprocess.Popen([server, "60"]) as running:
        answer = f'case "$words" in get*) echo {os.getpid()}; echo {running.pid};; esac'
        control.write_text(f'#!/bin/sh\nread words\necho "$words $(ls -d /proc/${{words##* }})" >> {asked}\n{answer}\n')
        control.chmod(0o755)

        async def end_one() -> Child:
            child, _ = await Child.start("hanging_child", ServeSettings(), number=7)
            await asyncio.sleep(0.2)
            assert await child.end(0.1) == -signal.SIGKILL
            return child

        await end_one()
        assert not asked.exists(), "there is no MPS"
        (tmp_path / "control").touch()
        child = await end_one()
        said = asked.read_text(encoding="utf-8").splitlines()
        assert said[1:] == [f"terminate_client {running.pid} {child.pid} /proc/{child.pid}"]
        control.write_text("#!/bin/sh\nexit 1\n")
        await end_one()
        running.kill()


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
