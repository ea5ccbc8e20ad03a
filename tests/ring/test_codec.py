"""Messages through a segment: what comes out is what went in, and garbage is refused, never followed out of bounds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdex.contract.errors import BlockdexError, NotFoundError, Reason
from blockdex.contract.messages import (
    PHASES,
    CloseSequences,
    FloatDtype,
    ForkSequence,
    GetSequence,
    Keys,
    OpenSequences,
    Order,
    Phase,
    Queries,
    Request,
    SequenceState,
    Spans,
    Stage,
    TensorData,
    TokenAnswer,
    TokenRequest,
    TruncateSequence,
)
from blockdex.ring import layout
from blockdex.ring.layout import ANSWER_STRUCT, CANCEL, REQUEST_STRUCT, AnswerSlot, RequestSlot
from blockdex.ring.segment import RingError, Segment, Sizes
from support import slots as codec

ROOM = 1 << 15
U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
TENANTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def segment() -> Iterator[Segment]:
    made = Segment.create(Sizes(4, request_bytes=ROOM, answer_bytes=ROOM), epoch=1)
    yield made
    os.close(made.fd)


@st.composite
def token_requests(draw: st.DrawFn) -> TokenRequest:
    num_spans = draw(st.integers(1, 20))

    def column(values: st.SearchStrategy[int], dtype: Any) -> Any:
        return np.array(draw(st.lists(values, min_size=num_spans, max_size=num_spans)), dtype)

    positions = st.integers(0, 2**31)
    spans = Spans(
        column(U64, np.uint64), column(positions, np.int64), column(positions, np.int64), column(U64, np.uint64)
    )
    dtypes = st.sampled_from(layout.DTYPES)
    tensors = st.builds(TensorData, dtypes, st.binary(max_size=700))
    queries = st.builds(
        Queries,
        tensor=tensors,
        first_head=st.integers(0, 100),
        num_heads=st.integers(1, 100),
        order=st.sampled_from(layout.ORDERS),
        return_scores=st.booleans(),
        wait_for_keys=st.booleans(),
        raw_scores=st.booleans(),
    )
    return TokenRequest(
        draw(TENANTS),
        draw(U64),
        draw(U32),
        spans,
        draw(st.none() | st.builds(Keys, tensors, st.booleans())),
        draw(st.none() | queries),
    )


REQUESTS = st.one_of(
    st.lists(st.tuples(U64, U32), max_size=5).flatmap(
        lambda rows: st.builds(
            OpenSequences, TENANTS, U64, st.just(tuple(row[0] for row in rows)), st.just(tuple(row[1] for row in rows))
        )
    ),
    st.builds(GetSequence, TENANTS, U64, U64),
    st.builds(ForkSequence, TENANTS, U64, U64, U64, U32),
    st.builds(TruncateSequence, TENANTS, U64, U64, U32),
    st.builds(CloseSequences, TENANTS, U64, st.lists(U64, max_size=5).map(tuple)),
    token_requests(),
)


def plain(message: Any) -> Any:
    """A message that can be compared."""
    match message:
        case np.ndarray():
            return message.dtype, message.tolist()
        case memoryview() | bytes():
            return bytes(message)
        case str() | int() | float() | tuple() | None:
            return message
        case _:
            return type(message), [plain(getattr(message, name)) for name in message.__slots__]


@given(request=REQUESTS, ticket=U64, offset=st.integers(0, 16).map(lambda line: 64 * line))
def test_requests(segment: Segment, request: Request, ticket: int, offset: int) -> None:
    slot = segment.request_slots_offset
    codec.write_request(segment, slot, offset, ticket, request, 12.5, 99.25)
    received = codec.read_request(segment, slot)
    assert plain(received.request) == plain(request)
    assert (received.ticket, received.received, received.deadline) == (ticket, 12.5, 99.25)


def test_a_cancellation(segment: Segment) -> None:
    cancels = RequestSlot(ticket=5, kind=CANCEL)
    REQUEST_STRUCT.pack_into(segment.memory, segment.request_slots_offset, *cancels)
    assert codec.read_request(segment, segment.request_slots_offset)[:2] == (5, None)


def test_columns_are_copied_and_tensors_are_not(segment: Segment) -> None:
    columns = (np.array([number]) for number in (1, 2, 3, 4))
    tensor = TensorData("bf16", b"abcd")
    request = TokenRequest("t", 0, 0, Spans(*columns), Keys(tensor), None)
    codec.write_request(segment, segment.request_slots_offset, 0, 1, request, 0.0, 0.0)
    received = codec.read_request(segment, segment.request_slots_offset).request
    assert isinstance(received, TokenRequest) and received.keys is not None
    arena = slice(segment.request_arena_offset, segment.request_arena_offset + ROOM)
    segment.memory[arena] = b"z" * ROOM
    assert received.spans.starts.tolist() == [2]
    assert bytes(received.keys.tensor.data) == b"zzzz"


@given(numbers=st.lists(st.integers(0, 255), min_size=128, max_size=128), kind=st.integers(0, 8))
def test_garbage_is_refused_or_stays_in_its_memory(segment: Segment, numbers: list[int], kind: int) -> None:
    slot = segment.request_slots_offset
    segment.memory[slot : slot + 128] = bytes(numbers)
    segment.memory[slot + 8 : slot + 10] = kind.to_bytes(2, "little")
    try:
        codec.read_request(segment, slot)
    except RingError:
        return


SMALL = RequestSlot(ticket=1, kind=layout.TOKENS, tenant_bytes=1, num_spans=2, payload_bytes=128)
"""A token request without tensors: a tenant, and two spans up to byte 72."""


@pytest.mark.parametrize(
    "numbers",
    [
        SMALL._replace(kind=0),
        SMALL._replace(kind=8),
        SMALL._replace(payload_offset=1),
        SMALL._replace(payload_offset=ROOM),
        SMALL._replace(payload_offset=2**64 - 64),
        SMALL._replace(payload_bytes=ROOM + 1),
        SMALL._replace(payload_bytes=127),
        SMALL._replace(tenant_bytes=200),
        SMALL._replace(num_spans=3 << 20),
        SMALL._replace(keys_bytes=64),
        SMALL._replace(keys_bytes=2**64 - 1, keys_dtype=1),
        SMALL._replace(keys_dtype=5),
        SMALL._replace(queries_dtype=5, order=1),
        SMALL._replace(queries_dtype=1, order=0),
        SMALL._replace(queries_dtype=1, order=3),
    ],
)
def test_numbers_that_cannot_be_are_refused(segment: Segment, numbers: RequestSlot) -> None:
    REQUEST_STRUCT.pack_into(segment.memory, segment.request_slots_offset, *SMALL)
    codec.read_request(segment, segment.request_slots_offset)
    REQUEST_STRUCT.pack_into(segment.memory, segment.request_slots_offset, *numbers)
    with pytest.raises(RingError):
        codec.read_request(segment, segment.request_slots_offset)


def through(segment: Segment, answer: Any, phase: Phase, stages: dict[Stage, float]) -> tuple[Any, dict[Stage, float]]:
    numbers, columns = codec.columns_of(answer)
    slot = segment.answer_slots_offset
    codec.write_answer(segment, slot, 3, numbers, columns, phase, stages, (128, 128 + codec.answer_bytes(columns)))
    read = codec.read_answer_slot(segment, slot)
    assert codec.phase_of(read) == phase
    begin = segment.answer_arena_offset + read.payload_offset
    payload = np.frombuffer(segment.memory, np.uint8, read.payload_bytes, begin)
    return codec.read_answer(read, payload), codec.stage_seconds_of(read)


def test_answers(segment: Segment) -> None:
    ids = np.arange(5 * 3 * 7, dtype=np.int32).reshape(5, 3, 7)
    scores = ids.astype(np.float32)
    lengths, revisions = np.arange(9), np.arange(9, dtype=np.uint64) + 2**63
    answers = [
        TokenAnswer(2**64 - 1),
        TokenAnswer(7, ids),
        TokenAnswer(7, ids[:, 1:], scores[:, 1:]),
        SequenceState(7),
        SequenceState(7, lengths, revisions),
    ]
    stages: dict[Stage, float] = {"queue": 0.25, "reply": 0.5}
    for answer, phase in zip(answers, itertools.cycle(PHASES), strict=False):
        received, timed = through(segment, answer, phase, stages)
        assert plain(received) == plain(answer)
        assert timed == stages


@given(message=st.text(max_size=3000))
def test_errors(segment: Segment, message: str) -> None:
    error, _ = through(segment, NotFoundError(message, Reason.UNKNOWN_SEQUENCE), "sequence", {})
    assert isinstance(error, BlockdexError)
    assert (type(error), error.reason) == (NotFoundError, Reason.UNKNOWN_SEQUENCE)
    assert message.encode("utf-8", "surrogatepass").startswith(error.message.encode()[:-3])


def test_an_answer_outside_its_arena_is_refused(segment: Segment) -> None:
    slot = segment.answer_slots_offset
    segment.memory[slot : slot + 128] = b"\xff" * 128
    with pytest.raises(RingError, match=r"answer: .* bytes at .* are not in an arena"):
        codec.read_answer_slot(segment, slot)


@pytest.mark.parametrize("phase", [0, 5])
def test_an_answer_of_no_phase_is_refused(segment: Segment, phase: int) -> None:
    ANSWER_STRUCT.pack_into(segment.memory, segment.answer_slots_offset, *AnswerSlot(phase=phase))
    with pytest.raises(RingError, match=f"answer: phase must be 1 to 4, got {phase}"):
        codec.read_answer_slot(segment, segment.answer_slots_offset)


def test_dtypes_and_orders_are_numbered_as_on_the_wire() -> None:
    from blockdex.v1 import indexer_pb2 as pb

    dtypes: dict[int, FloatDtype] = dict(enumerate(layout.DTYPES, start=1))
    wire = {pb.DTYPE_BF16: "bf16", pb.DTYPE_FP16: "fp16", pb.DTYPE_FP32: "fp32", pb.DTYPE_FP8_E4M3: "fp8_e4m3"}
    assert dtypes == wire
    orders: dict[int, Order] = dict(enumerate(layout.ORDERS, start=1))
    assert orders == {pb.SELECTION_ORDER_ASCENDING: "ascending", pb.SELECTION_ORDER_SCORE: "score"}
