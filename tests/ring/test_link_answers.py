"""What comes of a link's answers: how they are waited for, told, timed, and what cannot be one."""

from __future__ import annotations

import os
import sys
import time
from bisect import bisect_left
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ring_messages import Answer, TokenAnswer
from blockdex._native import NOTHING_LEFT, QUEUED, SENT
from blockdex.contract.errors import BlockdexError, NotFoundError, Reason
from blockdex.contract.messages import GetSequence, SequenceState
from blockdex.ring import codec, layout
from blockdex.ring.caller import STREAM
from blockdex.ring.layout import ANSWER_STRUCT, AT
from blockdex.v1 import indexer_pb2 as pb
from support.asking import RESPONSES
from support.client_link import (
    GET_RPC,
    KINDS,
    ME,
    NAMES,
    ROOM,
    ROOMY,
    SLOTS,
    TENANT,
    Core,
    append,
    in_stream,
    large,
    opened,
    selection,
)
from support.links import BOUNDS, link_of


@pytest.mark.parametrize(
    "numbers", [{"topk": 5}, {"topk": 2**32 - 1, "num_heads": 2**32 - 1}, {"flags": 3}, {"flags": 0}]
)
def test_selections_that_are_not_in_their_payload(numbers: dict[str, int]) -> None:
    with opened() as core:
        assert core.send(1, selection().SerializeToString()) == SENT
        core.answer(core.take().ticket, TokenAnswer(9, np.zeros((2, 4, 4), np.int32)))
        core.spoil(**numbers)
        with pytest.raises(ValueError, match="it is none to its request"):
            core.link.take()


@settings(deadline=None)
@given(st.integers(0, 2), st.booleans(), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.data())
def test_responses_are_those_of_protobuf(kind: int, stream: bool, number: int, epoch: int, data: st.DataObject) -> None:
    body: Any = append()
    if kind:
        queries = pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(2 * 4 * 4 * 2))
        keys: dict[str, Any] = {"keys": body.keys} if kind == 2 else {}
        make: Any = KINDS[kind]
        body = make(spans=body.spans, queries=queries, **keys)
    shape = tuple(data.draw(st.integers(1, 9)) for _ in range(3))
    ids = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) - 1 if kind else None
    scores = np.sqrt(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape) if data.draw(st.booleans()) else None
    answer = TokenAnswer(epoch, ids, scores if kind else None)
    tensors: dict[str, Any] = {}
    if ids is not None:
        tensors["block_ids"] = pb.Tensor(dtype=pb.DTYPE_INT32, data=ids.tobytes())
        if scores is not None:
            tensors["scores"] = pb.Tensor(dtype=pb.DTYPE_FP32, data=scores.tobytes())
    expected: Any = RESPONSES[kind](epoch=epoch, **tensors)
    wire: Any = body
    if stream:
        wire = in_stream(kind, body, number)
        expected = pb.StreamResponse(request_id=number, **{NAMES[kind]: expected})
    with opened() as core:
        assert core.send(STREAM if stream else kind, wire.SerializeToString()) == SENT
        core.answer(core.take().ticket, answer, offset=64 * data.draw(st.integers(0, 9)))
        ((asker, told, response, rest),) = core.link.take()
        assert (asker, told, rest) == (ME, number if stream else 0, None)
        assert response is not None and type(expected).FromString(response) == expected
        assert len(response) == expected.ByteSize()
        if ids is not None:
            assert core.segment.counters[AT["answer_bytes_freed"] // 8] > 0
        assert core.link.take() == [] and core.segment.flags[AT["client_sleeps"] // 4] == 1


def waits(core: Core, seconds: float = 5.0) -> bool:
    return bool(core.link.await_alone(core.epoll.fileno(), seconds))


@pytest.mark.parametrize("event", [False, True])
def test_the_only_request_in_flight_is_waited_for_while_there_is_nothing_else_to_do(event: bool) -> None:
    seconds = 0.02

    def looked() -> tuple[float, float]:
        """Seconds that it waited for an answer that does not come, and those of its core."""
        with opened(spin_seconds=1.0) as core:
            core.segment.flags[AT["client_sleeps"] // 4] = 1
            assert core.send(STREAM, in_stream(0, append(), 1).SerializeToString()) == SENT
            if event:
                os.eventfd_write(core.bell, 1)
            began, took = time.monotonic(), time.thread_time()
            assert not waits(core, seconds)
            assert core.segment.flags[AT["client_sleeps"] // 4] == 0, "nobody rings for what is looked for"
            return time.monotonic() - began, time.thread_time() - took

    waited, took = zip(*(looked() for _ in range(10)), strict=True)
    assert max(waited) < 10
    assert max(took) < seconds / 4 if event else min(waited) >= seconds


@pytest.mark.alone
def test_its_answer_ends_the_wait() -> None:
    with opened(spin_seconds=1.0) as core:
        assert core.send(STREAM, in_stream(0, append(), 1).SerializeToString()) == SENT
        core.answer(core.take().ticket, TokenAnswer(9))
        took = time.thread_time()
        assert waits(core)
        assert time.thread_time() - took < 0.001


@pytest.mark.parametrize(("spin_seconds", "requests"), [(0.0, 1), (1.0, 2), (1.0, 0)])
def test_nothing_is_waited_for_beside_others_or_without_spinning(spin_seconds: float, requests: int) -> None:
    with opened(spin_seconds=spin_seconds) as core:
        core.segment.flags[AT["client_sleeps"] // 4] = 1
        for number in range(requests):
            assert core.send(STREAM, in_stream(0, append(), number).SerializeToString()) == SENT
        assert not waits(core)
        assert core.segment.flags[AT["client_sleeps"] // 4] == 1
        for _ in range(requests):
            core.answer(core.take().ticket, TokenAnswer(9))
        assert waits(core) == (requests > 0)


def test_errors_and_states_come_as_they_are() -> None:
    with opened() as core:
        assert core.send(0, append(3).SerializeToString()) == SENT
        core.answer(core.take().ticket, NotFoundError("no such", Reason.UNKNOWN_SEQUENCE))
        assert core.ask(number=4) == SENT
        ticket, request, *_ = core.take()
        assert request == GetSequence(TENANT, 0, 5)
        core.answer(ticket, SequenceState(9, np.array([3, 4, 5]), np.array([0, 1, 2], np.uint64)), offset=64)
        (_, _, response, rest), (_, number, none, other) = core.link.take()
        assert (response, none, number) == (None, None, 4)
        numbers = layout.AnswerSlot._make(ANSWER_STRUCT.unpack(rest[2]))
        error = codec.read_error(numbers, np.frombuffer(rest[3], np.uint8))
        assert (str(error), rest[0], rest[4:]) == ("no such [NOT_FOUND, UNKNOWN_SEQUENCE]", 0, (1, 1, 3))
        assert codec.stage_seconds_of(numbers) == {"queue": 0.5}
        state = codec.read_state(
            layout.AnswerSlot._make(ANSWER_STRUCT.unpack(other[2])), np.frombuffer(other[3], np.uint8)
        )
        assert isinstance(state, SequenceState) and state.lengths is not None and state.revisions is not None
        assert (state.epoch, state.lengths.tolist(), state.revisions.tolist()) == (9, [3, 4, 5], [0, 1, 2])
        assert other[0] == GET_RPC


def test_of_what_took_long_the_rest_is_told_too() -> None:
    with opened(tell_seconds=-1.0) as core:
        assert core.send(0, append(3).SerializeToString()) == SENT
        core.answer(core.take().ticket, TokenAnswer(9))
        ((_, _, response, rest),) = core.link.take()
        assert pb.AppendKeysResponse.FromString(response).epoch == 9
        assert (rest[0], rest[3], rest[4:]) == (0, b"", (1, 1, 3))
        assert codec.stage_seconds_of(layout.AnswerSlot._make(ANSWER_STRUCT.unpack(rest[2]))) == {"queue": 0.5}


def references(*objects: object) -> list[int]:
    return [sys.getrefcount(each) for each in objects]


def test_no_reference_is_lost_or_kept() -> None:
    """Of an owner, a message and a tenant, whichever way a request ends, and of what an answer is told with."""
    owner, tenant = object(), "a tenant of its own"
    short, long_one = in_stream(0, append(), 1).SerializeToString(), large(1)
    with opened(**ROOMY) as core:

        def send(message: bytes) -> Any:
            return core.link.send(owner, STREAM, tenant, 7.0, message)

        def answered(answer: Answer | BlockdexError) -> None:
            assert send(short) == SENT
            core.answer(core.take().ticket, answer)
            ((_, _, response, rest),) = core.link.take()
            told = rest if response is None else response
            del response, rest
            count = sys.getrefcount(told)
            assert count == 2, "here, and where it is counted"

        def given_up() -> None:
            assert send(short) == SENT
            core.take()
            assert len(core.link.give_up_all(owner)) == 1
            core.take()

        def refused() -> None:
            assert send(short) == SENT
            assert send(short)[3] == Reason.DUPLICATE_REQUEST_ID
            assert core.link.give_up(owner, 1) is not None
            core.take()
            core.take()

        def copied() -> None:
            assert send(long_one) == QUEUED
            while core.link.flush() != NOTHING_LEFT:
                pass
            core.answer(core.take().ticket, TokenAnswer(9))
            assert len(core.link.take()) == 1

        def given_up_unsent() -> None:
            assert send(long_one) == QUEUED
            core.link.flush()
            assert core.link.give_up(owner, 1) is not None

        def asked() -> None:
            assert core.link.send_sequence(owner, 1, GET_RPC, tenant, 7.0, layout.GET, 0, 5, 0, 0, 0, b"") == SENT
            core.answer(core.take().ticket, SequenceState(9))
            assert len(core.link.take()) == 1

        before = references(owner, short, long_one, tenant)
        ways: list[Any] = [given_up, refused, copied, given_up_unsent, asked]
        ways += [lambda: answered(TokenAnswer(9)), lambda: answered(NotFoundError("no", Reason.UNKNOWN_SEQUENCE))]
        for way in ways:
            for _ in range(10):
                way()
            assert references(owner, short, long_one, tenant) == before
    with opened(**ROOMY) as core:
        assert send(short) == SENT and send(long_one)[3] == Reason.DUPLICATE_REQUEST_ID
        assert core.link.send(owner, 0, tenant, 7.0, append().SerializeToString()) == SENT
        del core.link
    assert references(owner, short, long_one, tenant) == before, "a link that ends lets go of all"


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"ticket": 4711}, "ticket 4711 is not in flight"),
        ({"payload_offset": ROOM, "payload_bytes": 1}, "1 bytes at 16384 are not in an arena"),
        ({"payload_offset": 64, "payload_bytes": 2**64 - 1}, "are not in an arena"),
        ({"phase": 5}, "phase must be 1 to 4, got 5"),
        ({"flags": 1, "topk": 2**32 - 1, "num_heads": 2**32 - 1, "num_tokens": 2**32 - 1}, "it is none to its request"),
        ({"flags": 4}, "it is none to its request"),
    ],
)
def test_answers_that_cannot_be(numbers: dict[str, int], words: str) -> None:
    """Those before it are told of first."""
    with opened() as core:
        for number in (1, 2):
            wire = in_stream(0, append(), number).SerializeToString()
            assert core.send(STREAM, wire) == SENT
            core.answer(core.take().ticket, TokenAnswer(9))
        core.spoil(**numbers)
        assert [number for _, number, *_ in core.link.take()] == [1]
        with pytest.raises(ValueError, match=words):
            core.link.take()
        assert core.link.waiting == 1, "it can still be refused"


def test_an_answer_to_what_was_not_sent_cannot_be() -> None:
    """Tickets are given at equal distances: that of a request which still waits for room can be guessed."""
    wire = append().SerializeToString()
    with opened(requests=2 * 128) as core:
        assert [core.send(0, wire, object()) for _ in range(3)] == [SENT, SENT, QUEUED]
        first, second = core.take().ticket, core.take().ticket
        unsent = 2 * second - first
        core.answer(unsent, TokenAnswer(9))
        with pytest.raises(ValueError, match=f"ticket {unsent} is not in flight"):
            core.link.take()


def test_more_answers_than_slots_cannot_be() -> None:
    with opened() as core:
        core.segment.counters[AT["answers_written"] // 8] = SLOTS + 1
        with pytest.raises(ValueError, match="9 slots are said to be filled, there are 8"):
            core.link.take()


@pytest.mark.parametrize("field_name", ["magic", "version", "slot_bytes", "request_slots", "answer_arena_bytes"])
def test_a_header_that_cannot_be(field_name: str) -> None:
    with opened() as core:
        offset = AT[field_name]
        core.segment.memory[offset : offset + 4] = b"\xff\xff\xff\x7f"
        with pytest.raises(ValueError, match="its header is none of a ring"):
            link_of(core.segment, core.bell)


def test_answers_are_timed() -> None:
    with opened() as core:
        waits = (0.0, 0.005, 0.0)
        for number, seconds in enumerate(waits):
            wire = in_stream(0, append(), number).SerializeToString()
            assert core.send(STREAM, wire) == SENT
            time.sleep(seconds)
            core.answer(core.take().ticket, TokenAnswer(9))
            core.link.take()
        times = core.link.take_times()
        counts, total = times[STREAM]
        assert counts[bisect_left(BOUNDS, 0.005)] >= 1 and sum(counts) == 3
        assert 0.005 <= total < 5
        assert all(sum(others) == 0 for others, _ in times[:STREAM] + times[STREAM + 1 :])
        assert sum(core.link.take_times()[STREAM][0]) == 0
