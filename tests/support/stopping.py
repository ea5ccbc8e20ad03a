"""Processes that are stopped, as by a debugger, and stay there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

_SECONDS = 30.0


def stop(pid: int) -> None:
    """Stops a process, and waits until every thread of it stands still: a signal may take its time to reach them."""
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + _SECONDS
    while any(_state_of(task) != "T" for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < end, f"process {pid} does not stop"
        time.sleep(0.001)


def _state_of(task: Path) -> str:
    """The letter that the kernel has for what a thread does, T for one that is stopped."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]
