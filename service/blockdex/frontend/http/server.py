"""The HTTP server: uvicorn on the loop, the socket and the signals of the process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from h11 import LocalProtocolError
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from blockdex.logs import LimitedLines

MOST_CONNECTIONS = 256
"""At a time: each holds a file. Who comes when so many are there is hung up on."""

REQUEST_SECONDS = 10.0
"""Longest that a client takes to say what it asks, from its connection or last answer on; and to take the answer."""

_STOP_SECONDS = 5
_DATE_SECONDS = 1
_LINES_PER_SECOND = 10


class _Connection(H11Protocol):
    """One connection, which ends where its client takes too long, or says what is no HTTP."""

    _patience: asyncio.TimerHandle | None = None
    _is_answering = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in the base
        """As `asyncio.Protocol.connection_made`."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._wait_again()

    def connection_lost(self, exc: Exception | None) -> None:
        """As `asyncio.Protocol.connection_lost`."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        self._is_answering = False
        self._wait_again()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Says that a request is none; of one that is being answered already the answer is given up."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return
        try:
            super().send_400_response(msg)
        except LocalProtocolError:
            # The one before takes no such answer: to HEAD none has a body.
            self.transport.close()

    def _wait_again(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(REQUEST_SECONDS, self._is_late)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def _is_late(self) -> None:
        is_said = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        if self._is_answering or not is_said:
            self.transport.abort()
            return
        # All is said; now for the answer.
        self._is_answering = True
        self._wait_again()


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
            http=_Connection,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        config.load()
        config.ssl = tls
        self._server = _Uvicorn(config)
        lines = logging.getLogger("uvicorn.error")
        if not any(isinstance(each, LimitedLines) for each in lines.filters):
            lines.addFilter(LimitedLines(_LINES_PER_SECOND))
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
