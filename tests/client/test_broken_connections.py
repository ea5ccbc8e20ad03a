"""Connections that break, answers that are lost, servers that change: what is repeated, and what is known after."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import blockdex
from blockdex import DeadlineExceededError, FailedPreconditionError, NotFoundError, Reason, UnavailableError
from blockdex.client.failures import changed_nothing, error_of_stream
from support.clients import FLAVOURS, Flavour, connect, new_sequence
from support.serving import Serving
from support.tcp_proxy import TcpProxy

KEYS = np.ones((5, 128), np.float32)
QUERIES = np.ones((5, 4, 128), np.float32)

Counted = Callable[..., int]


@pytest.fixture(params=[name for name, flavour in FLAVOURS.items() if flavour.transport != "ring"])
def flavour(request: pytest.FixtureRequest) -> Flavour:
    """Each client over a network, which breaks; test_rings.py has what becomes of rings."""
    return FLAVOURS[request.param]


@pytest.fixture
def client(flavour: Any, proxy: TcpProxy) -> Iterator[blockdex.Client]:
    with connect(flavour, proxy.address, timeout=10) as client:
        yield client


@pytest.fixture
def sequence(client: blockdex.Client, other: blockdex.Client) -> Iterator[int]:
    sequence = new_sequence()
    client.open_sequence(sequence)
    yield sequence
    other.close_sequence(sequence)


@contextlib.contextmanager
def answer_lost(
    proxy: TcpProxy,
    other: blockdex.Client,
    sequence: int,
    length: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """The connection is cut once the sequence has that length and before the client has heard of it."""

    def watch() -> None:
        deadline = time.monotonic() + 10
        while other.get_sequence(sequence).lengths[0] != length and time.monotonic() < deadline:
            time.sleep(0.01)
        meanwhile()
        proxy.cut()
        proxy.answers = True

    proxy.answers = False
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()


def append_rpc(flavour: Any, rpc: str) -> str:
    return f"Stream/{rpc}" if flavour[1] == "stream" else rpc


def assert_unknown(client: blockdex.Client, sequence: int, layer: int = 0) -> None:
    with pytest.raises(FailedPreconditionError) as refused:
        client.append_keys(layer, sequences=sequence, keys=KEYS)
    assert refused.value.reason == Reason.OUTCOME_UNKNOWN


@pytest.mark.parametrize("select", [False, True])
def test_an_append_with_a_revision_is_applied_exactly_once(
    flavour: Any,
    client: blockdex.Client,
    other: blockdex.Client,
    proxy: TcpProxy,
    sequence: int,
    counted: Counted,
    select: bool,
) -> None:
    client.append_keys(0, sequences=sequence, keys=KEYS)
    with answer_lost(proxy, other, sequence, 10):
        if select:
            blocks = client.append_and_select(0, sequences=sequence, keys=KEYS, queries=QUERIES, revisions=3)
            assert (blocks[:, :, 0] == 0).all()
        else:
            client.append_keys(0, sequences=sequence, keys=KEYS, revisions=3)
    rpc = append_rpc(flavour, "AppendAndSelect" if select else "AppendKeys")
    first = 0 if select else 1
    assert counted("blockdex_requests_total", rpc=rpc, code="OK") == first + 2, "the server has seen it twice"
    assert counted("blockdex_tokens_total", phase="append") == 10, "and has written it once"
    state = client.get_sequence(sequence)
    assert (state.lengths[0], state.revisions[0]) == (10, 3)
    client.append_keys(0, sequences=sequence, keys=KEYS)
    assert client.get_sequence(sequence).lengths[0] == 15


@pytest.mark.parametrize("revisions", [None, 0])
def test_an_append_without_a_revision_is_not_repeated(
    flavour: Any,
    client: blockdex.Client,
    other: blockdex.Client,
    proxy: TcpProxy,
    sequence: int,
    counted: Counted,
    revisions: int | None,
) -> None:
    client.append_keys(1, sequences=sequence, keys=KEYS)
    with answer_lost(proxy, other, sequence, 5), pytest.raises(UnavailableError) as lost:
        client.append_keys(0, sequences=sequence, keys=KEYS, revisions=revisions)
    assert lost.value.reason == Reason.UNREACHABLE
    assert counted("blockdex_requests_total", rpc=append_rpc(flavour, "AppendKeys"), code="OK") == 2
    assert_unknown(client, sequence)
    client.info()  # repeated until the connection is whole again
    client.append_keys(1, sequences=sequence, keys=KEYS)
    assert client.get_sequence(sequence).lengths == (5, 10, 0)
    client.append_keys(0, sequences=sequence, keys=KEYS)
    assert client.get_sequence(sequence).lengths == (10, 10, 0)


def test_one_span_without_a_revision_keeps_all_from_being_repeated(
    client: blockdex.Client, other: blockdex.Client, proxy: TcpProxy, sequence: int
) -> None:
    second = new_sequence()
    client.open_sequence(second)
    with answer_lost(proxy, other, sequence, 2), pytest.raises(UnavailableError):
        client.append_keys(0, sequences=[sequence, second], lengths=[2, 3], keys=KEYS, revisions=[4, 0])
    assert_unknown(client, sequence)
    assert_unknown(client, second)
    client.info()  # repeated until the connection is whole again
    client.append_keys(0, sequences=second, keys=KEYS, starts=3)
    client.append_keys(0, sequences=second, keys=KEYS)
    assert client.get_sequence(second).lengths[0] == 13
    client.close_sequence(second)


def test_a_refusal_does_not_make_certain_what_an_earlier_attempt_left_open(
    client: blockdex.Client, other: blockdex.Client, proxy: TcpProxy, sequence: int
) -> None:
    def close() -> None:
        other.close_sequence(sequence)

    with answer_lost(proxy, other, sequence, 5, meanwhile=close), pytest.raises(NotFoundError):
        client.append_keys(0, sequences=sequence, keys=KEYS, revisions=1)
    assert_unknown(client, sequence)


def accept_again(proxy: TcpProxy, connections: int) -> None:
    """The server is back once somebody has tried to reach it, and tried again after that was in vain."""
    deadline = time.monotonic() + 5
    while proxy.connections <= connections and time.monotonic() < deadline:
        time.sleep(0.005)
    proxy.accepts = True


def test_what_changes_nothing_is_repeated_until_the_server_is_back(
    client: blockdex.Client, proxy: TcpProxy, sequence: int
) -> None:
    client.append_keys(0, sequences=sequence, keys=KEYS)
    calls: list[Callable[[], Any]] = [
        lambda: client.select_blocks(0, sequences=sequence, queries=QUERIES),
        lambda: client.get_sequence(sequence),
        lambda: client.close_sequence(sequence),
    ]
    for call in calls:
        proxy.accepts = False
        proxy.cut()
        before = proxy.connections
        back = threading.Thread(target=accept_again, args=(proxy, before + 1))
        back.start()
        call()
        back.join()
        assert proxy.connections > before + 1, "it was tried while the server was away"


def test_what_may_change_something_is_not_repeated(client: blockdex.Client, proxy: TcpProxy, sequence: int) -> None:
    client.append_keys(0, sequences=sequence, keys=KEYS)
    child = new_sequence()
    calls: list[Callable[[], Any]] = [
        lambda: client.append_keys(0, sequences=sequence, keys=KEYS),
        lambda: client.append_and_select(1, sequences=sequence, keys=KEYS, queries=QUERIES),
        lambda: client.fork_sequence(sequence, child, 3),
        lambda: client.truncate_sequence(sequence, 3),
    ]
    proxy.accepts = False
    proxy.cut()
    for call in calls:
        began = time.monotonic()
        with pytest.raises(UnavailableError) as lost:
            call()
        assert lost.value.reason == Reason.UNREACHABLE
        assert time.monotonic() - began < 5
    proxy.accepts = True
    for layer in range(3):
        assert_unknown(client, sequence, layer)
    assert client.get_sequence(sequence).lengths == (5, 0, 0)


def test_retries_end_at_the_deadline(client: blockdex.Client, proxy: TcpProxy, sequence: int) -> None:
    client.append_keys(0, sequences=sequence, keys=KEYS)
    proxy.accepts = False
    proxy.cut()
    began = time.monotonic()
    # The last attempt may be under way when the deadline passes.
    with pytest.raises((UnavailableError, DeadlineExceededError)):
        client.select_blocks(0, sequences=sequence, queries=QUERIES, timeout=0.4)
    assert 0.1 < time.monotonic() - began < 5


def test_a_deadline_leaves_an_unknown_outcome(
    client: blockdex.Client, other: blockdex.Client, proxy: TcpProxy, sequence: int
) -> None:
    proxy.answers = False
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError) as late:
        client.append_keys(0, sequences=sequence, keys=KEYS, revisions=2, timeout=0.3)
    assert late.value.reason == Reason.DEADLINE_EXCEEDED
    assert 0.2 < time.monotonic() - began < 5
    proxy.cut()
    proxy.answers = True
    assert_unknown(client, sequence)
    assert client.get_sequence(sequence).lengths == other.get_sequence(sequence).lengths
    client.append_keys(0, sequences=sequence, keys=KEYS)


def test_every_call_keeps_its_timeout(client: blockdex.Client, proxy: TcpProxy, sequence: int) -> None:
    calls: list[Callable[..., Any]] = [
        lambda: client.info(timeout=0.05),
        lambda: client.open_sequence(new_sequence(), timeout=0.05),
        lambda: client.get_sequence(sequence, timeout=0.05),
        lambda: client.fork_sequence(sequence, new_sequence(), 0, timeout=0.05),
        lambda: client.select_blocks(0, sequences=sequence, queries=QUERIES, starts=0, timeout=0.05),
        lambda: client.append_and_select(0, sequences=sequence, keys=KEYS, queries=QUERIES, timeout=0.05),
        lambda: client.truncate_sequence(sequence, 0, timeout=0.05),
        lambda: client.close_sequence(sequence, timeout=0.05),
    ]
    client.append_keys(2, sequences=sequence, keys=KEYS)
    proxy.answers = False
    for call in calls:
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            call()
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("failure", "certain"),
    [
        (UnavailableError("", Reason.SHUTTING_DOWN), True),
        (UnavailableError("", Reason.UNREACHABLE), False),
        (DeadlineExceededError("", Reason.DEADLINE_EXCEEDED), False),
        (blockdex.CancelledError("", Reason.CANCELLED), False),
        (blockdex.InternalError("", Reason.INTERNAL), False),
        (blockdex.UnknownError("", "UNKNOWN"), False),
        (blockdex.DataLossError("", Reason.INTERNAL), False),
        (KeyboardInterrupt(), False),
        (blockdex.ResourceExhaustedError("", Reason.OUT_OF_PAGES), True),
        (blockdex.AbortedError("", Reason.STALE_REVISION), True),
        (NotFoundError("", Reason.UNKNOWN_SEQUENCE), True),
        (FailedPreconditionError("", Reason.EPOCH_MISMATCH), True),
    ],
)
def test_which_failures_are_certain_to_have_changed_nothing(failure: BaseException, certain: bool) -> None:
    assert changed_nothing(failure) is certain


def test_a_stream_that_is_refused_says_why_and_one_that_breaks_is_unreachable() -> None:
    refusal = blockdex.UnauthenticatedError("who are you", "UNAUTHENTICATED")
    assert error_of_stream(refusal) is refusal
    for broken in (blockdex.InternalError("reset", Reason.INTERNAL), blockdex.CancelledError("", Reason.CANCELLED)):
        error = error_of_stream(broken)
        assert isinstance(error, UnavailableError)
        assert error.reason == Reason.UNREACHABLE


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan")])
def test_a_timeout_is_a_positive_number(client: blockdex.Client, flavour: Any, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, got "):
        client.info(timeout=timeout)
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, got "):
        flavour[0]("127.0.0.1:1", timeout=timeout)


@pytest.mark.parametrize(
    "timeout", [1e10, sys.maxsize, 1.7e308, 10**400], ids=["1e10", "maxsize", "1.7e308", "10**400"]
)
def test_a_timeout_may_be_longer_than_anybody_can_wait(
    client: blockdex.Client, proxy: TcpProxy, sequence: int, timeout: float
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: client.info(timeout=timeout),
        lambda: client.open_sequence(new_sequence(), timeout=timeout),
        lambda: client.append_keys(0, sequences=sequence, keys=KEYS, timeout=timeout),
        lambda: client.select_blocks(0, sequences=sequence, queries=QUERIES, timeout=timeout),
    ]
    for call in calls:
        call()
    # Whoever watches over deadlines has seen that one, and is still there.
    time.sleep(0.1)
    proxy.answers = False
    with pytest.raises(DeadlineExceededError):
        client.append_keys(0, sequences=sequence, keys=KEYS, timeout=0.2)


def test_another_epoch_is_told_once_and_everything_known_is_forgotten(
    client: blockdex.Client, proxy: TcpProxy, sequence: int, small_server: Serving
) -> None:
    client.append_keys(0, sequences=sequence, keys=KEYS)
    before = client.info()
    proxy.target = small_server.grpc_address
    proxy.cut()
    with pytest.raises(FailedPreconditionError) as refused:
        client.select_blocks(0, sequences=sequence, queries=QUERIES)
    assert refused.value.reason == Reason.EPOCH_MISMATCH
    assert_unknown(client, sequence)
    with pytest.raises(NotFoundError):
        client.append_keys(0, sequences=sequence, keys=KEYS, starts=5)
    after = client.info()
    assert after.epoch != before.epoch
    assert after.limits.max_spans == 4
    client.open_sequence(sequence)
    client.append_keys(0, sequences=sequence, keys=KEYS)
    assert client.get_sequence(sequence).lengths == (5, 0, 0)
    client.close_sequence(sequence)


def test_an_epoch_of_the_callers_own_is_the_callers_own_fault(client: blockdex.Client, sequence: int) -> None:
    client.append_keys(0, sequences=sequence, keys=KEYS)
    with pytest.raises(FailedPreconditionError) as refused:
        client.append_keys(0, sequences=sequence, keys=KEYS, epoch=1)
    assert refused.value.reason == Reason.EPOCH_MISMATCH
    client.append_keys(0, sequences=sequence, keys=KEYS, epoch=0)
    assert client.get_sequence(sequence).lengths[0] == 10
