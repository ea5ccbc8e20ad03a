"""A server of several processes: an engine core, frontends, and this one, which keeps them and answers HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from blockdex.contract.credentials import Credentials
from blockdex.frontend.http.readiness import Readiness
from blockdex.logs import log_event, set_level
from blockdex.ring.engine_reports import RemoteReports
from blockdex.ring.handshake import listen
from blockdex.server.addresses import Address
from blockdex.server.bootstrap import StartError
from blockdex.server.child_process import END_SECONDS, Child
from blockdex.server.config import ServeSettings
from blockdex.server.public_socket import public_socket
from blockdex.server.request_counts import FleetCounts
from blockdex.server.restarts import Kept

logger = logging.getLogger(__name__)

CORE, FRONTEND = "blockdex.server.engine_process", "blockdex.server.frontend_process"
"""Modules that are the children's programs."""


class Supervisor:
    """Starts the processes, starts them again when they end, and ends them; used on one asyncio loop.

    Args:
        settings: of the server.
        readiness: told whether requests are taken.
        credentials: what the frontends show callers and know them by.

    Attributes:
        reports: of the engine core.
        counts: requests that the frontends answered.
        restarts: how often processes were started again, by what they are.
        grpc_address: where the frontends listen, once they do.
        gpu: the driver's name of the GPU that the core runs on, if it is one.
        failure: why the server has ended by itself; empty where it has not.
    """

    def __init__(self, settings: ServeSettings, readiness: Readiness, credentials: Credentials) -> None:
        self._settings = settings
        self._credentials = credentials
        self._readiness = readiness
        self._core_listens = listen()
        self._public = ExitStack()
        self._public_files: list[int] = []
        self._reserved: socket.socket | None = None
        self.restarts = dict.fromkeys(("core", "frontend"), 0)
        self._core = Kept("core", self._start_core, self._has_ended, self.restarts, gives_up=True)
        self._frontends = [
            Kept("frontend", self._start_frontend, self._has_ended, self.restarts) for _ in range(settings.frontends)
        ]
        self._serving: set[Child] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._keepers: list[asyncio.Task[None]] = []
        self._refusal = ""
        self._stopping = False
        self._open = asyncio.Event()
        self.reports = RemoteReports(lambda: None if self._core.child is None else self._core.child.control)
        self.counts = FleetCounts(self._running_frontends)
        self.grpc_address = settings.grpc_address
        self.gpu: str | None = None
        self.failure = ""

    async def start(self, told_to_stop: asyncio.Event) -> bool:
        """Starts the engine core; returns once it can be asked what it is, before its kernels are compiled.

        Returns:
            Whether it can be; not where the server is to stop.

        Raises:
            StartError: it cannot be started, or the port cannot be had.
        """
        public = self._public.enter_context(public_socket(self._settings))
        self._public_files = [each.fileno() for each in public]
        if len(self._frontends) > 1:
            try:
                self._reserved, address = Address.parse(self.grpc_address).reserve()
            except OSError as error:
                raise StartError(str(error.strerror)) from error
            self.grpc_address = str(address)
        return await _unless(told_to_stop, self._core.start())

    async def open(self, told_to_stop: asyncio.Event) -> bool:
        """Starts the frontends once the engine core lets them in; returns once they serve, or the server is to stop.

        Returns:
            Whether they serve.

        Raises:
            StartError: a kernel cannot be compiled, or a frontend cannot start.
        """
        if not await _unless(told_to_stop, self._be_let_in()):
            return False
        self._keepers.append(asyncio.create_task(self._keep_core(told_to_stop)))
        for frontend in self._frontends:
            if not await _unless(told_to_stop, frontend.start()):
                return False
            self._keepers.append(asyncio.create_task(frontend.keep()))
        return True

    async def _keep_core(self, told_to_stop: asyncio.Event) -> None:
        try:
            await self._core.keep()
        except StartError as error:
            self.failure = str(error)
            log_event(logger, logging.ERROR, "the server gives up", reason=self.failure)
            told_to_stop.set()

    def pids(self) -> dict[str, str]:
        """Process ids, by what they are of."""
        core = "" if self._core.child is None else str(self._core.child.pid)
        return {
            "core_pid": core,
            "frontend_pids": " ".join(str(frontend.pid) for frontend in self._running_frontends()),
        }

    def processes(self) -> dict[str, int]:
        """Ids of the processes that run, this one's included: `supervisor`, `core`, `frontend-0` and so on."""
        kept = {"core": self._core} | {
            f"frontend-{number}": frontend for number, frontend in enumerate(self._frontends)
        }
        running = {name: each.child.pid for name, each in kept.items() if each.child is not None}
        return {"supervisor": os.getpid()} | running

    def set_log_level(self, level: str) -> None:
        """Has all processes log from that level on, also those that are started later."""
        set_level(level)
        self._settings = self._settings.model_copy(update={"log_level": level})
        for child in (*self._running_frontends(), self._core.child):
            if child is not None:
                child.control.tell({"log_level": level})

    def set_credentials(self, credentials: Credentials) -> None:
        """Has all processes go by these, also those that are started later."""
        self._credentials = credentials
        for child in (*self._running_frontends(), self._core.child):
            if child is not None:
                child.control.tell({"credentials": credentials.words()})

    async def stop(self, drain: float, grace: float) -> None:
        """Ends all processes: for `drain` seconds probes hear of it and requests are still taken; then, for at most
        `grace` seconds, those in flight are answered.
        """
        self._stopping = True
        self._tell_readiness()
        for child in (*self._running_frontends(), self._core.child):
            if child is not None:
                child.control.tell({"drain": True})
        await asyncio.sleep(drain if self._serving else 0.0)
        for keeper in self._keepers:
            keeper.cancel()
        frontends, core, began = list(self._running_frontends()), self._core.child, time.monotonic()
        await asyncio.gather(
            *(frontend.control.ask({"ask": "refuse_new"}) for frontend in frontends), return_exceptions=True
        )
        if core is not None:
            # Only now: until now an append could come that a selection waits for.
            core.control.tell({"expect_no_more": True})
        for frontend in frontends:
            frontend.control.tell({"finish": float(grace)})
        await _end(frontends, grace + END_SECONDS)
        if core is not None:
            # What is left of it is for clients on this host.
            left = max(began + grace - time.monotonic(), 0.0)
            core.control.tell({"stop": left})
            await _end([core], left + END_SECONDS)

    async def close(self) -> None:
        """Ends whatever still runs, at once."""
        tasks = [*self._keepers, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        core = [] if self._core.child is None else [self._core.child]
        await _end([*self._running_frontends(), *core], 0.0)
        self._core_listens.close()
        self._public.close()
        if self._reserved is not None:
            self._reserved.close()

    @property
    def _core_address(self) -> str:
        return str(self._core_listens.getsockname(), "latin-1")

    def _running_frontends(self) -> Iterator[Child]:
        return (frontend.child for frontend in self._frontends if frontend.child is not None)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _be_let_in(self) -> None:
        """Waits until the first engine core lets frontends in."""
        assert self._core.child is not None
        ended = self._core.child.ended
        opened = asyncio.create_task(self._open.wait())
        first: set[asyncio.Future[Any]] = {opened, ended}
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        finally:
            opened.cancel()
        if ended.done():
            raise StartError(self._refusal or f"the engine core ended with {ended.result()} before it was ready")

    async def _start_core(self) -> Child:
        listening, public = self._core_listens.fileno(), self._public_files
        core, said = await Child.start(
            CORE,
            self._settings,
            [listening, *public],
            listening=listening,
            public=public,
            credentials=self._credentials.words(),
        )
        self.gpu = said["gpu"]
        self._in_background(self._hear(core))
        return core

    async def _start_frontend(self) -> Child:
        frontend, said = await Child.start(
            FRONTEND,
            self._settings,
            address=self._core_address,
            grpc_address=self.grpc_address,
            share_port=len(self._frontends) > 1,
            credentials=self._credentials.words(),
        )
        self.grpc_address = said["listening"]
        self._serving.add(frontend)
        self._tell_readiness()
        self._in_background(self._hear(frontend))
        return frontend

    async def _hear(self, child: Child) -> None:
        async for words in child.heard:
            match words:
                case {"serving": True}:
                    self._serving.add(child)
                case {"serving": False}:
                    self._serving.discard(child)
                case {"compiling": [done, total]}:
                    self._readiness.compiling(done, total)
                    continue
                case {"refused": str(reason)}:
                    self._refusal = reason
                    await child.kill()
                case {"open": True}:
                    self._open.set()
            self._tell_readiness()
        # One that hangs is of no use, and keeps another from being started.
        await child.end(END_SECONDS)

    def _has_ended(self, child: Child) -> None:
        self._serving.discard(child)
        self.counts.has_ended(child)
        if child is self._core.child:
            self._open.clear()
        self._tell_readiness()

    def _tell_readiness(self) -> None:
        if self._stopping:
            self._readiness.obstacle = "shutting down"
        elif not self._open.is_set():
            self._readiness.obstacle = "the engine core starts anew"
        elif not self._serving:
            self._readiness.obstacle = "no frontend serves"
        else:
            self._readiness.obstacle = ""


async def _unless(told_to_stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether some work was done; it is given up once the server is to stop."""
    doing, stopping = asyncio.create_task(work), asyncio.create_task(told_to_stop.wait())
    try:
        await asyncio.wait({doing, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        doing.cancel()
        await asyncio.gather(doing, return_exceptions=True)
    if told_to_stop.is_set():
        return False
    doing.result()
    return True


async def _end(children: Iterable[Child], seconds: float) -> None:
    """Waits until processes have ended, and kills those that take longer."""
    ends = {child.ended: child for child in children}
    if ends:
        await asyncio.wait(ends, timeout=seconds)
        await asyncio.gather(*(child.kill() for child in ends.values()))
        await asyncio.wait(ends, timeout=END_SECONDS)
