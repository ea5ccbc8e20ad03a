"""The server that faults come to: which processes it has, and how it is started again on the same addresses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.processes import command_of
from support.serving import environment

MODEL = {
    "sparse_num_index_heads": 2,
    "sparse_index_dim": 32,
    "sparse_block_size": 16,
    "sparse_topk_blocks": 4,
    "sparse_init_block": 0,
    "sparse_local_block": 1,
    "sparse_attention_freq": [1, 1],
}
"""So small that a sequence of a few hundred tokens has more blocks than a query may select."""
LAYERS, PAGES = 2, 512
CACHE_BYTES = PAGES * LAYERS * 16 * 32 * 2
_START_SECONDS, _STOP_SECONDS = 60.0, 30.0
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
_READS_ALL = ("--inh-caps=+dac_override,+dac_read_search", "--ambient-caps=+dac_override,+dac_read_search")
_SMALL_SHM = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh")


class Target:
    """A server of several processes, with a small private `/dev/shm`, as a user whose threads can be bounded.

    Args:
        flags: more of `blockdex serve`.
        faults: `BLOCKDEX_FAULTS`, or nothing.
        wrapped: whether it runs as that user, and with that `/dev/shm`.

    Attributes:
        address: `host:port` of gRPC, the same whenever it is started.
        http: `host:port` of HTTP, likewise.
        faults_made: lines that told of a fault of the switchboard so far.
    """

    def __init__(self, *flags: str, faults: str = "", wrapped: bool = True) -> None:
        self._wrapper = (*_SMALL_SHM, *NOBODY, *_READS_ALL) if wrapped else ()
        self._folder = tempfile.TemporaryDirectory(prefix="blockdex-faults-")
        model = Path(self._folder.name, "config.json")
        model.write_text(json.dumps({"sparse_attention_config": MODEL}), encoding="ascii")
        self.address, self.http = (f"127.0.0.1:{port}" for port in _free_ports(2))
        self._flags = (
            *("serve", "--processes", "split", "--frontends", "2", "--device", "cpu", "--log-format", "json"),
            *("--model-config", str(model), "--num-layers", str(LAYERS), "--cache-bytes", str(CACHE_BYTES)),
            *("--grpc-address", self.address, "--http-address", self.http, *flags),
        )
        self._variables = {"BLOCKDEX_FAULTS": faults} if faults else {}
        self.faults_made: list[str] = []
        self.output: list[str] = []
        self.start()

    @property
    def supervisor(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def core(self) -> int | None:
        """Process id, None between two."""
        return next(iter(self._children("blockdex.server.engine_process")), None)

    @property
    def frontends(self) -> list[int]:
        """Process ids."""
        return self._children("blockdex.server.frontend_process")

    @property
    def pids(self) -> list[int]:
        """All of them."""
        return [self.supervisor, *self._children("blockdex.server.")]

    def start(self) -> None:
        """Starts it, and waits until it serves.

        Raises:
            AssertionError: it does not.
        """
        command = (*self._wrapper, sys.executable, "-m", "blockdex", *self._flags)
        self._process = subprocess.Popen(
            command, env=environment(**self._variables), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        serving = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(self._process, serving))
        self._reader.start()
        if not serving.wait(_START_SECONDS) or self._process.poll() is not None:
            self.stop()
            raise AssertionError("the server did not start:\n" + "\n".join(self.output[-20:]))

    def has_ended(self) -> bool:
        """Whether its supervisor has."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Ends it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise AssertionError("the server did not stop") from None
        self._reader.join(_STOP_SECONDS)

    def close(self) -> None:
        """Ends it, and gives its files back."""
        self.stop()
        self._folder.cleanup()

    def _children(self, module: str) -> list[int]:
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        with contextlib.suppress(OSError):
            return [pid for pid in map(int, path.read_text("ascii").split()) if module in command_of(pid)]
        return []

    def _read(self, process: subprocess.Popen[str], serving: threading.Event) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                if line.startswith("BLOCKDEX_FAULTS: "):
                    self.faults_made.append(line.split()[-1])
                else:
                    self.output.append(line.rstrip("\n"))
                if '"event": "serving"' in line:
                    serving.set()
        serving.set()


@contextlib.contextmanager
def target(*flags: str, faults: str = "", wrapped: bool = True) -> Iterator[Target]:
    """Runs one."""
    made = Target(*flags, faults=faults, wrapped=wrapped)
    try:
        yield made
    finally:
        made.close()


def _free_ports(count: int) -> Sequence[int]:
    with contextlib.ExitStack() as sockets:
        bound = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(each.getsockname()[1]) for each in bound]
