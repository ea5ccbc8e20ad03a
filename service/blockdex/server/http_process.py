"""The HTTP side of a server, whatever its processes: what it answers with, and the sampling behind it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping

from blockdex.frontend.http.app import create_app
from blockdex.frontend.http.callers import KnownCallers
from blockdex.frontend.http.gpu_metrics import open_gpu
from blockdex.frontend.http.history import History
from blockdex.frontend.http.live_page import LiveView
from blockdex.frontend.http.metrics import Metrics, RequestCounts, ServerCollector
from blockdex.frontend.http.process_metrics import Processes
from blockdex.frontend.http.readiness import Readiness
from blockdex.frontend.http.server import HttpServer
from blockdex.ring.engine_reports import Reports
from blockdex.server.credential_files import CredentialFiles


class HttpSide:
    """HTTP, from its start to `stop`; used on one asyncio loop.

    Attributes:
        gpu_in_turns: other processes that took the engine's GPU in turns with it at the start; None without one.
    """

    def __init__(self, server: HttpServer, sampling: asyncio.Task[None], gpu_in_turns: int | None) -> None:
        self.gpu_in_turns = gpu_in_turns
        self._server = server
        self._sampling = sampling

    @classmethod
    async def start(
        cls,
        reports: Reports,
        requests: RequestCounts,
        readiness: Readiness,
        restarts: Mapping[str, int],
        processes: Processes,
        gpu: str | None,
        listening: socket.socket,
        files: CredentialFiles,
    ) -> HttpSide:
        """Serves on a socket that listens already.

        Args:
            reports: of the engine.
            requests: what was answered.
            readiness: whether the server takes requests.
            restarts: how often each kind of process was started again.
            processes: those of the server.
            gpu: the driver's name of the engine's GPU, if it has one.
            listening: where.
            files: how callers and the server know each other.
        """
        history = History(reports, requests)
        await history.take()
        collector = ServerCollector(reports, requests, readiness, restarts)
        readings = None if gpu is None else open_gpu(gpu)
        if readings is not None:
            await readings.refresh()
        metrics = Metrics(collector, processes, readings)
        app = create_app(reports, metrics, LiveView(reports, history, readiness), readiness, readings)
        guarded = KnownCallers(app, lambda: files.credentials.access)
        server, sampling = HttpServer(guarded, listening, files.http_tls), asyncio.create_task(history.run())
        return cls(server, sampling, None if readings is None else readings.in_turns)

    async def stop(self) -> None:
        """Answers what has been asked and ends; takes seconds at most."""
        self._sampling.cancel()
        await self._server.stop()
