"""The engine core: owns the device, the cache and the loop. Knows the ring and no gRPC."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator

from blockdex.config import ServeSettings
from blockdex.logs import log_fault
from blockdex.processes.child import run_child
from blockdex.starting import StartError, build_engine, gpu_uuid
from blockdex.transport.host import RingHost
from blockdex.transport.inbox import RingInbox
from blockdex.transport.talk import Talk, Words
from blockdex_kernels import SpecError

logger = logging.getLogger(__name__)


async def _run(talk: Talk, settings: ServeSettings, words: Words, heard: AsyncIterator[Words]) -> None:
    threading.excepthook = _end_with_the_thread
    inbox = RingInbox(settings.max_queued_requests, settings.spin_seconds)
    try:
        engine = build_engine(settings, settings.index_spec(), inbox)
    except (StartError, SpecError) as error:
        talk.tell({"refused": str(error)})
        return
    engine.start(inbox.deliver)
    with socket.socket(fileno=words["listening"]) as listening:
        listening.setblocking(False)
        hosting = asyncio.create_task(RingHost(engine, inbox, listening).run())
        talk.tell({"ready": True, "gpu": gpu_uuid(engine.info().device)})
        async for told in heard:
            match told:
                case {"expect_no_more": True}:
                    engine.expect_no_more()
                case {"stop": True}:
                    break
        hosting.cancel()
        await asyncio.gather(hosting, return_exceptions=True)
    engine.stop()


def _end_with_the_thread(fault: threading.ExceptHookArgs) -> None:
    # Without its loop the engine is nothing; a new process is.
    assert fault.exc_value is not None
    log_fault(logger, "the engine's thread ended", fault.exc_value)
    os._exit(1)


if __name__ == "__main__":
    run_child(_run)
