"""Kills under MPS, five times each: of an idle client, of a busy one, of a core; and what another client sees.

    python tests/gpu/mps_kills.py

MPS is started and ended here. `asked first` has MPS end the process before it is killed, as a supervisor does with its
core. A client that lives on is counted by its calls in the second after the kill.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import torch

from benchmarks.colocated.mps import mps
from benchmarks.core_process import RingPeer, core_process
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import OpenSequences
from blockdex.device_channel.channel import DeviceChannel
from blockdex.server.mps import end_client
from blockdex_kernels import IndexSpec

FIELDS = {"num_layers": 1}
SPEC, TENANT, TIMES = IndexSpec(**FIELDS), "kills", 5  # type: ignore[arg-type]
_SECONDS, _SEEN_SECONDS, _LONGEST_SECONDS = 60.0, 1.0, 10.0


def client(address: str, epoch: int, how: str) -> None:
    """A client: says how many calls it has made, ten times a second, until it sees an error; an idle one makes one."""
    sequence = os.getpid()
    RingPeer(address).ask(OpenSequences(TENANT, 0, (sequence,), (0,)))
    channel = DeviceChannel(address, TENANT, SPEC, epoch, max_tokens=1)
    numbers = {"sequences": sequence, "starts": 0, "lengths": 1}
    asked = {name: torch.tensor([number], device="cuda") for name, number in numbers.items()}
    keys, queries = (torch.ones(shape, device="cuda").bfloat16() for shape in ((1, 1, 128), (1, 1, 4, 128)))
    calls, told = 0, 0.0
    try:
        while how == "busy" or not calls:
            channel.append_and_select(0, **asked, keys=keys, queries=queries, rollback=True)  # type: ignore[arg-type]
            torch.cuda.synchronize()
            channel.check()
            calls += 1
            if time.monotonic() - told > 0.1:
                told = time.monotonic()
                print(calls, told, flush=True)
        time.sleep(_SECONDS)
    except (BlockdexError, RuntimeError) as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        os._exit(1)


class Run:
    """A core under MPS, and a busy client that sees what becomes of others; both anew where one did not live on."""

    def __init__(self) -> None:
        with ExitStack() as starting:
            self._stack = starting
            starting.enter_context(mps())
            self.core = starting.enter_context(core_process(json.dumps(FIELDS), pages=256))
            (self._witness,) = self.clients("busy", 1)
            self._stack = starting.pop_all()

    def close(self) -> None:
        """Ends everything."""
        self._stack.close()

    def clients(self, how: str, count: int) -> list[subprocess.Popen[str]]:
        """Clients, each in a process of its own, which have made a call."""
        command = [sys.executable, "-u", __file__, self.core.address, str(self.core.epoch), how]
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        for process in started:
            self._stack.callback(process.kill)
        for process in started:
            assert process.stdout is not None
            if _said(said := process.stdout.readline()) is None:
                raise RuntimeError(f"a client did not start: {said!r}")
        return started

    def seen(self) -> tuple[bool, str]:
        """Whether the other client goes on from now on, and what it says: its calls, or which error after how long."""
        witness, began, first = self._witness, time.monotonic(), 0
        assert witness.stdout is not None
        hangs = threading.Timer(_LONGEST_SECONDS, witness.kill)
        hangs.start()
        for line in witness.stdout:
            if (said := _said(line)) is None:
                hangs.cancel()
                return False, f"{line.strip()} after {time.monotonic() - began:.2f} s"
            calls, told = said
            if told < began:  # what it said before the kill, and nobody has read yet
                first = calls
            elif told - began > _SEEN_SECONDS:
                hangs.cancel()
                return True, f"goes on, {calls - first} calls in {told - began:.2f} s"
        return False, f"ended without a word after {time.monotonic() - began:.2f} s"


def _said(line: str) -> tuple[int, float] | None:
    """A client's calls, and when it had made them; None where it says something else."""
    words = line.split()
    if len(words) != 2 or not words[0].isdecimal():
        return None
    return int(words[0]), float(words[1])


def kill(pid: int, asked: bool) -> None:
    """As it says."""
    if asked:
        end_client(pid)
    os.kill(pid, signal.SIGKILL)


def kill_clients(how: str, asked: bool) -> None:
    """One after the other."""
    left = TIMES
    while left:
        run = Run()
        try:
            for victim in run.clients(how, left):
                left -= 1
                kill(victim.pid, asked)
                goes_on, said = run.seen()
                lives = run.core.process.poll() is None
                tell(how, asked, TIMES - left, f"{said}; the core {'lives' if lives else 'is gone'}")
                if not goes_on or not lives:
                    break
        finally:
            run.close()


def kill_cores(asked: bool) -> None:
    """Each with a client whose calls it answers."""
    for attempt in range(1, TIMES + 1):
        run = Run()
        try:
            kill(run.core.process.pid, asked)
            tell("core", asked, attempt, run.seen()[1])
        finally:
            run.close()


def tell(victim: str, asked: bool, attempt: int, said: str) -> None:
    """A line."""
    print(f"{victim} killed{', asked first' if asked else ''}, {attempt}: another client {said}", flush=True)


def main() -> None:
    """Tries each kill."""
    for asked in (False, True):
        for how in ("idle", "busy"):
            kill_clients(how, asked)
        kill_cores(asked)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        client(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        main()
