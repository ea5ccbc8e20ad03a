"""The kinds of faults that are done to a server from outside. Each returns when what it did is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import blockdex
from faults.target import NOBODY, PAGES, Target
from faults.workload import BLOCK, HEAD_DIM
from support.tcp_proxy import TcpProxy

_HELD_SECONDS = 0.5
_MARGIN_BYTES = 256 << 10
_GREEDY_SECONDS = 30.0


class Doer:
    """Does faults to a server.

    Args:
        target: the server.
        proxy: that some of its clients come through.
        random: of which process, and how long.
    """

    def __init__(self, target: Target, proxy: TcpProxy, random: np.random.Generator) -> None:
        self._target = target
        self._proxy = proxy
        self._random = random

    def kill_core(self) -> None:
        """SIGKILL."""
        self._signal(self._target.core, signal.SIGKILL)

    def kill_frontend(self) -> None:
        """SIGKILL."""
        self._signal(self._one(self._target.frontends), signal.SIGKILL)

    def kill_supervisor(self) -> None:
        """SIGKILL, upon which the whole server ends, and is started again as a container would be."""
        self._signal(self._target.supervisor, signal.SIGKILL)
        while not self._target.has_ended():
            time.sleep(0.01)
        self._target.start()

    def stop_core(self) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        self._hold(self._target.core)

    def stop_frontend(self) -> None:
        """Likewise."""
        self._hold(self._one(self._target.frontends))

    def stop_supervisor(self) -> None:
        """Likewise."""
        self._hold(self._target.supervisor)

    def cut_connection(self) -> None:
        """Bytes of a message are there, and the rest never comes."""
        self._proxy.answers = False
        time.sleep(float(self._random.uniform(0.0, 0.05)))
        self._proxy.cut()
        self._proxy.answers = True

    def fill_memory(self) -> None:
        """A process may map no more than it has."""
        pid = self._one(self._target.pids)
        taken = _status(pid, "VmSize") * 1024 + _MARGIN_BYTES
        self._limit(pid, "as", taken)

    def fill_shared_memory(self) -> None:
        """`/dev/shm` is full while a frontend is started again, whose ring takes memory."""
        full = Path(f"/proc/{self._target.supervisor}/root/dev/shm/full")
        with contextlib.suppress(OSError):
            full.write_bytes(bytes(1 << 20))
        self._signal(self._one(self._target.frontends), signal.SIGKILL)
        time.sleep(self._while())
        full.unlink(missing_ok=True)

    def exhaust_pages(self) -> None:
        """Another tenant takes all pages, and gives them back."""
        with contextlib.suppress(blockdex.BlockdexError):
            self._take_pages()

    def exhaust_descriptors(self) -> None:
        """A process may open no more files than it has, and clients come."""
        pid = self._one(self._target.pids)
        taken = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        self._limit(pid, "nofile", taken, self._come)

    def exhaust_threads(self) -> None:
        """The server's user may have no more threads than it has, in any process that tries."""
        threads = sum(_status(pid, "Threads") for pid in self._target.pids)
        with contextlib.ExitStack() as limits:
            for pid in self._target.pids:
                limits.enter_context(_limited(pid, "nproc", threads))
            self._signal(self._one([self._target.core, *self._target.frontends]), signal.SIGKILL)
            time.sleep(self._while())

    def _while(self) -> float:
        return float(self._random.uniform(0.2, 2 * _HELD_SECONDS))

    def _one(self, pids: list[int | None] | list[int]) -> int | None:
        there = [pid for pid in pids if pid is not None]
        return int(self._random.choice(there)) if there else None

    def _signal(self, pid: int | None, number: signal.Signals) -> None:
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _hold(self, pid: int | None) -> None:
        self._signal(pid, signal.SIGSTOP)
        time.sleep(self._while())
        self._signal(pid, signal.SIGCONT)

    def _limit(self, pid: int | None, what: str, most: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        if pid is None:
            return
        with _limited(pid, what, most):
            meanwhile()
            time.sleep(self._while())

    def _come(self) -> None:
        """Clients that want to be served, and may not be."""
        for _ in range(3):
            with contextlib.suppress(blockdex.BlockdexError), blockdex.Client(self._target.address) as client:
                client.info(timeout=0.3)

    def _take_pages(self) -> None:
        with blockdex.Client(self._target.address, tenant="greedy", timeout=_GREEDY_SECONDS) as client:
            keys = np.zeros((BLOCK * PAGES // 8, HEAD_DIM), np.float32)
            numbers = range(1, 33)
            try:
                for number in numbers:
                    client.open_sequence(number)
                    client.append_keys(0, sequences=number, keys=keys)
                    keys = keys if number < 8 else keys[:BLOCK]
            finally:
                time.sleep(self._while())
                client.close_sequences(list(numbers))


KINDS: dict[str, Callable[[Doer], None]] = {
    "kill core": Doer.kill_core,
    "kill frontend": Doer.kill_frontend,
    "kill supervisor": Doer.kill_supervisor,
    "stop core": Doer.stop_core,
    "stop frontend": Doer.stop_frontend,
    "stop supervisor": Doer.stop_supervisor,
    "cut connections": Doer.cut_connection,
    "fill memory": Doer.fill_memory,
    "fill /dev/shm": Doer.fill_shared_memory,
    "exhaust pages": Doer.exhaust_pages,
    "exhaust descriptors": Doer.exhaust_descriptors,
    "exhaust threads": Doer.exhaust_threads,
}
"""By the names that results have for them."""


@contextlib.contextmanager
def _limited(pid: int, what: str, most: int) -> Iterator[None]:
    """Has a process reach a limit for a while; one that ends meanwhile is fine."""
    before = _prlimit(pid, "--noheadings", "--output=SOFT", f"--{what}").strip()
    _prlimit(pid, f"--{what}={most}:")
    try:
        yield
    finally:
        _prlimit(pid, f"--{what}={before}:")


def _prlimit(pid: int, *options: str) -> str:
    """As the server's user, who may."""
    return subprocess.run(
        [*NOBODY, "prlimit", f"--pid={pid}", *options], capture_output=True, text=True, check=False
    ).stdout


def _status(pid: int | None, name: str) -> int:
    """A number of `/proc/PID/status`; 0 of a process that is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0
