"""Plain messages through a segment, in Python: what comes out is what went in, and numbers are the wire contract's."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.ring_messages import TokenAnswer, read_answer
from blockdex.contract.errors import BlockdexError, NotFoundError, Reason
from blockdex.contract.messages import PHASES, FloatDtype, Order, Phase, SequenceState, Stage
from blockdex.ring import layout
from blockdex.ring.codec import phase_of, stage_seconds_of
from blockdex.ring.segment import Segment, Sizes
from support import slots

ROOM = 1 << 15


@pytest.fixture(scope="module")
def segment() -> Iterator[Segment]:
    made = Segment.create(Sizes(4, request_bytes=ROOM, answer_bytes=ROOM), epoch=1)
    yield made
    os.close(made.fd)


def through(segment: Segment, answer: Any, phase: Phase, stages: dict[Stage, float]) -> tuple[Any, dict[Stage, float]]:
    slot = segment.answer_slots_offset
    slots.write_answer(segment, slot, 3, answer, phase, stages, offset=128)
    numbers, read = read_answer(segment, slot)
    assert (numbers.ticket, phase_of(numbers)) == (3, phase)
    return read, stage_seconds_of(numbers)


def test_answers(segment: Segment) -> None:
    ids = np.arange(5 * 3 * 7, dtype=np.int32).reshape(5, 3, 7)
    scores = ids.astype(np.float32)
    lengths, revisions = np.arange(9), np.arange(9, dtype=np.uint64) + 2**63
    answers: list[TokenAnswer | SequenceState] = [
        TokenAnswer(2**64 - 1),
        TokenAnswer(7, ids),
        TokenAnswer(7, ids[:, 1:], scores[:, 1:]),
        SequenceState(7),
        SequenceState(7, lengths, revisions),
    ]
    stages: dict[Stage, float] = {"queue": 0.25, "reply": 0.5}
    for answer, phase in zip(answers, itertools.cycle(PHASES), strict=False):
        received, timed = through(segment, answer, phase, stages)
        assert type(received) is type(answer) and timed == stages
        for name in answer.__slots__:
            read, written = getattr(received, name), getattr(answer, name)
            np.testing.assert_array_equal(read, written, strict=isinstance(written, np.ndarray))


@given(message=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3000))
def test_errors(segment: Segment, message: str) -> None:
    told = NotFoundError(message, Reason.UNKNOWN_SEQUENCE, sequence_id=5)
    error, _ = through(segment, told, "sequence", {})
    assert isinstance(error, BlockdexError)
    assert (type(error), error.reason, error.message) == (NotFoundError, Reason.UNKNOWN_SEQUENCE, message)
    assert error.metadata == {"sequence_id": "5"}


def test_dtypes_and_orders_are_numbered_as_on_the_wire() -> None:
    from blockdex.v1 import indexer_pb2 as pb

    dtypes: dict[int, FloatDtype] = dict(enumerate(layout.DTYPES, start=1))
    wire = {pb.DTYPE_BF16: "bf16", pb.DTYPE_FP16: "fp16", pb.DTYPE_FP32: "fp32", pb.DTYPE_FP8_E4M3: "fp8_e4m3"}
    assert dtypes == wire
    orders: dict[int, Order] = dict(enumerate(layout.ORDERS, start=1))
    assert orders == {pb.SELECTION_ORDER_ASCENDING: "ascending", pb.SELECTION_ORDER_SCORE: "score"}
