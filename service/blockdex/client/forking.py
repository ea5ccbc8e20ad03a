"""What a forked process cannot have: a client, where its parent had one. To be imported before gRPC."""

from __future__ import annotations

import os

# Else gRPC starts threads in a forked process, which crash it now and then though it makes no call; a fork of a process
# with streams may hang in its handlers.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_owner: int | None = None
"""The process that made the first client."""


def check_process() -> None:
    """Begins what needs gRPC, whose threads and locks, and those of the clients, do not live on in a forked process.

    Raises:
        RuntimeError: a client was made before this process was forked.
    """
    global _owner  # noqa: PLW0603 - gRPC, too, is one for the process
    if _owner is None:
        _owner = os.getpid()
    if is_forked():
        raise RuntimeError(
            f"process {_owner} had blockdex clients when process {os.getpid()} was forked from it, where neither they "
            "nor new ones work: spawn processes, or fork before the first client is made"
        )


def is_forked() -> bool:
    """Whether a client was made before this process was forked."""
    return _owner not in (None, os.getpid())
