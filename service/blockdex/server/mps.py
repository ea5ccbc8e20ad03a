"""NVIDIA's Multi-Process Service (MPS), where it serves this server's GPU."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

from blockdex.logs import log_event

_PROGRAM = "nvidia-cuda-mps-control"
_PIPES = "/tmp/nvidia-mps"  # noqa: S108 - NVIDIA chose it
"""Where MPS has them unless it is told otherwise."""
_SERVER = "nvidia-cuda-mps"
"""What the kernel calls a server of it: the first 15 characters of its name."""
_SECONDS = 2.0

logger = logging.getLogger(__name__)


def end_client(pid: int) -> None:
    """Has MPS end what a process has on the GPU, before it is killed.

    One that is killed in the middle of its kernels can take all clients of MPS along. Returns when it is done or
    refused, within seconds, and at once where there is no MPS. One in another container, which numbers processes
    otherwise, is not asked.
    """
    if not (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", _PIPES)) / "control").exists():
        return
    try:
        for server in filter(_is_server, _ask("get_server_list").split()):
            _ask(f"terminate_client {server} {pid}")
    except (OSError, subprocess.SubprocessError) as error:
        log_event(logger, logging.WARNING, "mps does not end a process", pid=pid, reason=str(error))


def _ask(words: str) -> str:
    done = subprocess.run(
        [_PROGRAM], input=f"{words}\n", stdout=subprocess.PIPE, text=True, check=True, timeout=_SECONDS
    )
    return done.stdout


def _is_server(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text("ascii").startswith(_SERVER)
    except OSError:
        return False
