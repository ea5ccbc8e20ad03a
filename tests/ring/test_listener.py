"""The engine's side of links: whoever connects, however they leave, it costs nothing and others are let in."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from blockdex.contract.credentials import Credentials
from blockdex.contract.errors import UnavailableError
from blockdex.ring import control_channel
from blockdex.ring import handshake as handover
from blockdex.ring.events import Event, NewEpoch, SequencesEvicted, event_of
from blockdex.ring.handshake import Handles, Peer, listen, take
from blockdex.ring.layout import GREETING_STRUCT, HELLO_STRUCT, MAGIC, VERSION
from blockdex.ring.listener import RingHost
from blockdex.ring.regions import Offer, Region
from blockdex.ring.segment import RingError, Segment, Sizes
from blockdex.scheduler.loop import Engine
from support.ring_engine import Hosted, hosted
from support.running_engine import TIMEOUT, open_sequence

TIMES = 50
PAGES = 100_000


async def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.01)


def files() -> int:
    """Files that this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def no_file_left() -> Iterator[None]:
    """This process cannot open one more."""
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.asynccontextmanager
async def linked(run: Hosted, tenant: str = "") -> AsyncIterator[tuple[socket.socket, Handles]]:
    """One more link."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
        connected.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connected, run.address)
        handles = await asyncio.wait_for(take(connected, tenant), TIMEOUT)
        try:
            yield connected, handles
        finally:
            handles.close()


@contextlib.asynccontextmanager
async def public(run: Hosted, credentials: Credentials) -> AsyncIterator[tuple[RingHost, str]]:
    """One more socket of the engine, for clients that are known by these; and its address."""
    with listen() as listening:
        host = RingHost(run.engine, run.inbox, listening, credentials)
        hosting = asyncio.create_task(host.run())
        try:
            yield host, str(listening.getsockname(), "latin-1")
        finally:
            hosting.cancel()
            await asyncio.gather(hosting, return_exceptions=True)


async def test_who_goes_while_it_connects_leaves_no_file() -> None:
    async with hosted() as run:
        before = files()
        for _ in range(TIMES):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
                connected.connect(run.address)
            await asyncio.sleep(0)
        await eventually(lambda: not run.hosting.done() and files() <= before)
        async with linked(run):
            pass


async def test_another_user_is_told_so_and_nothing_is_made_or_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with hosted() as run:
        monkeypatch.setattr(Segment, "create", lambda sizes, epoch: pytest.fail("a segment was made"))
        monkeypatch.setattr(Peer, "of", lambda connected: Peer(4343, (4343,)))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
            connected.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connected, run.address)
            with pytest.raises(RingError, match="link: the server does not know user 4343 of this host"):
                await asyncio.wait_for(take(connected), TIMEOUT)
        assert "link refused" in caplog.text


def test_who_has_connected_is_who_the_kernel_says() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening, socket.socket(socket.AF_UNIX) as connecting:
        listening.bind(b"")
        listening.listen()
        connecting.connect(listening.getsockname())
        accepted, _ = listening.accept()
        with accepted:
            peer = Peer.of(accepted)
    assert (peer.user, peer.groups[0], set(peer.groups)) == (os.getuid(), os.getgid(), {os.getgid(), *os.getgroups()})


async def test_files_that_run_out_end_no_link_and_let_others_in_later(caplog: pytest.LogCaptureFixture) -> None:
    async with hosted() as run:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting:
            waiting.setblocking(False)
            with no_file_left():
                waiting.connect(run.address)
                await eventually(lambda: "link refused" in caplog.text)
                await run.ask(open_sequence(1))
            handles = await asyncio.wait_for(take(waiting), TIMEOUT)
            handles.close()
        assert not run.hosting.done() and run.there.is_set()


async def test_nothing_is_left_of_links_when_who_lets_them_in_has_ended() -> None:
    async with hosted():
        pass
    gc.collect()
    before = files()
    for _ in range(3):
        async with hosted():
            pass
    gc.collect()
    assert files() == before


@pytest.mark.parametrize("left", range(1, 8))
async def test_a_link_for_which_files_do_not_suffice_leaves_none(left: int) -> None:
    """Of the two segments, their mappings and the four ends of two bells so many can be had."""
    before = files()
    kept = [os.dup(0) for _ in range(left)]
    with no_file_left():
        for fd in kept:
            os.close(fd)
        with pytest.raises(OSError, match="Too many open files"):
            handover.new_link(Sizes(8, 4096, 4096), 1)
    assert files() <= before


async def test_a_greeting_that_is_refused_leaves_no_file() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        before = files()
        for sent, words in ((MAGIC, VERSION + 1), f"{VERSION + 1}, 2"), ((MAGIC, VERSION), f"{VERSION}, 2"):
            socket.send_fds(theirs, [GREETING_STRUCT.pack(*sent, 0)], [0, 1])
            with pytest.raises(RingError, match=f"version {VERSION} and 3 files, got {MAGIC:x}, {words}"):
                await asyncio.wait_for(take(ours), TIMEOUT)
        socket.send_fds(theirs, [GREETING_STRUCT.pack(MAGIC, VERSION, 0)], [0, 1, 2])
        with pytest.raises(RingError, match="segment: 0 bytes cannot be one"):
            await asyncio.wait_for(take(ours), TIMEOUT)
        assert files() <= before


@pytest.mark.parametrize(
    ("said", "words", "heard"),
    [
        ((MAGIC + 1, VERSION, 0), "got 474e5258444b4c43, 3", b""),
        ((MAGIC, VERSION + 1, 0), "got 474e5258444b4c42, 4", GREETING_STRUCT.pack(MAGIC, VERSION, 0)),
        ((MAGIC, VERSION, 257), "a tenant has at most 256 bytes, got 257", b""),
        ((MAGIC, VERSION, 5), "the client went away", b""),
    ],
)
async def test_who_does_not_say_hello_is_refused_before_anything_is_made(
    said: tuple[int, int, int], words: str, heard: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Segment, "create", lambda sizes, epoch: pytest.fail("a segment was made"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.send(HELLO_STRUCT.pack(*said) + b"abc")
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((RingError, ConnectionError), match=words):
            await handover.offer(ours, Sizes(8, 4096, 4096), 1, str)
        theirs.setblocking(False)
        assert (theirs.recv(64) if heard else b"") == heard


async def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_HELLO_SECONDS", 0.05)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with pytest.raises(TimeoutError):
            await handover.offer(ours, Sizes(8, 4096, 4096), 1, str)


@pytest.mark.parametrize("cells", [0, -1])
async def test_a_report_in_no_cells_is_not_made_and_no_fault(cells: int, caplog: pytest.LogCaptureFixture) -> None:
    async with hosted() as run:
        with pytest.raises(UnavailableError, match="its report of overview cannot be read"):
            await run.channel.overview(cells)
    assert "a report failed" not in caplog.text


async def test_a_fault_in_a_report_is_told_to_who_asked_and_ends_no_link(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted() as run:
        monkeypatch.setattr(run.engine, "overview", lambda cells: cells // 0)
        before = run.channel._control
        with pytest.raises(UnavailableError, match="engine: a fault in its report"):
            await run.channel.overview(1)
        assert "a report failed" in caplog.text and "ZeroDivisionError" in caplog.text
        assert (await run.channel.info()).epoch == run.engine.info().epoch
        assert run.channel._control is before


async def test_who_asks_and_does_not_read_is_hung_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control_channel, "_ANSWER_SECONDS", 0.5)
    async with hosted(num_pages=PAGES) as run, linked(run) as (connected, _):
        question = json.dumps({"ask": "overview", "max_cells": PAGES}).encode()
        questions = 200 * (len(question).to_bytes(4, "little") + question)
        await asyncio.get_running_loop().sock_sendall(connected, questions)
        await eventually(lambda: "link broken" in caplog.text)
        await eventually(lambda: len(run.inbox._links) == 1)
        await run.ask(open_sequence(1))
        read = 0
        with contextlib.suppress(ConnectionError):
            while part := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connected, 1 << 20), TIMEOUT):
                read += len(part)
        assert read < 6 * PAGES, "what the socket holds, less than one answer"


async def test_who_does_not_read_events_is_hung_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control_channel, "_ANSWER_SECONDS", 0.5)
    async with hosted() as run, linked(run):
        heard: list[Event] = []
        run.channel.tell_events(heard.append)
        await eventually(lambda: len(run.inbox._links) == 2)
        events = [SequencesEvicted("t", [sequence, *range(1024)]) for sequence in range(500)]
        for event in events:
            for link in run.inbox._links:
                link.tell(event)
        await eventually(lambda: len(run.inbox._links) == 1)
        assert "link broken" in caplog.text
        await eventually(lambda: len(heard) == len(events))
        assert heard == events
        await run.ask(open_sequence(1))


async def test_a_link_with_a_tenant_hears_of_its_own_sequences_alone() -> None:
    async with hosted() as run, linked(run, "mine") as (connected, _):
        await eventually(lambda: len(run.inbox._links) == 2)
        for event in (SequencesEvicted("theirs", [1]), SequencesEvicted("mine", [2]), NewEpoch(7)):
            for link in run.inbox._links:
                link.tell(event)
        control = await control_channel.ControlChannel.on(connected.dup())
        heard = control.heard()
        assert [event_of(await asyncio.wait_for(anext(heard), TIMEOUT)) for _ in range(2)] == [
            SequencesEvicted("mine", [2]),
            NewEpoch(7),
        ]
        control.hang_up()


ACCESS = """
[[users]]
user = 4343
tenant = "theirs"

[[groups]]
group = 7
tenant = "group-s"

[[users]]
user = 4444
rights = ["operator"]
"""


@pytest.mark.parametrize(
    ("peer", "named", "tenant"),
    [
        (Peer(4343, (1,)), "", "theirs"),
        (Peer(4343, (7,)), "theirs", "theirs"),
        (Peer(5, (1, 7)), "", "group-s"),
        (Peer(4444, ()), "anybody-s", "anybody-s"),
        (Peer(os.getuid(), (7,)), "", "default"),
        (Peer(os.getuid(), (7,)), "mine", "mine"),
        (Peer(4343, (1,)), "group-s", "blockdex-tenant: 'group-s' is not the caller's, 'theirs' is"),
        (Peer(4444, ()), "", "the caller's entry in the access file has no tenant"),
        (Peer(5, (1, 8)), "theirs", "the server does not know user 5 of this host"),
    ],
)
async def test_a_link_has_the_tenant_of_who_opens_it(
    monkeypatch: pytest.MonkeyPatch, peer: Peer, named: str, tenant: str
) -> None:
    async with hosted() as run, public(run, Credentials(access_text=ACCESS)) as (_, address):
        monkeypatch.setattr(Peer, "of", lambda connected: peer)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
            connected.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connected, address)
            try:
                handles = await asyncio.wait_for(take(connected, named), TIMEOUT)
            except RingError as refused:
                assert tenant in str(refused)
                return
            handles.close()
            await eventually(lambda: len(run.inbox._links) == 2)
            assert run.inbox._links[-1].handles.tenant == tenant


async def test_who_is_known_no_more_is_hung_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosted() as run, public(run, Credentials(access_text=ACCESS)) as (host, address):
        monkeypatch.setattr(Peer, "of", lambda connected: Peer(4343, (7,)))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
            connected.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connected, address)
            handles = await asyncio.wait_for(take(connected, "theirs"), TIMEOUT)
            await eventually(lambda: len(run.inbox._links) == 2)
            host.take_up(Credentials(access_text=ACCESS + "# the same\n"))
            await asyncio.sleep(0.05)
            assert len(run.inbox._links) == 2
            host.take_up(Credentials(access_text=ACCESS.replace("4343", "4545")))
            await eventually(lambda: len(run.inbox._links) == 1)
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connected, 1), TIMEOUT) == b""
            handles.close()
        await run.ask(open_sequence(1))


BAD_WORDS = [
    b'{"share": {}}',
    b'{"share": "memfd", "bytes": 1e999}',
    b'{"share": "cuda_ipc", "handle": {}, "device": []}',
    b'{"release": []}',
    b'{"release": 1e999}',
    b'{"open_channel": "memfd", "bound_seconds": "x", "epoch": {}}',
    b'{"close_channel": 18446744073709551617}',
    b'{"ask": "overview", "max_cells": -1}',
    b'{"ask": "overview", "max_cells": 340282366920938463463374607431768211456}',
    b'{"ask": {"ask": []}}',
    b'{"\\ud800": "\\udfff", "share": "\\ud800"}',
    b'{"answer": {}}',
    b"[" * 100_000,
    b"{}",
    b"\xff\xff",
    b"",
]


async def test_bad_words_end_in_an_answer_or_the_link_and_leave_nothing(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    async with hosted() as run:
        async with linked(run, "tenant"):
            pass
        await eventually(lambda: len(run.inbox._links) == 1)
        await asyncio.sleep(0.2)
        before = files() + 1  # a pool's thread may open one
        for words in BAD_WORDS:
            async with linked(run, "tenant") as (connected, _):
                extra = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
                said = len(words).to_bytes(control_channel.LENGTH_BYTES, "little") + words
                socket.send_fds(connected, [said], extra)
                for file in extra:
                    os.close(file)
                heard = await asyncio.wait_for(loop.sock_recv(connected, 1 << 16), TIMEOUT)
                assert not heard or isinstance(json.loads(heard[control_channel.LENGTH_BYTES :]), dict)
                with contextlib.suppress(ConnectionError):
                    await loop.sock_sendall(connected, b"\xff\xff\xff\xff")
                    assert await asyncio.wait_for(loop.sock_recv(connected, 1 << 16), TIMEOUT) == b""
            began = time.monotonic()
            await eventually(lambda: files() <= before)
            assert time.monotonic() - began < 1.0, "at once"
        await run.ask(open_sequence(1))
        gc.collect()
    assert "never retrieved" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_fault_of_what_opens_regions_ends_the_link_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(engine: Engine, offer: Offer) -> Region:
        raise RuntimeError("a fault of the driver, made for this test")

    monkeypatch.setattr(Engine, "open_region", fails)
    async with hosted() as run:
        async with linked(run, "tenant") as (connected, _):
            words = b'{"share": "cuda_ipc", "handle": "' + b"00" * 64 + b'"}'
            await asyncio.get_running_loop().sock_sendall(connected, len(words).to_bytes(4, "little") + words)
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connected, 1), TIMEOUT) == b""
        await run.ask(open_sequence(1))
        gc.collect()
    assert "never retrieved" not in caplog.text and "link broken" in caplog.text
