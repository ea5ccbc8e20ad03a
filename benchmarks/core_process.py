"""An engine core in a process of its own, and a client of its ring that waits for each answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.ring_messages import Answer, Request, read_answer, write_request
from blockdex.contract.errors import BlockdexError
from blockdex.ring.handshake import take
from blockdex.ring.layout import AT, SLOT_BYTES


class CoreProcess(NamedTuple):
    """A core that serves.

    Attributes:
        address: of its socket.
        epoch: of its cache.
        process: the core's.
    """

    address: str
    epoch: int
    process: subprocess.Popen[str]


@contextmanager
def core_process(
    spec: str = "{}", *, device: str = "cuda", pages: int = 1024, address: str | None = None
) -> Iterator[CoreProcess]:
    """Runs one, which is killed at the end; the spec is JSON, and an address is a path in a folder that is there."""
    with tempfile.TemporaryDirectory(prefix="blockdex-") as folder:
        address = address or str(Path(folder) / "core.sock")
        command = [sys.executable, "-u", "-m", "benchmarks.channel_server", address]
        command += ["--device", device, "--spec", spec, "--pages", str(pages)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield CoreProcess(address, json.loads(process.stdout.readline())["epoch"], process)
            finally:
                process.kill()


class RingPeer:
    """A client of a core's ring, of one request at a time.

    Args:
        address: of the core's socket.
    """

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(address)
        self._socket.setblocking(False)
        self._handles = asyncio.run(take(self._socket))
        self._tickets = itertools.count()

    def ask(self, request: Request, seconds: float = 20.0) -> Answer:
        """Asks, and looks for the answer until it is there.

        Raises:
            BlockdexError: the request is refused.
            TimeoutError: there is no answer.
        """
        segment, ticket, now = self._handles.segment, next(self._tickets), time.monotonic()
        slot = segment.request_slots_offset + ticket % segment.request_slots * SLOT_BYTES
        write_request(segment, slot, 0, ticket, request, now, now + seconds)
        segment.counters[AT["requests_written"] // 8] = ticket + 1
        os.write(self._handles.engine_bell, b"\0")
        while segment.counters[AT["answers_written"] // 8] == ticket:
            if time.monotonic() > now + seconds:
                raise TimeoutError(f"no answer within {seconds:g} s")
        at = segment.answer_slots_offset + ticket % segment.answer_slots * SLOT_BYTES
        numbers, answer = read_answer(segment, at)
        if numbers.payload_bytes:
            segment.counters[AT["answer_bytes_freed"] // 8] = numbers.payload_end
        segment.counters[AT["answers_read"] // 8] = ticket + 1
        if isinstance(answer, BlockdexError):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the link."""
        self._socket.close()
        self._handles.close()
