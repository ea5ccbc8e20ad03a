"""A control channel whose other end says what nobody can mean."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator

import pytest

from blockdex.contract.errors import UnavailableError
from blockdex.ring.control_channel import ControlChannel
from blockdex.ring.engine_reports import RemoteReports
from support.asking import eventually
from support.ring_engine import hosted
from support.running_engine import TIMEOUT, get, open_sequence
from support.shared_memory import files


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


def is_open(fd: int) -> bool:
    """Whether this process has the file."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


async def test_files_belong_to_the_words_that_they_came_with(ends: tuple[ControlChannel, socket.socket]) -> None:
    """However these were cut; those that nobody has kept are closed, and so are those that came too many."""
    control, theirs = ends
    words, sent = [said(b'{"told": %d}' % number) for number in range(6)], [0, 1]
    theirs.sendall(words[0])
    socket.send_fds(theirs, [words[1]], sent)
    socket.send_fds(theirs, [words[2][:2]], sent[:1])
    socket.send_fds(theirs, [words[2][2:]], sent[:1])
    theirs.sendall(words[3][:5])
    socket.send_fds(theirs, [words[3][5:] + words[4]], sent)
    socket.send_fds(theirs, [words[5]], sent * 50)
    theirs.shutdown(socket.SHUT_WR)
    heard, kept = list[int](), 0
    async for told in control.heard():
        assert all(map(is_open, control.files))
        heard.append(len(control.files))
        if told == {"told": 1}:
            kept = control.files.pop()
        last = list(control.files)
    assert is_open(kept), "it was taken out"
    os.close(kept)
    assert not any(map(is_open, last))
    # Words 3 and 4 end in one piece: what came with it belongs to the last byte's words.
    assert heard == [0, 2, 2, 0, 2, 4]


async def test_files_that_no_words_follow_are_closed(ends: tuple[ControlChannel, socket.socket]) -> None:
    control, theirs = ends
    before = files()
    socket.send_fds(theirs, [said(b'{"told": 1}') + b"\0"], [0] * 3)
    for _ in range(20):
        socket.send_fds(theirs, [b"\0"], [0] * 3)
    theirs.shutdown(socket.SHUT_WR)
    assert [words async for words in control.heard()] == [{"told": 1}]
    control.hang_up()
    await eventually(lambda: files() < before)


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
