"""A real engine behind real rings, both ends in this process: `running` of `running_engine`, over the ring."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

from benchmarks.ring_messages import Answer, Request
from blockdex.contract.messages import Limits
from blockdex.ring.client import Spinning
from blockdex.ring.handshake import listen
from blockdex.ring.listener import RingHost
from blockdex.ring.server import RingInbox
from blockdex.scheduler.loop import Engine
from blockdex_kernels import IndexSpec
from support.asking import MessageChannel
from support.running_engine import DECODE_QUERIES, LIMITS, SPEC, TIMEOUT, Running, WatchedBackend


@dataclass
class Hosted:
    """An engine, its kernels, the socket that it listens on, and a channel to it, which is connected while `there`."""

    backend: WatchedBackend
    engine: Engine
    inbox: RingInbox
    listening: socket.socket
    channel: MessageChannel
    hosting: asyncio.Task[None]
    there: asyncio.Event

    @property
    def address(self) -> str:
        """Where it listens."""
        return str(self.listening.getsockname(), "latin-1")

    async def ask(self, request: Request, timeout: float = TIMEOUT) -> Answer:
        """Queues a request and waits for its answer."""
        return await asyncio.wait_for(self.channel.submit(request, timeout), 2 * TIMEOUT)


@contextlib.asynccontextmanager
async def hosted(
    spec: IndexSpec = SPEC,
    *,
    limits: Limits = LIMITS,
    num_pages: int = 512,
    spin_seconds: float = 0.0,
    spinning: Spinning | None = None,
) -> AsyncIterator[Hosted]:
    """Runs an engine behind rings and connects a channel to it."""
    inbox = RingInbox(spin_seconds)
    backend = WatchedBackend(spec, num_pages)
    engine = Engine(backend, limits=limits, decode_queries=DECODE_QUERIES, prefill_slice_seconds=1e-6, inbox=inbox)
    engine.start()
    there = asyncio.Event()
    with listen() as listening:
        hosting = asyncio.create_task(RingHost(engine, inbox, listening).run())
        channel = MessageChannel(
            str(listening.getsockname(), "latin-1"),
            changed=lambda connected: there.set() if connected else there.clear(),
            tell_seconds=-1.0,
            spinning=spinning,
        )
        running = asyncio.create_task(channel.run())
        try:
            await asyncio.wait_for(there.wait(), TIMEOUT)
            yield Hosted(backend, engine, inbox, listening, channel, hosting, there)
        finally:
            for task in (running, hosting):
                task.cancel()
            await asyncio.gather(running, hosting, return_exceptions=True)
            engine.stop()
            inbox.look_round()  # whose links are gone, and nobody else looks any more
            os.close(inbox.nudge)


class RunningOverRings(Running):
    """An engine behind rings, its kernels and the channel to it."""

    @property
    def step_requests(self) -> int:
        """Requests that the core has served in steps so far."""
        return int(self.engine._core.counts()["step_requests"][1])
