"""Clients of the HTTP side that say no HTTP, take too long, or are too many."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
from fastapi import FastAPI

from blockdex.frontend.http import server as http_server
from blockdex.frontend.http.server import HttpServer

TIMEOUT = 10.0
GOOD = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
LARGE = 64 << 20


@asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """A server with two answers, one of them large, and one that takes its time; its port."""
    app = FastAPI()
    app.head("/slow")(partial(asyncio.sleep, 0.3))
    app.get("/healthz")(lambda: "alive")
    app.get("/large")(lambda: "x" * LARGE)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = HttpServer(app, listening, None)
        yield listening.getsockname()[1]
        await asyncio.wait_for(server.stop(), TIMEOUT)


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, limit=1024)


async def ends(reader: asyncio.StreamReader) -> bytes:
    """What a connection says until it ends, if it does."""
    said = b""
    try:
        while more := await asyncio.wait_for(reader.read(1 << 16), TIMEOUT):
            said += more
    except ConnectionResetError:
        pass
    return said


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "REQUEST_SECONDS", 0.3)


@pytest.mark.parametrize(
    "said",
    [b"", b"GET /", b"GET / HTTP/1.1\r\nx: ", GOOD + b"GET /", b"POST /healthz HTTP/1.1\r\ncontent-length: 9\r\n\r\nx"],
)
@pytest.mark.usefixtures("impatient")
async def test_who_drips_is_hung_up_on(said: bytes) -> None:
    async with serving() as port:
        reader, writer = await connect(port)
        writer.write(said)
        reading = asyncio.create_task(ends(reader))
        while not reading.done():
            writer.write(b"x")
            await asyncio.sleep(0.05)
        assert b"alive" in reading.result() or not said.startswith(GOOD)
        writer.close()


@pytest.mark.usefixtures("impatient")
async def test_who_does_not_read_is_hung_up_on() -> None:
    async with serving() as port:
        reader, writer = await connect(port)
        writer.write(GOOD.replace(b"healthz", b"large"))
        await asyncio.sleep(1.5)
        assert len(await ends(reader)) < LARGE
        writer.close()


@pytest.mark.parametrize("body", [b"x", b"-1\r\n", b"5\r\nab", b"zz\r\n\r\n", b"1\r\nabc"])
async def test_a_bad_body_is_told_and_logs_no_traceback(body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as port:
        for _ in range(20):
            reader, writer = await connect(port)
            writer.write(
                b"POST /healthz HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + body + b"\r\n\r\nzz\r\n"
            )
            assert (await ends(reader)).startswith((b"HTTP/1.1 400", b"HTTP/1.1 405"))
            writer.close()
    assert not [record for record in caplog.records if record.exc_info]
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 20


async def test_nonsense_behind_a_request_for_heads_logs_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """No answer to it has a body, that to the nonsense neither."""
    async with serving() as port:
        for behind in (b"\0" * 20, b"5\r\x0bhello\r\n"):
            reader, writer = await connect(port)
            writer.write(b"HEAD /slow HTTP/1.0\r\n\r\n")
            await asyncio.sleep(0.1)
            writer.write(behind)
            await ends(reader)
            writer.close()
    assert not [record for record in caplog.records if record.exc_info]


async def test_too_many_connections_are_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "MOST_CONNECTIONS", 3)
    async with serving() as port:
        held = [await connect(port) for _ in range(3)]
        reader, writer = await connect(port)
        writer.write(GOOD)
        assert await ends(reader) == b""
        for _, other in [*held, (reader, writer)]:
            other.close()
        await asyncio.sleep(0.1)
        again, writer = await connect(port)
        writer.write(GOOD)
        assert (await asyncio.wait_for(again.read(64), TIMEOUT)).startswith(b"HTTP/1.1 200")
        writer.close()
