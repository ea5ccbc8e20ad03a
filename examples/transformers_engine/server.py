"""A blockdex server of one's own for as long as a `with` lasts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM

from blockdex import BlockdexError

START_SECONDS = 400
"""On a GPU the server compiles its kernels first; later starts find them in Triton's cache."""
STOP_SECONDS = 45


class ServerError(Exception):
    """The server did not start, failed, or did not end as it should; the message ends with its log."""


@contextmanager
def server_of(model: MiniMaxM3VLForCausalLM, flags: Sequence[str]) -> Iterator[str]:
    """Runs a server for the indexers of a model, with a small cache and a ring; otherwise as `running_server`."""
    with TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        model.config.to_json_file(config)
        own = ["--model-config", str(config), "--cache-bytes", "32MiB", "--socket", f"{folder}/ring"]
        with running_server([*own, *flags]) as address:
            yield address


@contextmanager
def running_server(flags: Sequence[str]) -> Iterator[str]:
    """Runs `blockdex serve` on free ports.

    Args:
        flags: further flags of `blockdex serve`.

    Yields:
        Its gRPC address.

    Raises:
        ServerError: it does not serve in time, fails a call, or does not exit with 0 when told to stop.
    """
    command = [sys.executable, "-m", "blockdex", "serve", *flags, "--log-format", "json"]
    ports = ["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"]
    with TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        with log.open("wb") as stderr:
            process = subprocess.Popen(command + ports, stdin=subprocess.DEVNULL, stderr=stderr)
        try:
            yield _address(process, log)
            _stop(process, log)
        except BlockdexError as error:
            raise ServerError(f"{error}\n{log.read_text()}") from error
        finally:
            process.kill()
            process.wait()


def _stop(process: subprocess.Popen[bytes], log: Path) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"the server does not stop\n{log.read_text()}") from error
    if status != 0:
        raise ServerError(f"the server exited with {status}\n{log.read_text()}")


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that the server says it serves at."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        for line in log.read_text().splitlines(keepends=True):
            if line.startswith("{") and line.endswith("\n"):
                record = json.loads(line)
                if record["event"] == "serving":
                    return str(record["grpc"])
        time.sleep(0.05)
    raise ServerError(f"the server does not serve\n{log.read_text()}")
