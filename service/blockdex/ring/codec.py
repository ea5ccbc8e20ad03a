"""Messages in and out of a segment: what the frontend and the engine write there and read there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockdex.contract.errors import BlockdexError, error_of
from blockdex.contract.messages import (
    PHASES,
    STAGES,
    Answer,
    CloseSequences,
    ForkSequence,
    GetSequence,
    OpenSequences,
    Phase,
    Request,
    SequenceRequest,
    SequenceState,
    Stage,
    TokenAnswer,
    TokenRequest,
    TruncateSequence,
)
from blockdex.ring import layout
from blockdex.ring.layout import (
    ANSWER_STRUCT,
    DTYPES,
    ORDERS,
    REQUEST_STRUCT,
    AnswerSlot,
    RequestSlot,
    aligned,
)
from blockdex.ring.segment import RingError, Segment

_DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(DTYPES, start=1)}
_ORDER_NUMBERS = {order: number for number, order in enumerate(ORDERS, start=1)}
_COLUMNS = 4


Numbers = dict[str, int]
"""Numbers of a slot, by name; those left out keep their default."""


def _columns_at(tenant_bytes: int) -> int:
    """Where columns begin in what a request carries; the tenant comes first."""
    return -(-tenant_bytes // 8) * 8


def _parts(tenant_bytes: int, num_spans: int, keys_bytes: int) -> tuple[int, int, int]:
    """Where columns, keys and queries begin in what a token request carries."""
    columns = _columns_at(tenant_bytes)
    keys = aligned(columns + 8 * _COLUMNS * num_spans)
    return columns, keys, keys + aligned(keys_bytes)


def request_bytes(request: Request) -> int:
    """Bytes of what a request carries."""
    if not isinstance(request, TokenRequest):
        if not isinstance(request, OpenSequences | CloseSequences):
            return len(request.tenant)
        return _columns_at(len(request.tenant)) + len(sequence_fields(request).columns)
    keys_bytes = 0 if request.keys is None else len(request.keys.tensor.data)
    *_, queries_at = _parts(len(request.tenant), len(request.spans.lengths), keys_bytes)
    return queries_at + (0 if request.queries is None else len(request.queries.tensor.data))


def write_request(
    segment: Segment, slot: int, offset: int, ticket: int, request: Request, received: float, deadline: float
) -> None:
    """Writes a request into its slot, and what it carries to an offset of the requests' arena."""
    tenant = request.tenant.encode("ascii")
    begin = segment.request_arena_offset + offset
    segment.memory[begin : begin + len(tenant)] = tenant
    if isinstance(request, TokenRequest):
        numbers = _write_tokens(segment, begin, len(tenant), request)
    else:
        numbers = _write_sequences(segment, begin, len(tenant), request)
    numbers |= {
        "ticket": ticket,
        "tenant_bytes": len(tenant),
        "epoch": request.epoch,
        "received": round(received * 1e9),
        "deadline": round(deadline * 1e9),
        "payload_offset": offset,
        "payload_bytes": request_bytes(request),
    }
    REQUEST_STRUCT.pack_into(segment.memory, slot, *RequestSlot(**numbers))


def _write_tokens(segment: Segment, begin: int, tenant_bytes: int, request: TokenRequest) -> Numbers:
    memory, words, spans = segment.memory, segment.words, request.spans
    keys, queries, num_spans = request.keys, request.queries, len(request.spans.lengths)
    keys_bytes = 0 if keys is None else len(keys.tensor.data)
    columns_at, keys_at, queries_at = _parts(tenant_bytes, num_spans, keys_bytes)
    word = (begin + columns_at) // 8
    for column in (spans.sequence_ids, spans.starts, spans.lengths, spans.revisions):
        words[word : word + num_spans] = column
        word += num_spans
    numbers = {"kind": layout.TOKENS, "layer": request.layer, "num_spans": num_spans}
    if keys is not None:
        memory[begin + keys_at : begin + keys_at + keys_bytes] = keys.tensor.data
        numbers |= {
            "keys_dtype": _DTYPE_NUMBERS[keys.tensor.dtype],
            "keys_bytes": keys_bytes,
            "flags": layout.ROLLBACK * keys.rollback,
        }
    if queries is not None:
        queries_bytes = len(queries.tensor.data)
        memory[begin + queries_at : begin + queries_at + queries_bytes] = queries.tensor.data
        numbers |= {
            "queries_dtype": _DTYPE_NUMBERS[queries.tensor.dtype],
            "queries_bytes": queries_bytes,
            "order": _ORDER_NUMBERS[queries.order],
            "flags": numbers.get("flags", 0)
            | layout.RETURN_SCORES * queries.return_scores
            | layout.WAIT_FOR_KEYS * queries.wait_for_keys
            | layout.RAW_SCORES * queries.raw_scores,
            "first_head": queries.first_head,
            "num_heads": queries.num_heads,
        }
    return numbers


class SequenceFields(NamedTuple):
    """What a slot says of a request about sequences, and the columns, little-endian, that lie behind its tenant."""

    kind: int
    sequence_id: int = 0
    child_id: int = 0
    number: int = 0
    num_spans: int = 0
    columns: bytes = b""


def sequence_fields(request: SequenceRequest) -> SequenceFields:
    """The fields of a request about sequences."""
    match request:
        case OpenSequences(sequence_ids=ids, lease_seconds=leases):
            return SequenceFields(layout.OPEN, num_spans=len(ids), columns=np.array((ids, leases), "<u8").tobytes())
        case CloseSequences(sequence_ids=ids):
            return SequenceFields(layout.CLOSE, num_spans=len(ids), columns=np.array(ids, "<u8").tobytes())
        case ForkSequence():
            return SequenceFields(layout.FORK, request.parent_id, request.child_id, request.length)
        case TruncateSequence():
            return SequenceFields(layout.TRUNCATE, request.sequence_id, number=request.length)
        case GetSequence():
            return SequenceFields(layout.GET, request.sequence_id)


def _write_sequences(segment: Segment, begin: int, tenant_bytes: int, request: SequenceRequest) -> Numbers:
    *numbers, columns = sequence_fields(request)
    at = begin + _columns_at(tenant_bytes)
    segment.memory[at : at + len(columns)] = columns
    return dict(zip(SequenceFields._fields, numbers, strict=False))


def read_answer_slot(segment: Segment, slot: int) -> AnswerSlot:
    """The numbers of an answer.

    Raises:
        RingError: what it carries is not in the arena, or its phase is none.
    """
    numbers = AnswerSlot._make(ANSWER_STRUCT.unpack_from(segment.memory, slot))
    if numbers.payload_offset + numbers.payload_bytes > segment.answer_arena_bytes:
        raise RingError(
            f"answer: {numbers.payload_bytes} bytes at {numbers.payload_offset} are not in an arena of "
            f"{segment.answer_arena_bytes}"
        )
    if not 1 <= numbers.phase <= len(PHASES):
        raise RingError(f"answer: phase must be 1 to {len(PHASES)}, got {numbers.phase}")
    return numbers


def phase_of(numbers: AnswerSlot) -> Phase:
    """What the request came to."""
    return PHASES[numbers.phase - 1]


def stage_seconds_of(numbers: AnswerSlot) -> dict[Stage, float]:
    """Seconds in each stage that the request reached."""
    return {stage: seconds for stage, seconds in zip(STAGES, numbers[-len(STAGES) :], strict=True) if seconds >= 0}


def read_answer(numbers: AnswerSlot, payload: NDArray[np.uint8]) -> Answer | BlockdexError:
    """The answer of a slot; its arrays are views of what it carries.

    Args:
        numbers: of its slot.
        payload: uint8 `[payload_bytes]`.
    """
    if numbers.code:
        reason, text = payload[: numbers.reason_bytes].tobytes(), payload[numbers.reason_bytes :].tobytes()
        message, *metadata = text.decode("utf-8", "replace").split("\0")
        named = (each.partition("=") for each in metadata)
        return error_of(numbers.code, message, reason.decode(), {name: value for name, _, value in named})
    if numbers.flags & layout.IS_STATE:
        if not numbers.flags & layout.HAS_LENGTHS:
            return SequenceState(numbers.epoch)
        layers = 8 * numbers.num_layers
        revisions = payload[aligned(layers) : aligned(layers) + layers]
        return SequenceState(numbers.epoch, payload[:layers].view("<i8"), revisions.view("<u8"))
    if not numbers.flags & layout.HAS_BLOCK_IDS:
        return TokenAnswer(numbers.epoch)
    shape = (numbers.num_tokens, numbers.num_heads, numbers.topk)
    size = 4 * numbers.num_tokens * numbers.num_heads * numbers.topk
    block_ids = payload[:size].view("<i4").reshape(shape)
    if not numbers.flags & layout.HAS_SCORES:
        return TokenAnswer(numbers.epoch, block_ids)
    scores = payload[aligned(size) : aligned(size) + size].view("<f4").reshape(shape)
    return TokenAnswer(numbers.epoch, block_ids, scores)
