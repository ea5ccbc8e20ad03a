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
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from benchmarks.ring_messages import Answer, Places, Request, read_answer, write_request
from blockdex.contract.errors import BlockdexError
from blockdex.ring.handshake import take
from blockdex.ring.layout import ANSWER_STRUCT, AT, SLOT_BYTES, AnswerSlot


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
    spec: str = "{}", *flags: str, device: str = "cuda", pages: int = 1024, address: str | None = None
) -> Iterator[CoreProcess]:
    """Runs one, which is killed at the end; the spec is JSON, and an address is a path in a folder that is there.

    The flags are more of those of `benchmarks.channel_server`.
    """
    with tempfile.TemporaryDirectory(prefix="blockdex-") as folder:
        address = address or str(Path(folder) / "core.sock")
        command = [sys.executable, "-u", "-m", "benchmarks.channel_server", address]
        command += ["--device", device, "--spec", spec, "--pages", str(pages), *flags]
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
        tenant: of all requests; without one each names its own.

    Attributes:
        connected: that socket, to share memory over.
    """

    def __init__(self, address: str, tenant: str = "") -> None:
        self.connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connected.connect(address)
        self.connected.setblocking(False)
        self._handles = asyncio.run(take(self.connected, tenant))
        self.connected.settimeout(20.0)
        self._tickets = itertools.count()
        self._slot = b""

    def ask(self, request: Request, places: Places = MappingProxyType({}), seconds: float = 20.0) -> Answer:
        """Asks, and looks for the answer until it is there; what of it lies in a region is told as zeros.

        Raises:
            BlockdexError: the request is refused.
            TimeoutError: there is no answer.
        """
        segment, now = self._handles.segment, time.monotonic()
        write_request(segment, segment.request_slots_offset, 0, 0, request, now, now + 1e6, places)
        self._slot = bytes(segment.memory[segment.request_slots_offset :][:SLOT_BYTES])
        ticket = self.show()
        self._wait(ticket, seconds)
        elsewhere = {name: np.zeros(1 << 24, np.uint8) for name in places}
        numbers, answer = read_answer(segment, self._slot_of(ticket, "answer"), elsewhere)
        self._release(ticket, numbers)
        if isinstance(answer, BlockdexError):
            raise answer
        return answer

    def again(self, seconds: float = 20.0) -> float:
        """Asks the same once more, without reading the answer: seconds until it is there."""
        began = time.monotonic()
        ticket = self.show()
        self._wait(ticket, seconds)
        took = time.monotonic() - began
        at = self._slot_of(ticket, "answer")
        numbers = AnswerSlot(*ANSWER_STRUCT.unpack_from(self._handles.segment.memory, at))
        assert not numbers.code, "it was answered well before"
        self._release(ticket, numbers)
        return took

    def _slot_of(self, ticket: int, kind: str) -> int:
        segment = self._handles.segment
        count, begin = getattr(segment, f"{kind}_slots"), getattr(segment, f"{kind}_slots_offset")
        return int(begin + ticket % count * SLOT_BYTES)

    def show(self) -> int:
        """Asks the same once more, and waits for nothing; its ticket."""
        segment, ticket = self._handles.segment, next(self._tickets)
        at = self._slot_of(ticket, "request")
        segment.memory[at : at + SLOT_BYTES] = self._slot
        segment.counters[at // 8] = ticket
        segment.counters[AT["requests_written"] // 8] = ticket + 1
        if segment.flags[AT["engine_sleeps"] // 4]:
            os.write(self._handles.engine_bell, b"\0")
        return ticket

    def _wait(self, ticket: int, seconds: float) -> None:
        segment, end = self._handles.segment, time.monotonic() + seconds
        while segment.counters[AT["answers_written"] // 8] == ticket:
            if time.monotonic() > end:
                raise TimeoutError(f"no answer within {seconds:g} s")

    def _release(self, ticket: int, numbers: AnswerSlot) -> None:
        counters = self._handles.segment.counters
        if numbers.payload_bytes:
            counters[AT["answer_bytes_freed"] // 8] = numbers.payload_end
        counters[AT["answers_read"] // 8] = ticket + 1

    def close(self) -> None:
        """Ends the link."""
        self.connected.close()
        self._handles.close()
