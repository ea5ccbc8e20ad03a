"""A frontend's side of a ring in Python: plain messages, their way into slots, and answers out of them.

The service itself writes and reads token requests in C alone (`csrc/wire`, `csrc/ring`); this is for those who ask an
engine without a server round it: benchmarks and tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import FloatDtype, Order, SequenceRequest, SequenceState
from blockdex.ring import layout
from blockdex.ring.codec import read_error, read_state, sequence_fields
from blockdex.ring.layout import ANSWER_STRUCT, DTYPES, ORDERS, REQUEST_STRUCT, AnswerSlot, RequestSlot, aligned
from blockdex.ring.segment import Segment


@dataclass(frozen=True, slots=True)
class Spans:
    """Runs of consecutive tokens, one a sequence, as packed columns of N rows.

    Attributes:
        sequence_ids: uint64 `[N]`, no two alike.
        starts: int64 `[N]`, position of each run's first token.
        lengths: int64 `[N]`, tokens of each run, at least 1.
        revisions: uint64 `[N]`, 0 where unchecked.
    """

    sequence_ids: NDArray[np.uint64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    revisions: NDArray[np.uint64]

    @property
    def num_tokens(self) -> int:
        """T, rows of a packed tensor beside the spans."""
        return int(self.lengths.sum())


@dataclass(frozen=True, slots=True)
class TensorData:
    """Elements of a tensor as they came, little-endian and row-major; the shape follows from the message around it."""

    dtype: FloatDtype
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Keys:
    """The appending half of a request: `[T, D]`; `rollback` says that it may start before the ends of its layers."""

    tensor: TensorData
    rollback: bool = False


@dataclass(frozen=True, slots=True)
class Queries:
    """The selecting half of a request: `[T, num_heads, D]`, heads `first_head` to `first_head + num_heads - 1`.

    `raw_scores` has the scores that `return_scores` asks for as they rank, unscaled and those of forced blocks too;
    `pages` has page numbers of the pool stand for block ids.
    """

    tensor: TensorData
    first_head: int
    num_heads: int
    order: Order
    return_scores: bool
    wait_for_keys: bool
    raw_scores: bool = False
    pages: bool = False


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """AppendKeys (keys alone), SelectBlocks (queries alone) or AppendAndSelect (both) for the tokens of the spans.

    With a pool these are of its rows.
    """

    tenant: str
    epoch: int
    layer: int
    spans: Spans
    keys: Keys | None
    queries: Queries | None
    pool_id: int = 0


Request = SequenceRequest | TokenRequest


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """Answer to a token request: int32 and float32 `[T, num_heads, topk]`, None where not asked for."""

    epoch: int
    block_ids: NDArray[np.int32] | None = None
    scores: NDArray[np.float32] | None = None


Answer = SequenceState | TokenAnswer
Payload = tuple[tuple[int, bytes | memoryview], ...]
"""What a request carries behind its tenant: parts and where each begins."""


Places = Mapping[str, tuple[int, int]]
"""Tensors of a token request (`keys`, `queries`, `block_ids`, `scores`) that lie in regions: number and offset."""


def request_bytes(request: Request) -> int:
    """Bytes of what a request carries, where it names no region."""
    return _end(request, _parts(request, {})[1])


def write_request(
    segment: Segment,
    slot: int,
    offset: int,
    ticket: int,
    request: Request,
    received: float,
    deadline: float,
    places: Places = MappingProxyType({}),
) -> None:
    """Writes a request into its slot, and what it carries to an offset of the requests' arena.

    What has a place in a region is named, and left for the caller to write.
    """
    numbers, parts = _parts(request, places)
    begin = segment.request_arena_offset + offset
    for at, part in ((0, request.tenant.encode("ascii")), *parts):
        segment.memory[begin + at : begin + at + len(part)] = part
    numbers |= {
        "ticket": ticket,
        "tenant_bytes": len(request.tenant),
        "epoch": request.epoch,
        "received": round(received * 1e9),
        "deadline": round(deadline * 1e9),
        "payload_offset": offset,
        "payload_bytes": _end(request, parts),
    }
    REQUEST_STRUCT.pack_into(segment.memory, slot, *RequestSlot(**numbers))


def columns_at(tenant_bytes: int) -> int:
    """Where columns begin in what a request carries; the tenant comes first."""
    return -(-tenant_bytes // 8) * 8


def _end(request: Request, parts: Payload) -> int:
    return max((at + len(part) for at, part in parts), default=len(request.tenant))


def _parts(request: Request, places: Places) -> tuple[dict[str, int], Payload]:
    """The numbers of a request's slot that are its own, and what it carries."""
    at = columns_at(len(request.tenant))
    if isinstance(request, TokenRequest):
        return _token_parts(request, at, places)
    fields = sequence_fields(request)._asdict()
    columns = fields.pop("columns")
    return fields, ((at, columns),) if fields["num_spans"] else ()


def _token_parts(request: TokenRequest, at: int, places: Places) -> tuple[dict[str, int], Payload]:
    spans, keys, queries = request.spans, request.keys, request.queries
    numbers = {"kind": layout.TOKENS, "layer": request.layer, "num_spans": len(spans.lengths), "flags": 0}
    numbers["sequence_id"] = request.pool_id
    columns = b"".join(
        column.tobytes() for column in (spans.sequence_ids, spans.starts, spans.lengths, spans.revisions)
    )
    keys_at = aligned(at + len(columns))
    keys_data = b"" if keys is None else keys.tensor.data
    queries_data = b"" if queries is None else queries.tensor.data
    if keys is not None:
        numbers |= {"keys_dtype": DTYPES.index(keys.tensor.dtype) + 1, "keys_bytes": len(keys_data)}
        numbers["flags"] |= layout.ROLLBACK * keys.rollback
    if queries is not None:
        numbers |= {
            "queries_dtype": DTYPES.index(queries.tensor.dtype) + 1,
            "queries_bytes": len(queries_data),
            "order": ORDERS.index(queries.order) + 1,
            "first_head": queries.first_head,
            "num_heads": queries.num_heads,
        }
        numbers["flags"] |= layout.RETURN_SCORES * queries.return_scores
        numbers["flags"] |= layout.WAIT_FOR_KEYS * queries.wait_for_keys
        numbers["flags"] |= layout.RAW_SCORES * queries.raw_scores
        numbers["flags"] |= layout.PAGES * queries.pages
    for name, (region, offset) in places.items():
        numbers |= {f"{name}_region": region, f"{name}_offset": offset}
    keys_data, queries_data = (
        b"" if name in places else data for name, data in (("keys", keys_data), ("queries", queries_data))
    )
    return numbers, ((at, columns), (keys_at, keys_data), (keys_at + aligned(len(keys_data)), queries_data))


def read_answer(
    segment: Segment, slot: int, regions: Mapping[str, NDArray[np.uint8]] = MappingProxyType({})
) -> tuple[AnswerSlot, Answer | BlockdexError]:
    """The numbers of an answer's slot, and the answer, a copy.

    Args:
        segment: of the link.
        slot: offset of the answer's slot.
        regions: bytes of `block_ids`, `scores` that went to a region.
    """
    numbers = AnswerSlot._make(ANSWER_STRUCT.unpack_from(segment.memory, slot))
    assert numbers.payload_offset + numbers.payload_bytes <= segment.answer_arena_bytes, numbers
    begin = segment.answer_arena_offset + numbers.payload_offset
    payload = np.frombuffer(segment.memory, np.uint8, numbers.payload_bytes, begin).copy()
    if numbers.code:
        return numbers, read_error(numbers, payload)
    if numbers.flags & layout.IS_STATE:
        return numbers, read_state(numbers, payload)
    if not numbers.flags & layout.HAS_BLOCK_IDS:
        return numbers, TokenAnswer(numbers.epoch)
    shape = (numbers.num_tokens, numbers.num_heads, numbers.topk)
    size = 4 * numbers.num_tokens * numbers.num_heads * numbers.topk
    if "block_ids" in regions:
        payload = np.concatenate((regions["block_ids"][:size], np.zeros(aligned(size) - size, np.uint8), payload))
    block_ids = payload[:size].view("<i4").reshape(shape)
    if not numbers.flags & layout.HAS_SCORES:
        return numbers, TokenAnswer(numbers.epoch, block_ids)
    scores_data = regions["scores"][:size].copy() if "scores" in regions else payload[aligned(size) :][:size]
    scores = scores_data.view("<f4").reshape(shape)
    return numbers, TokenAnswer(numbers.epoch, block_ids, scores)
