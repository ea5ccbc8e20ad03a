"""A real engine, and frontends of other makes that connect to it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np

from benchmarks.ring_messages import Request
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import Limits
from blockdex.ring.handshake import take
from blockdex.ring.sharing import share
from support.asking import eventually
from support.cache_state import check_integrity
from support.foreign_frontend import ForeignFrontend
from support.ring_engine import RunningOverRings, hosted
from support.running_engine import LIMITS, SPEC, TIMEOUT, get, open_sequence, tokens, values
from support.shared_memory import SharedMemory

SMALL = dataclasses.replace(LIMITS, max_message_bytes=1 << 16, max_queued_requests=64)
LENGTH = 30
HEADS, DIM = SPEC.num_index_heads, SPEC.head_dim


class Host(RunningOverRings):
    """A real engine, a channel to it, and frontends of other makes.

    Attributes:
        address: where the engine listens.
        frontends: those that are there.
    """

    address: str
    frontends: list[ForeignFrontend]

    async def connect(self, tenant: str = "") -> ForeignFrontend:
        """One more link, of a tenant or of all."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connected.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connected, self.address)
        self.frontends.append(ForeignFrontend(await asyncio.wait_for(take(connected, tenant), TIMEOUT), connected))
        connected.settimeout(TIMEOUT)
        return self.frontends[-1]

    async def share(self, frontend: ForeignFrontend, memory: SharedMemory) -> int:
        """Shares memory over a link; the number of the region."""
        assert frontend.connected is not None
        shared = await asyncio.to_thread(share, frontend.connected, "memfd", [memory.fd])
        assert shared.bytes == len(memory.bytes)
        frontend.regions[shared.region] = memory.bytes
        return shared.region

    def leave(self, frontend: ForeignFrontend) -> None:
        """One less."""
        self.frontends.remove(frontend)
        frontend.close()


@contextlib.asynccontextmanager
async def host(limits: Limits = SMALL, **options: Any) -> AsyncIterator[Host]:
    """A running engine; it must be of the same epoch, and sound, when all is over."""
    async with hosted(limits=limits, **options) as run:
        running = Host(run.backend, run.engine, run.channel)
        running.address, running.frontends = run.address, []
        epoch = run.engine.info().epoch
        try:
            yield running
        finally:
            for frontend in list(running.frontends):
                running.leave(frontend)
        assert isinstance(await running.refusal(get(2**64 - 1)), BlockdexError)
        assert run.engine.info().epoch == epoch, "the cache was lost"
        check_integrity(run.engine._cache)


async def told(frontend: ForeignFrontend, ticket: int) -> Any:
    """The answer to a request."""
    await eventually(lambda: frontend.read() or ticket in frontend.told)
    return frontend.told[ticket].answer


def both(*rows: tuple[int, ...], **options: Any) -> Any:
    """Appends to layer 0 of rows, and selects for that."""
    length = max(sum(row[2] for row in rows), 0)
    random = np.random.default_rng(5)
    return tokens(0, rows, keys=values(random, length, DIM), queries=values(random, length, HEADS, DIM), **options)


async def fill(ask: Callable[[Request], Any], *sequences: int, tenant: str = "tenant") -> None:
    """Opens sequences and fills all layers of each."""
    for sequence in sequences:
        await ask(open_sequence(sequence, tenant=tenant))
        for layer in range(SPEC.num_layers):
            keys = values(np.random.default_rng([sequence, layer]), LENGTH, DIM)
            await ask(tokens(layer, [(sequence, 0, LENGTH)], keys=keys, tenant=tenant))
