"""A control channel whose other end says what nobody can mean."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import pytest

from blockdex.contract.errors import UnavailableError
from blockdex.ring.control_channel import ControlChannel
from blockdex.ring.engine_reports import RemoteReports
from support.ring_engine import hosted
from support.running_engine import TIMEOUT, get, open_sequence


def said(body: bytes) -> bytes:
    """Words as they go over the socket."""
    return len(body).to_bytes(4, "little") + body


STRANGE = {
    "no JSON": said(b"{"),
    "no UTF-8": said(b'"\xff"'),
    "a list": said(b"[1, 2]"),
    "nested": said(b'{"ask":' + b"[" * 100_000),
    "an answer to nothing": said(b'{"answer": {}}'),
    "a failure of nothing": said(b'{"failed": "so it is"}'),
    "too long": (1 << 31).to_bytes(4, "little"),
    "cut off": said(b'{"ask": "info"}')[:-1],
}


@pytest.fixture
async def ends() -> AsyncIterator[tuple[ControlChannel, socket.socket]]:
    ours, theirs = socket.socketpair()
    control = await ControlChannel.on(ours)
    with theirs:
        yield control, theirs
    control.hang_up()


@pytest.mark.parametrize("what", STRANGE)
async def test_it_ends_and_nothing_else_does(ends: tuple[ControlChannel, socket.socket], what: str) -> None:
    control, theirs = ends
    theirs.sendall(said(b'{"told": 1}') + STRANGE[what])
    theirs.shutdown(socket.SHUT_WR)

    async def hear() -> list[object]:
        return [words async for words in control.heard()]

    assert await asyncio.wait_for(hear(), TIMEOUT) == [{"told": 1}]
    with pytest.raises(UnavailableError, match="engine: it is gone"):
        await control.ask({"ask": "info"})


async def test_an_answer_that_is_no_report_is_refused(ends: tuple[ControlChannel, socket.socket]) -> None:
    control, theirs = ends
    hearing = asyncio.create_task(anext(control.heard(), None))
    asking = asyncio.create_task(RemoteReports(lambda: control).info())
    await asyncio.sleep(0)
    theirs.sendall(said(json.dumps({"answer": {"spec": 1}}).encode()))
    with pytest.raises(UnavailableError, match="engine: its report of info cannot be read"):
        await asyncio.wait_for(asking, TIMEOUT)
    hearing.cancel()
    await asyncio.gather(hearing, return_exceptions=True)


@pytest.mark.parametrize("what", STRANGE)
async def test_an_engine_loses_that_link_alone(what: str) -> None:
    async with hosted() as run:
        await run.ask(open_sequence(1))
        control = run.channel._control
        assert control is not None
        control._writer.write(STRANGE[what])
        if what == "cut off":
            control._writer.write_eof()
        await asyncio.wait_for(_gone(run.there), TIMEOUT)
        await asyncio.wait_for(run.there.wait(), TIMEOUT)
        await run.ask(get(1))


async def _gone(there: asyncio.Event) -> None:
    while there.is_set():
        await asyncio.sleep(0)
