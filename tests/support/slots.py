"""The engine's side of slots, in Python: requests out of them, answers into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.ring_messages import (
    Answer,
    Keys,
    Queries,
    Spans,
    TensorData,
    TokenRequest,
    columns_at,
)
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import PHASES, STAGES, GetSequence, Phase, SequenceState, Stage
from blockdex.ring import layout
from blockdex.ring.layout import ANSWER_STRUCT, DTYPES, ORDERS, REQUEST_STRUCT, AnswerSlot, RequestSlot, aligned
from blockdex.ring.segment import Segment

_COLUMNS = 4
_FLAGS = layout.RETURN_SCORES | layout.WAIT_FOR_KEYS | layout.ROLLBACK | layout.RAW_SCORES


class Received(NamedTuple):
    """A request as it came off the ring.

    Attributes:
        ticket: what its answer is to carry; of a cancellation, what the request to give up carried.
        request: None for a cancellation.
        received: seconds of `time.monotonic` of its arrival at the frontend.
    """

    ticket: int
    request: TokenRequest | GetSequence | None
    received: float


def read_request(segment: Segment, slot: int) -> Received:
    """The request in a slot: of tokens, of a sequence's state, or a cancellation."""
    numbers = RequestSlot._make(REQUEST_STRUCT.unpack_from(segment.memory, slot))
    if numbers.kind == layout.CANCEL:
        return Received(numbers.ticket, None, 0.0)
    offset, size = numbers.payload_offset, numbers.payload_bytes
    assert offset % layout.ALIGNMENT == 0 and offset + size <= segment.request_arena_bytes, numbers
    begin = segment.request_arena_offset + offset
    payload = bytes(segment.memory[begin : begin + size])
    tenant = payload[: numbers.tenant_bytes].decode("ascii")
    request: TokenRequest | GetSequence
    if numbers.kind == layout.TOKENS:
        request = _read_tokens(payload, tenant, numbers)
    else:
        assert numbers.kind == layout.GET, numbers
        request = GetSequence(tenant, numbers.epoch, numbers.sequence_id)
    return Received(numbers.ticket, request, numbers.received / 1e9)


def _read_tokens(payload: bytes, tenant: str, numbers: RequestSlot) -> TokenRequest:
    num_spans, begin = numbers.num_spans, columns_at(len(tenant))
    keys_at = aligned(begin + 8 * _COLUMNS * num_spans)
    queries_at = keys_at + aligned(numbers.keys_bytes)
    assert queries_at + numbers.queries_bytes == numbers.payload_bytes and not numbers.flags & ~_FLAGS, numbers
    ids, starts, lengths, revisions = np.frombuffer(payload, "<u8", _COLUMNS * num_spans, begin).reshape(_COLUMNS, -1)
    keys = queries = None
    if numbers.keys_dtype:
        data = payload[keys_at : keys_at + numbers.keys_bytes]
        keys = Keys(TensorData(DTYPES[numbers.keys_dtype - 1], data), bool(numbers.flags & layout.ROLLBACK))
    if numbers.queries_dtype:
        queries = Queries(
            tensor=TensorData(DTYPES[numbers.queries_dtype - 1], payload[queries_at:]),
            first_head=numbers.first_head,
            num_heads=numbers.num_heads,
            order=ORDERS[numbers.order - 1],
            return_scores=bool(numbers.flags & layout.RETURN_SCORES),
            wait_for_keys=bool(numbers.flags & layout.WAIT_FOR_KEYS),
            raw_scores=bool(numbers.flags & layout.RAW_SCORES),
        )
    spans = Spans(ids, starts.view(np.int64), lengths.view(np.int64), revisions)
    return TokenRequest(tenant, numbers.epoch, numbers.layer, spans, keys, queries)


def _contents(answer: Answer | BlockdexError) -> tuple[dict[str, int], tuple[NDArray[np.generic], ...]]:
    """The numbers of an answer, and what it carries: arrays one behind the other, each aligned."""
    if isinstance(answer, BlockdexError):
        reason = str(answer.reason).encode()
        message = "\0".join((answer.message, *(f"{name}={value}" for name, value in answer.metadata.items())))
        text = np.frombuffer(reason + message.encode(), np.uint8)
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


def write_answer(
    segment: Segment,
    slot: int,
    ticket: int,
    answer: Answer | BlockdexError,
    phase: Phase,
    stage_seconds: Mapping[Stage, float],
    offset: int,
) -> None:
    """Writes an answer into its slot, and what it carries to an offset of the answers' arena."""
    numbers, columns = _contents(answer)
    begin = ended = segment.answer_arena_offset + offset
    for column in columns:
        at = aligned(ended)
        np.ndarray(column.shape, column.dtype, segment.memory, at)[...] = column
        ended = at + column.nbytes
    end = offset + sum(aligned(column.nbytes) for column in columns)
    carried = {"payload_offset": offset, "payload_bytes": ended - begin, "payload_end": end}
    slot_numbers = AnswerSlot(ticket=ticket, phase=PHASES.index(phase) + 1, **numbers, **carried)[: -len(STAGES)]
    ANSWER_STRUCT.pack_into(segment.memory, slot, *slot_numbers, *(stage_seconds.get(stage, -1.0) for stage in STAGES))
