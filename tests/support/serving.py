"""A real `blockdex serve` in a process of its own, on free ports; for every test that needs a server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 180.0  # With a GPU it compiles every kernel, where no cache holds them.
STOP_SECONDS = 45.0

SMALL = ("--num-layers", "3", "--cache-bytes", "16MiB", "--device", "cpu")


@dataclass
class Serving:
    """A server that runs.

    Attributes:
        grpc_address: `host:port` of its gRPC.
        http_address: `host:port` of its HTTP.
        process: the server.
        socket: of its ring.
        output: its lines on stderr so far, one JSON object each.
    """

    process: subprocess.Popen[str]
    output: list[str] = field(default_factory=list)
    grpc_address: str = ""
    http_address: str = ""
    socket: Path = Path()

    def event(self, name: str) -> dict[str, Any]:
        """The one line of output with that event."""
        (line,) = [record for record in map(json.loads, self.output) if record["event"] == name]
        return dict(line)

    def pids(self) -> list[int]:
        """Process ids: the one that was started, and its children."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
        return [pid, *map(int, children)]

    def stop(self) -> int:
        """Sends SIGTERM, waits for the end and returns the exit status; a server that does not end is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Waits for the end and returns the exit status; a server that does not end is killed."""
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError("the server did not stop:\n" + "\n".join(self.output)) from None
        finally:
            self._reader.join()

    def start(self) -> None:
        """Waits until the server says that it serves."""
        serving = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(serving,))
        self._reader.start()
        if not serving.wait(START_SECONDS) or not self.grpc_address:
            self.process.kill()
            self.process.wait()
            raise AssertionError("the server did not start:\n" + "\n".join(self.output))

    def _read(self, serving: threading.Event) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.output.append(line.rstrip("\n"))
                if not serving.is_set() and '"event": "serving"' in line:
                    record = json.loads(line)
                    self.grpc_address, self.http_address = record["grpc"], record["http"]
                    serving.set()
        serving.set()


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without its own blockdex settings, with others instead."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BLOCKDEX_")}
    return inherited | variables


@contextlib.contextmanager
def serve(*flags: str, program: Sequence[str] = ("-m", "blockdex"), **variables: str) -> Iterator[Serving]:
    """Runs `blockdex serve` on free ports of the loopback; at the end stops it, if it runs, and checks its status.

    Args:
        flags: more flags; without any, `SMALL`.
        program: what Python runs.
        variables: `BLOCKDEX_*` settings by their names.
    """
    with tempfile.TemporaryDirectory(prefix="blockdex-") as folder:
        ports = ("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0", "--log-format", "json")
        process = subprocess.Popen(
            [sys.executable, *program, "serve", *ports, "--socket", f"{folder}/ring", *(flags or SMALL)],
            env=environment(**variables),
            stderr=subprocess.PIPE,
            text=True,
        )
        serving = Serving(process, socket=Path(folder, "ring"))
        serving.start()
        try:
            yield serving
        finally:
            running = process.poll() is None
            status = serving.stop()
    assert status == 0 or not running, "the server ended with {}:\n{}".format(status, "\n".join(serving.output))
