"""The Python type of the C client, on real engines: answers, refusals, waits that end, and who may use it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.ring_messages import Request, TokenAnswer, TokenRequest
from blockdex import _native
from blockdex.contract.errors import BlockdexError, error_of
from blockdex.contract.messages import SequenceState
from blockdex.ring import codec
from blockdex.ring.handshake import Handles
from blockdex.ring.layout import ANSWER, ANSWER_STRUCT, AT, AnswerSlot
from blockdex.ring.segment import Sizes
from support.asking import wire_of
from support.client_requests import TENANT, client_requests, naive_answers
from support.naive_engine import check_same
from support.ring import Bell, Producer
from support.ring_engine import Hosted, hosted
from support.ring_process import ring_process
from support.running_engine import LIMITS, SPEC, get, open_sequence, tokens
from support.strange_server import strange_server

SECONDS = 10.0
UNAVAILABLE, OVERLOADED = 14, 8


def connect(address: str, **options: Any) -> _native.RingConnection:
    """A connection to the abstract socket of that name."""
    bounds = (SPEC.num_index_heads, LIMITS.max_spans, LIMITS.max_message_bytes)
    return _native.RingConnection(address.replace("\0", "@"), TENANT, SECONDS, *bounds, **options)


@contextlib.asynccontextmanager
async def connected(run: Hosted, **options: Any) -> AsyncIterator[_native.RingConnection]:
    """A connection to an engine; others run meanwhile."""
    connection = await asyncio.to_thread(connect, run.address, **options)
    try:
        yield connection
    finally:
        connection.close()


def submit(connection: _native.RingConnection, request: Request) -> int:
    """Sends a request; its ticket."""
    if isinstance(request, TokenRequest):
        ticket = connection.submit(*wire_of(request), SECONDS)
    else:
        fields = codec.sequence_fields(request)
        numbers = (fields.sequence_id, fields.child_id, fields.number, fields.num_spans)
        ticket = connection.submit_sequences(fields.kind, request.epoch, *numbers, fields.columns, SECONDS)
    assert isinstance(ticket, int), ticket
    return ticket


def read(answer: Any, request: Request) -> TokenAnswer | SequenceState | BlockdexError:
    """The plain message of an answer."""
    assert answer is not None, f"no answer to {request}"
    if answer[0]:
        code, reason, text = answer
        message, *numbers = text.split("\n")
        return error_of(code, message, reason, dict(number.split("=") for number in numbers))
    _, epoch, shape, first, second = answer
    if isinstance(request, TokenRequest):
        ids, scores = (
            None if data is None else np.frombuffer(data, kind).reshape(shape)
            for data, kind in ((first, "<i4"), (second, "<f4"))
        )
        return TokenAnswer(epoch, ids, scores)
    if first is None:
        return SequenceState(epoch)
    return SequenceState(epoch, np.frombuffer(first, "<i8"), np.frombuffer(second, "<u8"))


def ask(connection: _native.RingConnection, request: Request) -> TokenAnswer | SequenceState | BlockdexError:
    """Sends a request and waits for its answer."""
    return read(connection.wait(submit(connection, request), SECONDS), request)


@pytest.mark.parametrize("spin_seconds", [0.0, 0.001])
async def test_it_is_answered_as_one_after_another_would_be(spin_seconds: float) -> None:
    async with hosted() as run, connected(run, spin_seconds=spin_seconds) as connection:
        asked = client_requests(np.random.default_rng(1))
        for request, expected in zip(asked, naive_answers(asked, connection.epoch), strict=True):
            check_same(await asyncio.to_thread(ask, connection, request), expected, str(request))


async def test_many_in_flight_are_answered_whatever_is_waited_for_first() -> None:
    async with hosted() as run, connected(run) as connection:
        asked = client_requests(np.random.default_rng(2))
        tickets = [submit(connection, request) for request in asked]
        expected = naive_answers(asked, connection.epoch)
        for at in np.random.default_rng(3).permutation(len(asked)):
            answer = await asyncio.to_thread(connection.wait, tickets[at], SECONDS)
            check_same(read(answer, asked[at]), expected[at], str(asked[at]))


async def test_its_file_tells_a_loop_of_answers() -> None:
    async with hosted() as run, connected(run) as connection:
        asked = client_requests(np.random.default_rng(4))
        readable = asyncio.Event()
        asyncio.get_running_loop().add_reader(connection.fileno(), readable.set)
        assert connection.poll() == []
        for request, expected in zip(asked, naive_answers(asked, connection.epoch), strict=True):
            ticket = submit(connection, request)
            answers: list[tuple[int, Any]] = []
            while not answers:
                await asyncio.wait_for(readable.wait(), SECONDS)
                readable.clear()
                answers = connection.poll()
            assert [each for each, _ in answers] == [ticket]
            check_same(read(answers[0][1], request), expected, str(request))
        asyncio.get_running_loop().remove_reader(connection.fileno())


async def test_clients_are_refused_once_the_server_ends_and_frontends_are_not() -> None:
    async with hosted() as run, connected(run) as connection:
        assert isinstance(await asyncio.to_thread(ask, connection, open_sequence(1, tenant=TENANT)), SequenceState)
        run.engine.expect_no_more()
        await asyncio.wrap_future(run.engine.unanswered())  # the engine's thread has heard of it
        refused = await asyncio.to_thread(ask, connection, get(1, tenant=TENANT))
        assert isinstance(refused, BlockdexError)
        assert (refused.code, refused.reason) == (UNAVAILABLE, "SHUTTING_DOWN")
        await run.ask(open_sequence(2))


async def test_calls_of_clients_are_counted_and_timed_and_those_of_frontends_are_not() -> None:
    async with hosted() as run, connected(run) as connection:
        await run.ask(open_sequence(2))
        queries = np.zeros((1, 4, SPEC.head_dim), np.float32)
        for request in (
            open_sequence(1, tenant=TENANT),
            tokens(0, [(1, 0, 1)], keys=queries[:, 0], tenant=TENANT),
            tokens(0, [(1, 0, 1)], queries=queries, tenant=TENANT),
            tokens(0, [(1, 1, 1)], keys=queries[:, 0], queries=queries, tenant=TENANT),
            tokens(0, [(9, 0, 1)], queries=queries, tenant=TENANT),
            tokens(0, [(9, 0, 1)], queries=queries, tenant=TENANT),
            get(1, tenant=TENANT),
        ):
            await asyncio.to_thread(ask, connection, request)
        links = run.engine.stats().links
    assert sorted(links.outcomes) == [
        ("Ring/AppendAndSelect", "OK", "", 1),
        ("Ring/AppendKeys", "OK", "", 1),
        ("Ring/GetSequence", "OK", "", 1),
        ("Ring/OpenSequences", "OK", "", 1),
        ("Ring/SelectBlocks", "NOT_FOUND", "UNKNOWN_SEQUENCE", 2),
        ("Ring/SelectBlocks", "OK", "", 1),
    ]
    counts = {rpc: seconds.count for rpc, seconds in links.seconds.items() if seconds.count}
    assert counts == {f"Ring/{rpc}": 1 for rpc in ("AppendAndSelect", "AppendKeys", "GetSequence", "OpenSequences")} | {
        "Ring/SelectBlocks": 3
    }
    assert all(0 < seconds.total < 60 for seconds in links.seconds.values() if seconds.count)


async def test_a_wait_ends_in_time_and_what_is_given_up_is_not_answered() -> None:
    """The selection waits for keys that do not come."""
    async with hosted() as run, connected(run) as connection:
        await asyncio.to_thread(ask, connection, open_sequence(1, tenant=TENANT))
        queries = np.zeros((1, 4, SPEC.head_dim), np.float32)
        ticket = submit(connection, tokens(0, [(1, 0, 1)], queries=queries, wait=True, tenant=TENANT))
        began = time.monotonic()
        assert await asyncio.to_thread(connection.wait, ticket, 0.25) is None
        assert 0.25 <= time.monotonic() - began < 1.0
        connection.give_up(ticket)
        refused = connection.wait(ticket, SECONDS)
        assert refused is not None and refused[2] == f"ticket: {ticket} is not in flight"
        assert isinstance(await asyncio.to_thread(ask, connection, get(1, tenant=TENANT)), SequenceState)
        assert connection.poll() == []


async def test_who_is_gone_is_noticed_at_once() -> None:
    async with hosted() as run, connected(run) as connection:
        await asyncio.to_thread(ask, connection, open_sequence(1, tenant=TENANT))
        queries = np.zeros((1, 4, SPEC.head_dim), np.float32)
        ticket = submit(connection, tokens(0, [(1, 0, 1)], queries=queries, wait=True, tenant=TENANT))
        waiting = asyncio.create_task(asyncio.to_thread(connection.wait, ticket, 60.0))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        run.hosting.cancel()
        gone = (UNAVAILABLE, "UNREACHABLE", "server: it is gone")
        assert await asyncio.wait_for(waiting, 5.0) == gone
        assert connection.over == gone
        assert connection.submit_sequences(2, 0, 1, 0, 0, 0, b"", 1.0) == gone
        assert connection.poll() == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_ends_or_stands_still_keeps_nobody_waiting(how: signal.Signals) -> None:
    """In the midst of a call; one that stands still takes its time, and no more than its caller gave it."""
    with ring_process() as (process, address), contextlib.closing(connect(address, room_seconds=0.2)) as connection:
        assert isinstance(ask(connection, open_sequence(1, tenant=TENANT)), SequenceState)
        queries = np.zeros((1, 4, SPEC.head_dim), np.float32)
        ticket = submit(connection, tokens(0, [(1, 0, 1)], queries=queries, wait=True, tenant=TENANT))
        threading.Timer(0.2, process.send_signal, (how,)).start()
        began = time.monotonic()
        answer = connection.wait(ticket, 0.6 if how == signal.SIGSTOP else 60.0)
        assert 0.2 <= time.monotonic() - began < 5.0
        if how == signal.SIGKILL:
            assert answer == connection.over == (UNAVAILABLE, "UNREACHABLE", "server: it is gone")
            return
        assert answer is None
        while isinstance(sent := connection.submit_sequences(2, 0, 1, 0, 0, 0, b"", 60.0), int):
            last = sent
        assert sent[:2] == (OVERLOADED, "OVERLOADED")
        process.send_signal(signal.SIGCONT)
        assert connection.wait(last, SECONDS) is not None
        assert isinstance(ask(connection, get(1, tenant=TENANT)), SequenceState)


async def test_another_thread_ends_a_wait_and_may_do_nothing_else() -> None:
    async with hosted() as run, connected(run) as connection:
        await asyncio.to_thread(ask, connection, open_sequence(1, tenant=TENANT))
        queries = np.zeros((1, 4, SPEC.head_dim), np.float32)
        ticket = submit(connection, tokens(0, [(1, 0, 1)], queries=queries, wait=True, tenant=TENANT))
        waiting = asyncio.create_task(asyncio.to_thread(connection.wait, ticket, 60.0))
        await asyncio.sleep(0.05)
        calls: list[Callable[[], object]] = [
            connection.poll,
            connection.close,
            connection.take_events,
            lambda: connection.wait(ticket, 0.0),
            lambda: connection.give_up(ticket),
            lambda: submit(connection, get(1)),
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match="another thread uses it"):
                call()
        connection.hang_up()
        assert await asyncio.wait_for(waiting, 5.0) == (UNAVAILABLE, "UNREACHABLE", "server: it is gone")


async def test_a_signal_ends_a_wait() -> None:
    """Of the main thread, where this runs."""
    async with hosted() as run, connected(run) as connection:
        await asyncio.to_thread(ask, connection, open_sequence(1, tenant=TENANT))
        queries = np.zeros((1, 4, SPEC.head_dim), np.float32)
        ticket = submit(connection, tokens(0, [(1, 0, 1)], queries=queries, wait=True, tenant=TENANT))
        before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        began = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                connection.wait(ticket, 10.0)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert time.monotonic() - began < 8
        connection.give_up(ticket)


async def test_a_child_is_refused_and_harms_nothing() -> None:
    async with hosted() as run, connected(run) as connection:
        child = os.fork()
        if not child:
            with contextlib.suppress(RuntimeError):
                connection.poll()
                os._exit(1)
            with contextlib.suppress(RuntimeError):
                connection.close()
                os._exit(2)
            connection.hang_up()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert isinstance(await asyncio.to_thread(ask, connection, open_sequence(1, tenant=TENANT)), SequenceState)


async def test_evictions_are_told() -> None:
    async with hosted(num_pages=2) as run, connected(run) as connection:
        await asyncio.to_thread(ask, connection, open_sequence(1, tenant=TENANT, lease=1))
        keys = np.zeros((2 * SPEC.block_size, SPEC.head_dim), np.float32)
        await asyncio.to_thread(ask, connection, tokens(0, [(1, 0, len(keys))], keys=keys, tenant=TENANT))
        await asyncio.sleep(1.1)
        await asyncio.to_thread(ask, connection, open_sequence(2, tenant=TENANT))
        answer = await asyncio.to_thread(ask, connection, tokens(0, [(2, 0, 1)], keys=keys[:1], tenant=TENANT))
        assert isinstance(answer, TokenAnswer)
        told: list[bytes] = []
        deadline = time.monotonic() + SECONDS
        while not told and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            connection.poll()
            told += connection.take_events()
        assert told == [b'{"evicted":[1],"tenant":"' + TENANT.encode() + b'"}']


async def test_a_request_without_room_is_refused_in_time() -> None:
    """The engine is held up, and room for two requests is all there is."""
    async with hosted() as run, connected(run, room_seconds=0.2) as connection:
        await asyncio.to_thread(ask, connection, open_sequence(1, tenant=TENANT))
        length = LIMITS.max_message_bytes // (2 * SPEC.head_dim) - 8
        keys = np.zeros((1, SPEC.head_dim), np.float32)
        large = tokens(0, [(1, 0, length)], keys=np.zeros((length, SPEC.head_dim), np.float32), tenant=TENANT)
        with run.backend.held("append") as entered:
            submit(connection, tokens(0, [(1, 0, 1)], keys=keys, tenant=TENANT))
            assert await asyncio.to_thread(entered.wait, SECONDS)
            came_to = [connection.submit(*wire_of(large), SECONDS) for _ in range(4)]
        refused = [each for each in came_to if isinstance(each, tuple)]
        assert refused and all(each[:2] == (OVERLOADED, "OVERLOADED") for each in refused), came_to
        assert refused[0][2].startswith("queue: waited 0.2 s for ")


def test_who_is_not_there_or_no_server_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"link: cannot connect to .*/none \(No such file or directory\)"):
        connect(str(tmp_path / "none"))
    with pytest.raises(ConnectionError, match="its name is too long"):
        connect("x" * 200)


async def test_nothing_is_left_of_it() -> None:
    """Files, memory that is mapped, and references to what it was given or gave."""

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:blockdex-ring")

    async with hosted() as run:
        gc.collect()
        await asyncio.sleep(0.1)
        message = wire_of(tokens(0, [(9, 0, 1)], keys=np.zeros((1, SPEC.head_dim), np.float32)))[1]
        before = files(), mapped(), sys.getrefcount(message)

        def use() -> None:
            for _ in range(3):
                connection = connect(run.address)
                for _ in range(100):
                    ticket = connection.submit(0, message, SECONDS)
                    assert isinstance(ticket, int)
                    answer = connection.wait(ticket, SECONDS)
                    assert answer is not None and sys.getrefcount(answer) == 2
                    assert all(sys.getrefcount(part) <= 3 for part in answer if isinstance(part, bytearray | str))
                connection.poll()

        await asyncio.to_thread(use)
        gc.collect()
        deadline = time.monotonic() + SECONDS
        while (files(), mapped(), sys.getrefcount(message)) != before and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert (files(), mapped(), sys.getrefcount(message)) == before


class StrangeServer:
    """A server that takes requests without reading them, and writes whatever answers it is told to."""

    def __init__(self, handles: Handles) -> None:
        self._segment = handles.segment
        self._producer = Producer(self._segment, "answer", Bell(self._segment, "client_sleeps", handles.client_bell))

    def answer(self, slot: AnswerSlot) -> None:
        """Takes all requests, and writes one more answer."""
        counters = self._segment.counters
        counters[AT["requests_read"] // 8] = counters[AT["requests_written"] // 8]
        at = self._producer.claim()
        self._segment.memory[at : at + ANSWER_STRUCT.size] = ANSWER_STRUCT.pack(*slot)
        self._producer.publish()

    @property
    def freed(self) -> int:
        """Position up to which the answers' arena is free again."""
        return self._segment.counters[AT["answer_bytes_freed"] // 8]

    def count(self, answers: int) -> None:
        """Says that so many have been written."""
        self._segment.counters[AT["answers_written"] // 8] = answers


@contextlib.contextmanager
def strange() -> Iterator[tuple[_native.RingConnection, StrangeServer]]:
    """A connection to such a server."""
    with strange_server(Sizes(8, 4096, 4096)) as (address, handles), contextlib.closing(connect(address)) as connection:
        yield connection, StrangeServer(handles)


LARGE = 2**64 - 64
STATE, IDS, SCORES = 12, 1, 3
NOT_IN_FLIGHT = "answer: its ticket is not in flight"
NOT_IN_ARENA = "answer: its payload is not in the arena"
NOT_IN_PAYLOAD = "answer: what it has is not in its payload"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ticket": 0}, NOT_IN_FLIGHT),
        ({"ticket": 2**64 - 1}, NOT_IN_FLIGHT),
        ({"payload_bytes": 4097}, NOT_IN_ARENA),
        ({"payload_offset": 4096, "payload_bytes": 64}, NOT_IN_ARENA),
        ({"payload_offset": LARGE, "payload_bytes": 64}, NOT_IN_ARENA),
        ({"payload_offset": 4, "payload_bytes": 64}, NOT_IN_ARENA),
        ({"flags": IDS, "num_tokens": 17, "num_heads": 1, "topk": 1, "payload_bytes": 64}, NOT_IN_PAYLOAD),
        ({"flags": IDS, "num_tokens": 2**31, "num_heads": 2**31, "topk": 1, "payload_bytes": 64}, NOT_IN_PAYLOAD),
        ({"flags": SCORES, "num_tokens": 16, "num_heads": 1, "topk": 1, "payload_bytes": 64}, NOT_IN_PAYLOAD),
        ({"flags": SCORES, "num_tokens": 15, "num_heads": 1, "topk": 1, "payload_bytes": 123}, NOT_IN_PAYLOAD),
        ({"flags": STATE, "num_layers": 2**32 - 1, "payload_bytes": 4096}, NOT_IN_PAYLOAD),
        ({"flags": STATE, "num_layers": 4, "payload_bytes": 95}, NOT_IN_PAYLOAD),
    ],
)
def test_what_cannot_be_is_not_followed(changes: dict[str, int], words: str) -> None:
    with strange() as (connection, server):
        ticket = submit(connection, get(1))
        server.answer(AnswerSlot(ticket=ticket)._replace(**changes))
        assert connection.wait(ticket, SECONDS) == (13, "INTERNAL", words)


def test_an_answer_to_a_request_that_was_answered_ends_the_link() -> None:
    with strange() as (connection, server):
        tickets = [submit(connection, get(1)) for _ in range(2)]
        for _ in range(2):
            server.answer(AnswerSlot(ticket=tickets[0]))
        assert connection.wait(tickets[1], SECONDS) == (13, "INTERNAL", NOT_IN_FLIGHT)


@pytest.mark.parametrize("count", [9, 2**63, 2**64 - 1])
def test_more_answers_than_slots_end_the_link(count: int) -> None:
    with strange() as (connection, server):
        ticket = submit(connection, get(1))
        server.count(count)
        assert connection.wait(ticket, SECONDS) == (13, "INTERNAL", "ring: more answers than slots")


def test_a_reason_longer_than_its_payload_is_cut() -> None:
    with strange() as (connection, server):
        ticket = submit(connection, get(1))
        server.answer(AnswerSlot(ticket=ticket, code=5, reason_bytes=65535, payload_bytes=3))
        assert connection.wait(ticket, SECONDS) == (5, "", "")


def test_room_is_given_back_in_the_order_of_the_answers() -> None:
    """In whatever order they are waited for; one without a payload has none."""
    with strange() as (connection, server):
        tickets = [submit(connection, get(1)) for _ in range(4)]
        for at, ticket in enumerate(tickets):
            has = at != 2
            server.answer(AnswerSlot(ticket=ticket, payload_bytes=64 * has, payload_end=64 * (at + 1) * has))
        freed = []
        for at in (1, 2, 0, 3):
            assert connection.wait(tickets[at], SECONDS) is not None
            freed.append(server.freed)
        assert freed == [0, 0, 128, 256]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_answered_every_wait_ends(seed: int) -> None:
    """Slots that are right but for one field, which is anything."""
    random = np.random.default_rng(seed)
    for _ in range(20):
        with strange() as (connection, server):
            for _ in range(50):
                ticket = submit(connection, get(1))
                slot = AnswerSlot(
                    ticket=ticket, flags=int(random.integers(16)), payload_bytes=64 * int(random.integers(9))
                )
                field = ANSWER[random.integers(len(ANSWER) - 4)]
                edges = [0, 1, 63, 64, 4096, 2**16 - 1, 2**32 - 1, 2**63, 2**64 - 1]
                value = int(random.choice(np.array(edges, np.uint64))) % 2 ** (8 * field.size)
                server.answer(slot._replace(**{field.name: value}))
                answer = connection.wait(ticket, SECONDS)
                assert answer is not None
                if connection.over:
                    break


def test_a_wait_that_is_woken_for_nothing_ends_in_time() -> None:
    ended = threading.Event()
    with strange_server(Sizes(8, 4096, 4096)) as (address, handles), contextlib.closing(connect(address)) as connection:
        bell = socket.socket(fileno=os.dup(handles.client_bell))

        def ring() -> None:
            while not ended.wait(0.01):
                with contextlib.suppress(BlockingIOError):
                    bell.send(b"\0")

        ringing = threading.Thread(target=ring)
        ringing.start()
        began = time.monotonic()
        assert connection.wait(submit(connection, get(1)), 0.3) is None
        took = time.monotonic() - began
        ended.set()
        ringing.join()
        bell.close()
    assert 0.3 <= took < 2.0


async def test_questions_are_answered_beside_requests() -> None:
    async with hosted() as run, connected(run) as connection:
        answer = await asyncio.to_thread(connection.ask, '{"ask":"info"}', (), SECONDS)
        assert isinstance(answer, bytes) and f'"epoch":{connection.epoch}' in answer.decode()
        refused = await asyncio.to_thread(connection.ask, '{"share":"memfd"}', (), SECONDS)
        assert refused == (3, "INVALID_REGION", "memfd: 1 files must come with it, got 0")
        with pytest.raises(ValueError, match="files: at most 4, got 5"):
            connection.ask("{}", (0, 0, 0, 0, 0), SECONDS)


def test_a_reply_that_comes_late_is_not_taken_for_another() -> None:
    """Nor what is told in between, or comes in pieces."""
    asked_again = threading.Event()

    def reply(accepted: socket.socket) -> None:
        assert asked_again.wait(SECONDS)
        said = [b'{"answer":1}', b'{"new_epoch":5}', b'{"answer":"two"}']
        for byte in b"".join(len(each).to_bytes(4, "little") + each for each in said):
            accepted.send(bytes([byte]))
            time.sleep(0.001)

    with (
        strange_server(Sizes(8, 4096, 4096), reply) as (address, _),
        contextlib.closing(connect(address)) as connection,
    ):
        assert connection.ask("{}", (), 0.1) == (4, "DEADLINE_EXCEEDED", "timeout: no answer within 0.1 s")
        asked_again.set()
        assert connection.ask("{}", (), SECONDS) == b'{"answer":"two"}'
        assert connection.take_events() == [b'{"new_epoch":5}']


def test_what_is_said_at_too_great_a_length_ends_the_link() -> None:
    def reply(accepted: socket.socket) -> None:
        accepted.send((1 << 20).to_bytes(4, "little"))

    with (
        strange_server(Sizes(8, 4096, 4096), reply) as (address, _),
        contextlib.closing(connect(address)) as connection,
    ):
        assert connection.ask("{}", (), SECONDS) == (13, "INTERNAL", "server: what it says is too long")
        assert connection.over
