"""A server whose kernels are compiled at the start: not ready until they are, and told to stop it stops."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx

from support.serving import SMALL, environment

SECONDS = 60

PROGRAM = """
import sys, time
from blockdex.server import bootstrap as starting
from blockdex.cli.main import main
from blockdex_kernels.cpu import CpuBackend
def warm_up(self):
    for done in range(1, 1 + {steps}):
        if {seconds} < 0:
            raise ArithmeticError("made for this test")
        time.sleep({seconds})
        yield done, {steps}
CpuBackend.warm_up = warm_up
starting._WARM_UP_LINE_SECONDS = 0
sys.exit(main())
"""
"""The server, its CPU kernels compiled in steps: what compiles is Triton, which takes a GPU."""


@contextlib.contextmanager
def compiling(steps: int, seconds: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Such a server, and where its HTTP is."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ports = ("--grpc-address", "127.0.0.1:0", "--http-address", address)
    flags = (*ports, "--log-format", "json", *SMALL, "--processes", "single")
    program = PROGRAM.format(steps=steps, seconds=seconds)
    command = [sys.executable, "-c", program, "serve", *flags]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, f"http://{address}"
        finally:
            process.kill()


def answered(url: str) -> httpx.Response:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return httpx.get(url)
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_not_ready_before_everything_is_compiled() -> None:
    with compiling(steps=4, seconds=0.5) as (process, http):
        first = answered(f"{http}/readyz")
        assert first.status_code == 503
        said = {first.text}
        deadline = time.monotonic() + SECONDS
        while (answer := httpx.get(f"{http}/readyz")).status_code != 200:
            assert time.monotonic() < deadline
            said.add(answer.text)
            time.sleep(0.02)
        process.terminate()
        _, log = process.communicate(timeout=SECONDS)
    assert {f"compiling kernels, {done} of 4\n" for done in (1, 2, 3)} <= said
    records = [json.loads(line) for line in log.splitlines()]
    events = [record["event"] for record in records]
    assert [record["done"] for record in records if record["event"] == "compiling kernels"] == [1, 2, 3, 4]
    (compiled,) = [record for record in records if record["event"] == "kernels compiled"]
    assert (compiled["done"], compiled["total"]) == (4, 4)
    assert compiled["seconds"] >= 2
    assert events.index("kernels compiled") < events.index("serving")
    assert process.returncode == 0


def test_alive_and_told_to_stop_while_it_compiles() -> None:
    with compiling(steps=1000, seconds=0.2) as (process, http):
        assert [answered(f"{http}/{path}").status_code for path in ("healthz", "v1/info")] == [200, 200]
        process.terminate()
        _, log = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert "serving" not in [json.loads(line)["event"] for line in log.splitlines()]


def test_a_kernel_that_does_not_compile_ends_the_start() -> None:
    with compiling(steps=3, seconds=-1) as (process, _):
        _, log = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    (line,) = [json.loads(line) for line in log.splitlines()]
    assert line["event"] == "refused to start"
    assert line["reason"] == "kernels, step 1: ArithmeticError: made for this test"
