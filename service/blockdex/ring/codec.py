"""Messages in and out of a segment: what the frontend and the engine write there and read there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockdex.contract.errors import BlockdexError, InvalidArgumentError, Reason, UnimplementedError, error_of
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
    TokenAnswer,
    TokenRequest,
    TruncateSequence,
)
from blockdex.ring import layout
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

_DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(DTYPES, start=1)}
_PHASE_NUMBERS = {phase: number for number, phase in enumerate(PHASES, start=1)}
_ORDER_NUMBERS = {order: number for number, order in enumerate(ORDERS, start=1)}
_KINDS: dict[type, int] = {
    OpenSequences: layout.OPEN,
    GetSequence: layout.GET,
    TruncateSequence: layout.TRUNCATE,
    CloseSequences: layout.CLOSE,
}
_COLUMNS = 4
_FLAGS = layout.RETURN_SCORES | layout.WAIT_FOR_KEYS | layout.ROLLBACK | layout.RAW_SCORES
_MAX_MESSAGE_BYTES = 4096


Numbers = dict[str, int]
"""Numbers of a slot, by name; those left out keep their default."""

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
        columns = _sequence_columns(request)
        return _columns_at(len(request.tenant)) + 8 * sum(map(len, columns)) if columns else len(request.tenant)
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


def _sequence_columns(request: SequenceRequest) -> tuple[tuple[int, ...], ...]:
    """What a request on several sequences carries besides the tenant."""
    match request:
        case OpenSequences(sequence_ids=sequence_ids, lease_seconds=lease_seconds):
            return sequence_ids, lease_seconds
        case CloseSequences(sequence_ids=sequence_ids):
            return (sequence_ids,)
        case _:
            return ()


def _write_sequences(segment: Segment, begin: int, tenant_bytes: int, request: SequenceRequest) -> Numbers:
    word = (begin + _columns_at(tenant_bytes)) // 8
    for column in _sequence_columns(request):
        segment.words[word : word + len(column)] = column
        word += len(column)
    if isinstance(request, ForkSequence):
        ids = {"sequence_id": request.parent_id, "child_id": request.child_id}
        return {"kind": layout.FORK, "number": request.length} | ids
    numbers = {"kind": _KINDS[type(request)]}
    if isinstance(request, OpenSequences | CloseSequences):
        return numbers | {"num_spans": len(request.sequence_ids)}
    numbers["sequence_id"] = request.sequence_id
    if isinstance(request, TruncateSequence):
        return numbers | {"number": request.length}
    return numbers


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
