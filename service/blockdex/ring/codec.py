"""What a frontend writes of a request about sequences, and what it reads of an answer that is not a selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockdex.contract.errors import BlockdexError, error_of
from blockdex.contract.messages import (
    PHASES,
    STAGES,
    ClosePool,
    CloseSequences,
    CreatePool,
    ForkSequence,
    GetSequence,
    OpenSequences,
    Phase,
    SequenceRequest,
    SequenceState,
    SetPageTables,
    Stage,
    TruncateSequence,
)
from blockdex.ring import layout
from blockdex.ring.layout import AnswerSlot, aligned


class SequenceFields(NamedTuple):
    """What a slot says of a request about sequences, and the columns, little-endian, that lie behind its tenant."""

    kind: int
    sequence_id: int = 0
    child_id: int = 0
    number: int = 0
    num_spans: int = 0
    columns: bytes = b""


def sequence_fields(request: SequenceRequest) -> SequenceFields:
    """The fields of a request about sequences or pools."""
    match request:
        case OpenSequences(sequence_ids=ids, lease_seconds=leases):
            fields = SequenceFields(layout.OPEN, num_spans=len(ids), columns=np.array((ids, leases), "<u8").tobytes())
        case CloseSequences(sequence_ids=ids):
            fields = SequenceFields(layout.CLOSE, num_spans=len(ids), columns=np.array(ids, "<u8").tobytes())
        case ForkSequence():
            fields = SequenceFields(layout.FORK, request.parent_id, request.child_id, request.length)
        case TruncateSequence():
            fields = SequenceFields(layout.TRUNCATE, request.sequence_id, number=request.length)
        case GetSequence():
            fields = SequenceFields(layout.GET, request.sequence_id)
        case CreatePool(num_pages=pages, num_rows=rows, max_blocks=blocks):
            fields = SequenceFields(layout.CREATE_POOL, request.pool_id, blocks, pages, rows)
        case SetPageTables(rows=rows, first_blocks=first_blocks, counts=counts, page_ids=pages):
            columns = table_columns(rows, first_blocks, counts, pages)
            fields = SequenceFields(layout.SET_PAGE_TABLES, request.pool_id, 0, len(pages), len(rows), columns)
        case ClosePool():
            fields = SequenceFields(layout.CLOSE_POOL, request.pool_id)
    return fields


def table_columns(*columns: Sequence[int]) -> bytes:
    """Columns of cells to set, one behind the other."""
    return b"".join(np.array(column, "<u8").tobytes() for column in columns)


def phase_of(numbers: AnswerSlot) -> Phase:
    """What the request came to."""
    return PHASES[numbers.phase - 1]


def stage_seconds_of(numbers: AnswerSlot) -> dict[Stage, float]:
    """Seconds in each stage that the request reached."""
    return {stage: seconds for stage, seconds in zip(STAGES, numbers[-len(STAGES) :], strict=True) if seconds >= 0}


def read_error(numbers: AnswerSlot, payload: NDArray[np.uint8]) -> BlockdexError:
    """The error that a slot carries, uint8 `[payload_bytes]`."""
    reason, text = payload[: numbers.reason_bytes].tobytes(), payload[numbers.reason_bytes :].tobytes()
    message, *metadata = text.decode("utf-8", "replace").split("\0")
    named = (each.partition("=") for each in metadata)
    return error_of(numbers.code, message, reason.decode(), {name: value for name, _, value in named})


def read_state(numbers: AnswerSlot, payload: NDArray[np.uint8]) -> SequenceState:
    """The state that a slot carries, uint8 `[payload_bytes]`; its arrays are views of it."""
    if not numbers.flags & layout.HAS_LENGTHS:
        return SequenceState(numbers.epoch)
    layers = 8 * numbers.num_layers
    revisions = payload[aligned(layers) : aligned(layers) + layers]
    return SequenceState(numbers.epoch, payload[:layers].view("<i8"), revisions.view("<u8"))
