"""A server of one process: the engine in a thread, and the same ring before it that lies between two processes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from blockdex.ring.client import RingChannel, Spinning
from blockdex.ring.handshake import listen
from blockdex.ring.listener import RingHost
from blockdex.ring.selector import RingSelector
from blockdex.ring.server import RingInbox
from blockdex.server.bootstrap import spin_seconds, tell_seconds
from blockdex.server.config import ServeSettings
from blockdex.server.credential_files import CredentialFiles
from blockdex.server.request_counts import OwnCounts

if TYPE_CHECKING:
    from blockdex.scheduler.loop import Engine


@asynccontextmanager
async def connected(
    engine: Engine,
    inbox: RingInbox,
    settings: ServeSettings,
    public: list[socket.socket],
    requests: OwnCounts,
    selector: RingSelector,
    files: CredentialFiles,
    told_to_stop: asyncio.Event,
) -> AsyncIterator[RingChannel]:
    """A channel to an engine, which the caller starts; both end here, and what is not answered then stays so.

    Args:
        engine: takes its requests from the inbox.
        inbox: where they come in.
        settings: of the server.
        public: where other clients on this host connect.
        requests: counts those that were answered.
        selector: of the loop.
        files: by which those clients are known.
        told_to_stop: set where the link cannot go on.
    """
    there, seconds = asyncio.Event(), spin_seconds(settings)
    with listen() as listening:
        requests.channel = channel = RingChannel(
            str(listening.getsockname(), "latin-1"),
            changed=lambda connected: there.set() if connected else there.clear(),
            tell_seconds=tell_seconds(settings),
            timed=requests.observe_many,
            spinning=Spinning(selector, seconds) if seconds else None,
        )
        hosts = [RingHost(engine, inbox, listening)]
        for each in public:
            hosts.append(RingHost(engine, inbox, each, files.credentials))
            files.tell(hosts[-1].take_up)
        tasks = [asyncio.create_task(work) for work in (*(host.run() for host in hosts), channel.run())]
        for task in tasks:
            # By itself it ends by a fault alone.
            task.add_done_callback(lambda _: told_to_stop.set())
        try:
            await asyncio.wait([asyncio.create_task(there.wait()), *tasks], return_when=asyncio.FIRST_COMPLETED)
            yield channel
        finally:
            faults = [task.exception() for task in tasks if task.done() and not task.cancelled()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            engine.stop()
    for fault in faults:
        if fault is not None:
            raise fault
