"""The engine core: owns the device, the cache and the loop. Knows the ring and no gRPC."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from blockdex.contract.credentials import Credentials
from blockdex.logs import log_fault
from blockdex.ring.control_channel import ControlChannel, Words
from blockdex.ring.engine_reports import reply_to
from blockdex.ring.listener import RingHost
from blockdex.ring.server import RingInbox
from blockdex.server.bootstrap import (
    StartError,
    answer_all,
    build_engine,
    end_with_the_thread,
    gpu_uuid,
    spin_seconds,
    warm_up,
)
from blockdex.server.child_process import run_child
from blockdex.server.config import ServeSettings
from blockdex_kernels import SpecError

if TYPE_CHECKING:
    from blockdex.scheduler.loop import Engine

logger = logging.getLogger(__name__)


async def run(control: ControlChannel, settings: ServeSettings, words: Words, heard: AsyncIterator[Words]) -> None:
    """Builds the engine, compiles its kernels and lets frontends in, until the supervisor has it stop or is gone."""
    threading.excepthook = end_with_the_thread
    loop = asyncio.get_running_loop()
    inbox = RingInbox(spin_seconds(settings))

    def on_lost_device() -> None:
        loop.call_soon_threadsafe(control.hang_up)

    try:
        engine = build_engine(settings, settings.index_spec(), on_lost_device, inbox)
    except (StartError, SpecError) as error:
        control.tell({"refused": str(error)})
        return
    control.tell({"gpu": gpu_uuid(engine.info().device)})
    hosts = [_host(engine, inbox, words["listening"])]
    credentials = Credentials.restore(words["credentials"])
    hosts += [_host(engine, inbox, file, credentials) for file in words["public"]]
    opening = asyncio.create_task(_open(control, engine, hosts))
    # By itself it ends by a fault alone; then nobody is let in any more, and another core is started.
    opening.add_done_callback(lambda _: control.hang_up())
    async for told in heard:
        match told:
            case {"ask": _}:
                control.tell(await reply_to(engine, told))
            case {"credentials": dict(files)}:
                for host in hosts[1:]:
                    host.take_up(Credentials.restore(files))
            case {"drain": True}:
                engine.drain()
            case {"expect_no_more": True}:
                engine.expect_no_more()
            case {"stop": grace}:
                await answer_all(engine, grace)
                break
    if opening.done() and (fault := opening.exception()):
        log_fault(logger, "no frontend is let in any more", fault)
        os._exit(1)
    if engine.device_is_lost:
        engine.stop()  # while the links are there: it answers what it has
        # Another thread may be in a call of its driver that does not end, and the interpreter would wait for it.
        os._exit(1)
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    engine.stop()


def _host(engine: Engine, inbox: RingInbox, file: int, credentials: Credentials | None = None) -> RingHost:
    accepting = socket.socket(fileno=file)
    accepting.setblocking(False)
    return RingHost(engine, inbox, accepting, credentials)


async def _open(control: ControlChannel, engine: Engine, hosts: list[RingHost]) -> None:
    """Lets frontends and clients in once every kernel is compiled."""
    try:
        await warm_up(engine, lambda done, total: control.tell({"compiling": [done, total]}), asyncio.Event())
    except StartError as error:
        control.tell({"refused": str(error)})
        return
    engine.start()
    control.tell({"open": True})
    async with asyncio.TaskGroup() as tasks:
        for host in hosts:
            tasks.create_task(host.run())


if __name__ == "__main__":
    run_child(run)
