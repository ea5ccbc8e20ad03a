"""The HTTP server: uvicorn on the loop, the socket and the signals of the process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

_STOP_SECONDS = 5
_DATE_SECONDS = 1


class HttpServer:
    """Serves an application on a socket that listens already; made and used on one asyncio loop.

    Args:
        app: the application.
        listening: where.
        tls: what connections are taken with; None where they are plain text.
    """

    def __init__(self, app: ASGIApp, listening: socket.socket, tls: ssl.SSLContext | None) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        config.load()
        config.ssl = tls
        self._server = _Uvicorn(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))

    async def stop(self) -> None:
        """Answers what has been asked and ends; takes seconds at most."""
        self._server.end()
        await self._task


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told = asyncio.Event()

    def end(self) -> None:
        """Has the main loop end."""
        self.should_exit = True
        self._told.set()

    async def main_loop(self) -> None:
        """Sets the date of its answers once a second; uvicorn's own looks ten times a second whether it is to end."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), _DATE_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to the process."""
        yield
