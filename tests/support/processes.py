"""A server of several processes: which they are, and what is left of them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from support.serving import SMALL, Serving, serve

SECONDS = 30.0


class Split:
    """A server whose engine core and frontends are processes of their own."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    @property
    def supervisor(self) -> int:
        """Process id."""
        return self.serving.process.pid

    @property
    def core(self) -> int:
        """Process id of the engine core that runs now."""
        return self._children("blockdex.server.engine_process")[0]

    @property
    def frontends(self) -> list[int]:
        """Process ids of the frontends that run now."""
        return self._children("blockdex.server.frontend_process")

    def _children(self, module: str) -> list[int]:
        return [pid for pid in self.serving.pids()[1:] if module in command_of(pid)]

    def ready(self) -> str:
        """What /readyz says."""
        return httpx.get(f"http://{self.serving.http_address}/readyz").text.strip()

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics."""
        text = httpx.get(f"http://{self.serving.http_address}/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        raise AssertionError(f"no sample {name} {labels}")


@contextlib.contextmanager
def split(*flags: str, **variables: str) -> Iterator[Split]:
    """Runs a small split server."""
    with serve(*SMALL, "--processes", "split", *flags, **variables) as serving:
        yield Split(serving)


def command_of(pid: int) -> str:
    """Command line of a process; empty for one that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def kill(pid: int) -> None:
    """Ends a process at once."""
    os.kill(pid, signal.SIGKILL)


def eventually(holds: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    """Asks again until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
