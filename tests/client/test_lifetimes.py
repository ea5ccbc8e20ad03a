"""A process that stands still, or is killed, in the middle of its calls: others are served, and nothing is left."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import blockdex
from support import holding_client
from support.clients import new_sequence
from support.processes import eventually
from support.serving import Serving

LINKS = 40


def held_by(server: Serving) -> tuple[int, int, list[str]]:
    """Files that the server's processes have open, memory of clients that they have mapped, and what has a name."""
    files = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in server.pids())
    mapped = sum(Path(f"/proc/{pid}/maps").read_text("ascii").count("memfd:blockdex") for pid in server.pids())
    return files, mapped, sorted(path.name for path in Path("/dev/shm").iterdir() if "blockdex" in path.name)


def test_forty_links_that_stand_still_and_are_killed_leave_nothing_and_hold_nobody_up(
    server: Serving, counted: Callable[..., int]
) -> None:
    keys, queries = np.ones((2, 128), np.float32), np.ones((1, 4, 128), np.float32)
    with blockdex.Client(server.grpc_address, transport="ring") as other:
        sequence = new_sequence()
        other.open_sequence(sequence)
        before = held_by(server)
        command = (sys.executable, "-m", holding_client.__name__, server.grpc_address, str(LINKS))
        with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as holding:
            try:
                eventually(lambda: counted("blockdex_waiting_requests") == LINKS, "all wait", seconds=60)
                assert counted("blockdex_links") >= LINKS
                for signalled in (signal.SIGSTOP, signal.SIGKILL):
                    holding.send_signal(signalled)
                    other.append_keys(0, sequences=sequence, keys=keys)
                    assert other.select_blocks(0, sequences=sequence, queries=queries).shape == (1, 4, 16)
            finally:
                holding.kill()
        eventually(lambda: counted("blockdex_waiting_requests") == 0, "what waited is given up")
        eventually(lambda: held_by(server)[1:] == before[1:], "its memory is let go of")
        eventually(lambda: held_by(server)[0] <= before[0] + 4, "its files are closed")  # some are HTTP's and gRPC's
        assert other.get_sequence(sequence).lengths[0] == 4
        other.close_sequence(sequence)
    with blockdex.Client(server.grpc_address, tenant="holding") as cleaning:
        cleaning.close_sequences(range(1, LINKS + 1))
