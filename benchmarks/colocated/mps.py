"""The CUDA multi-process service, for as long as something is measured under it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SECONDS = 15.0


@contextlib.contextmanager
def mps() -> Iterator[None]:
    """Processes that are started meanwhile share the GPU under one of its own, which ends with the last of them.

    Raises:
        RuntimeError: it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="blockdex-mps-", ignore_cleanup_errors=True) as folder:
        places = {"CUDA_MPS_PIPE_DIRECTORY": Path(folder) / "pipes", "CUDA_MPS_LOG_DIRECTORY": Path(folder) / "logs"}
        for name, place in places.items():
            place.mkdir()
            os.environ[name] = str(place)
        try:
            _start()
            yield
        finally:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                control("quit -t 5")
            for name in places:
                del os.environ[name]


def _start() -> None:
    try:
        subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, timeout=_SECONDS)  # noqa: S607 - PATH has the driver's
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"MPS does not start: {error}") from error


def control(words: str) -> str:
    """What MPS answers to a command.

    Raises:
        OSError: there is none.
        subprocess.SubprocessError: it fails, or does not answer.
    """
    command = ["nvidia-cuda-mps-control"]
    done = subprocess.run(command, input=f"{words}\n", capture_output=True, text=True, check=True, timeout=_SECONDS)
    return done.stdout
