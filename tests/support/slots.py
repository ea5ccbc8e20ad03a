"""The engine's side of messages through a segment, in Python: requests out of slots, answers into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockdex.contract.errors import BlockdexError, InvalidArgumentError, Reason, UnimplementedError
from blockdex.contract.messages import (
    PHASES,
    STAGES,
    Answer,
    CloseSequences,
    ForkSequence,
    GetSequence,
    Keys,
    OpenSequences,
    Phase,
    Queries,
    Request,
    SequenceRequest,
    SequenceState,
    Spans,
    Stage,
    TensorData,
    TokenRequest,
    TruncateSequence,
)
from blockdex.ring import layout
from blockdex.ring.codec import (
    Numbers,
    _columns_at,
    _parts,
    phase_of,
    read_answer,
    read_answer_slot,
    request_bytes,
    stage_seconds_of,
    write_request,
)
from blockdex.ring.layout import (
    ALIGNMENT,
    ANSWER_STRUCT,
    DTYPES,
    ORDERS,
    REQUEST_STRUCT,
    AnswerSlot,
    RequestSlot,
    aligned,
)
from blockdex.ring.segment import RingError, Segment

__all__ = [
    "Received",
    "answer_bytes",
    "columns_of",
    "phase_of",
    "read_answer",
    "read_answer_slot",
    "read_request",
    "request_bytes",
    "stage_seconds_of",
    "write_answer",
    "write_request",
]

_PHASE_NUMBERS = {phase: number for number, phase in enumerate(PHASES, start=1)}
_COLUMNS = 4
_MAX_MESSAGE_BYTES = 4096
_FLAGS = layout.RETURN_SCORES | layout.WAIT_FOR_KEYS | layout.ROLLBACK | layout.RAW_SCORES

Columns = tuple[NDArray[np.generic], ...]
"""What an answer carries: arrays one behind the other, each aligned."""


class Received(NamedTuple):
    """A request as it came off the ring.

    Attributes:
        ticket: what its answer is to carry; of a cancellation, what the request to give up carried.
        request: None for a cancellation.
        received: seconds of `time.monotonic` of its arrival at the frontend.
        deadline: the same, after which it is dropped.
        refused: what no engine of this version can do for it.
    """

    ticket: int
    request: Request | None
    received: float
    deadline: float
    refused: BlockdexError | None = None


def read_request(segment: Segment, slot: int, link_tenant: str = "") -> Received:
    """The request in a slot. Its columns are copied, so that nobody changes them any more; its tensors are views.

    Args:
        segment: the shared memory.
        slot: offset of the slot.
        link_tenant: of all requests of the link; without one each names its own.

    Raises:
        RingError: it names memory that is not its own, or numbers that mean nothing.
    """
    numbers = RequestSlot._make(REQUEST_STRUCT.unpack_from(segment.memory, slot))
    if numbers.kind == layout.CANCEL:
        return Received(numbers.ticket, None, 0.0, 0.0)
    offset, size, room = numbers.payload_offset, numbers.payload_bytes, segment.request_arena_bytes
    if offset % ALIGNMENT or offset + size > room:
        raise RingError(f"request: {size} bytes at {offset} are not in an arena of {room}")
    if numbers.tenant_bytes > size:
        raise RingError(f"request: a tenant of {numbers.tenant_bytes} bytes in {size}")
    begin = segment.request_arena_offset + offset
    named = str(segment.memory[begin : begin + numbers.tenant_bytes], "ascii", "replace")
    tenant = link_tenant or named
    refused = _refusal(numbers, link_tenant, named)
    request: Request
    if numbers.kind == layout.TOKENS:
        request = _read_tokens(segment, begin, tenant, numbers)
    else:
        request = _sequence_request(segment, begin, tenant, numbers)
    return Received(numbers.ticket, request, numbers.received / 1e9, numbers.deadline / 1e9, refused)


def _refusal(numbers: RequestSlot, link_tenant: str, named: str) -> BlockdexError | None:
    if link_tenant and named:
        words = f"tenant: the link's is {link_tenant!r}, a request of it names none, got {named!r}"
        return InvalidArgumentError(words, Reason.INVALID_TENANT)
    for source in ("keys", "queries", "block_ids", "scores"):
        if region := getattr(numbers, f"{source}_region"):
            words = f"{source}_region: the link shares no regions, got {region}"
            return UnimplementedError(words, Reason.REGION_UNSUPPORTED)
    return None


def _read_tokens(segment: Segment, begin: int, tenant: str, numbers: RequestSlot) -> TokenRequest:
    num_spans, keys_bytes, queries_bytes = numbers.num_spans, numbers.keys_bytes, numbers.queries_bytes
    columns_at, keys_at, queries_at = _parts(numbers.tenant_bytes, num_spans, keys_bytes)
    if queries_at + queries_bytes != numbers.payload_bytes:
        raise RingError(f"request: its parts take {queries_at + queries_bytes} bytes, got {numbers.payload_bytes}")
    word = (begin + columns_at) // 8
    columns = segment.words[word : word + _COLUMNS * num_spans].copy()
    positions = columns[num_spans : 3 * num_spans].view(np.int64)
    spans = Spans(columns[:num_spans], positions[:num_spans], positions[num_spans:], columns[3 * num_spans :])
    if numbers.flags & ~_FLAGS:
        raise RingError(f"request: flags must be 0 to {_FLAGS}, got {numbers.flags}")
    if (keys_bytes and not numbers.keys_dtype) or (queries_bytes and not numbers.queries_dtype):
        raise RingError(f"request: {keys_bytes} bytes of keys and {queries_bytes} of queries, one without a dtype")
    keys = queries = None
    if numbers.keys_dtype:
        tensor = _tensor(segment, numbers.keys_dtype, begin + keys_at, keys_bytes)
        keys = Keys(tensor, rollback=bool(numbers.flags & layout.ROLLBACK))
    if numbers.queries_dtype:
        if not 1 <= numbers.order <= len(ORDERS):
            raise RingError(f"request: order must be 1 to {len(ORDERS)}, got {numbers.order}")
        queries = Queries(
            tensor=_tensor(segment, numbers.queries_dtype, begin + queries_at, queries_bytes),
            first_head=numbers.first_head,
            num_heads=numbers.num_heads,
            order=ORDERS[numbers.order - 1],
            return_scores=bool(numbers.flags & layout.RETURN_SCORES),
            wait_for_keys=bool(numbers.flags & layout.WAIT_FOR_KEYS),
            raw_scores=bool(numbers.flags & layout.RAW_SCORES),
        )
    return TokenRequest(tenant, numbers.epoch, numbers.layer, spans, keys, queries)


def _tensor(segment: Segment, dtype: int, begin: int, num_bytes: int) -> TensorData:
    if dtype > len(DTYPES):
        raise RingError(f"request: dtype must be 1 to {len(DTYPES)}, got {dtype}")
    return TensorData(DTYPES[dtype - 1], segment.memory[begin : begin + num_bytes])


def _sequence_request(segment: Segment, begin: int, tenant: str, numbers: RequestSlot) -> SequenceRequest:
    epoch, sequence_id, number = numbers.epoch, numbers.sequence_id, numbers.number
    match numbers.kind:
        case layout.OPEN:
            return OpenSequences(tenant, epoch, *_read_columns(segment, begin, numbers, 2))
        case layout.GET:
            return GetSequence(tenant, epoch, sequence_id)
        case layout.FORK:
            return ForkSequence(tenant, epoch, sequence_id, numbers.child_id, number)
        case layout.TRUNCATE:
            return TruncateSequence(tenant, epoch, sequence_id, number)
        case layout.CLOSE:
            return CloseSequences(tenant, epoch, *_read_columns(segment, begin, numbers, 1))
        case _:
            raise RingError(f"request: kind must be {layout.OPEN} to {layout.CANCEL}, got {numbers.kind}")


def _read_columns(segment: Segment, begin: int, numbers: RequestSlot, count: int) -> list[tuple[int, ...]]:
    num_rows, columns_at = numbers.num_spans, _columns_at(numbers.tenant_bytes)
    if columns_at + 8 * count * num_rows != numbers.payload_bytes:
        parts = columns_at + 8 * count * num_rows
        raise RingError(f"request: its parts take {parts} bytes, got {numbers.payload_bytes}")
    word = (begin + columns_at) // 8
    columns = segment.words[word : word + count * num_rows].tolist()
    return [tuple(columns[column * num_rows : (column + 1) * num_rows]) for column in range(count)]


def columns_of(answer: Answer | BlockdexError) -> tuple[Numbers, Columns]:
    """The numbers of an answer, and what it carries."""
    if isinstance(answer, BlockdexError):
        reason = str(answer.reason).encode()
        message = "\0".join((answer.message, *(f"{name}={value}" for name, value in answer.metadata.items())))
        text = np.frombuffer(reason + message.encode()[:_MAX_MESSAGE_BYTES], np.uint8)
        return {"code": int(answer.code), "reason_bytes": len(reason)}, (text,)
    numbers = {"epoch": answer.epoch}
    if isinstance(answer, SequenceState):
        if answer.lengths is None or answer.revisions is None:
            return numbers | {"flags": layout.IS_STATE}, ()
        flags = layout.IS_STATE | layout.HAS_LENGTHS
        return numbers | {"flags": flags, "num_layers": len(answer.lengths)}, (answer.lengths, answer.revisions)
    if answer.block_ids is None:
        return numbers, ()
    num_tokens, num_heads, topk = answer.block_ids.shape
    numbers |= {"num_tokens": num_tokens, "num_heads": num_heads, "topk": topk, "flags": layout.HAS_BLOCK_IDS}
    if answer.scores is None:
        return numbers, (answer.block_ids,)
    return numbers | {"flags": layout.HAS_BLOCK_IDS | layout.HAS_SCORES}, (answer.block_ids, answer.scores)


def answer_bytes(columns: Columns) -> int:
    """Bytes of what an answer carries."""
    return sum(aligned(column.nbytes) for column in columns)


def write_answer(
    segment: Segment,
    slot: int,
    ticket: int,
    numbers: Numbers,
    columns: Columns,
    phase: Phase,
    stage_seconds: Mapping[Stage, float],
    place: tuple[int, int],
) -> None:
    """Writes an answer into its slot, and what it carries to its place in the answers' arena: offset and end."""
    offset, end = place
    begin = ended = segment.answer_arena_offset + offset
    for column in columns:
        at = aligned(ended)
        np.ndarray(column.shape, column.dtype, segment.memory, at)[...] = column
        ended = at + column.nbytes
    carried = {"ticket": ticket, "payload_offset": offset, "payload_bytes": ended - begin, "payload_end": end}
    carried["phase"] = _PHASE_NUMBERS[phase]
    slot_numbers = AnswerSlot(**numbers, **carried)[: -len(STAGES)]
    ANSWER_STRUCT.pack_into(segment.memory, slot, *slot_numbers, *(stage_seconds.get(stage, -1.0) for stage in STAGES))
