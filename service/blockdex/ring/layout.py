"""The shared memory between a client and the engine, byte by byte; `docs/ring.md` shows the same tables."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from blockdex.contract.messages import PHASES, FloatDtype, Order

MAGIC = int.from_bytes(b"BLKDXRNG", "little")
VERSION = 3
HEADER_BYTES = 4096
MAX_TENANT_BYTES = 256
MAX_REFUSAL_BYTES = 512
SLOT_BYTES = 256
ALIGNMENT = 64
"""Of tensors and payloads: a cache line."""


class Field(NamedTuple):
    """A number in a record: its name, its offset in bytes and its `struct` code."""

    name: str
    offset: int
    code: str

    @property
    def size(self) -> int:
        """Bytes."""
        return Struct(f"<{self.code}").size


def _packed(*fields: tuple[str, str]) -> tuple[Field, ...]:
    """Fields one behind the other."""
    placed: list[Field] = []
    offset = 0
    for name, code in fields:
        placed.append(Field(name, offset, code))
        offset += placed[-1].size
    return tuple(placed)


def _struct(fields: Sequence[Field]) -> Struct:
    return Struct("<" + "".join(field.code for field in fields))


HEADER = (
    *_packed(
        ("magic", "Q"),
        ("version", "I"),
        ("slot_bytes", "I"),
        ("request_slots", "I"),
        ("answer_slots", "I"),
        ("epoch", "Q"),
        ("request_slots_offset", "Q"),
        ("answer_slots_offset", "Q"),
        ("request_arena_offset", "Q"),
        ("request_arena_bytes", "Q"),
        ("answer_arena_offset", "Q"),
        ("answer_arena_bytes", "Q"),
        ("segment_bytes", "Q"),
    ),
    # What one side writes while the other reads it, each on cache lines of its own (two: they are fetched in pairs).
    Field("requests_written", 128, "Q"),
    Field("requests_read", 256, "Q"),
    Field("answers_written", 384, "Q"),
    Field("answers_read", 512, "Q"),
    Field("answer_bytes_freed", 640, "Q"),
    Field("engine_sleeps", 768, "I"),
    Field("client_sleeps", 896, "I"),
    Field("engine_waits_for_room", 1024, "I"),
    Field("channel_error", 1152, "I"),
)
AT = {field.name: field.offset for field in HEADER}
HELLO_STRUCT = Struct("<QII")
"""What a client says first: magic, version, bytes of the tenant that follows."""
GREETING_STRUCT = Struct("<QII")
"""What the engine answers: magic, version, bytes of the refusal that follows; 0: files come with it."""
HEADER_STRUCT = _struct(HEADER[: [field.name for field in HEADER].index("requests_written")])


class RequestSlot(NamedTuple):
    """The numbers of a request; `docs/ring.md` says what each of them means."""

    ticket: int = 0
    kind: int = 0
    keys_dtype: int = 0
    queries_dtype: int = 0
    order: int = 0
    flags: int = 0
    tenant_bytes: int = 0
    epoch: int = 0
    received: int = 0
    deadline: int = 0
    layer: int = 0
    num_spans: int = 0
    first_head: int = 0
    num_heads: int = 0
    sequence_id: int = 0
    child_id: int = 0
    number: int = 0
    payload_offset: int = 0
    payload_bytes: int = 0
    keys_bytes: int = 0
    queries_bytes: int = 0
    keys_region: int = 0
    queries_region: int = 0
    block_ids_region: int = 0
    scores_region: int = 0
    keys_offset: int = 0
    queries_offset: int = 0
    block_ids_offset: int = 0
    scores_offset: int = 0


REQUEST = _packed(*zip(RequestSlot._fields, "QHBBBBHQqqIIIIQQQQQQQIIIIQQQQ", strict=True))
REQUEST_STRUCT = _struct(REQUEST)


class AnswerSlot(NamedTuple):
    """The numbers of an answer; `docs/ring.md` says what each of them means."""

    ticket: int = 0
    code: int = 0
    reason_bytes: int = 0
    flags: int = 0
    epoch: int = 0
    payload_offset: int = 0
    payload_bytes: int = 0
    payload_end: int = 0
    num_tokens: int = 0
    num_heads: int = 0
    topk: int = 0
    num_layers: int = 0
    phase: int = PHASES.index("sequence") + 1
    queue_seconds: float = -1.0
    plan_seconds: float = -1.0
    device_seconds: float = -1.0
    reply_seconds: float = -1.0


ANSWER = _packed(*zip(AnswerSlot._fields, "QHHIQQQQIIIIQdddd", strict=True))
ANSWER_STRUCT = _struct(ANSWER)

OPEN, GET, FORK, TRUNCATE, CLOSE, TOKENS, CANCEL, CREATE_POOL, SET_PAGE_TABLES, CLOSE_POOL = range(1, 11)
"""Kinds of requests."""

DTYPES: tuple[FloatDtype, ...] = ("bf16", "fp16", "fp32", "fp8_e4m3")
"""Dtypes by number, from 1 on, as the wire contract numbers them; 0: no such tensor."""

ORDERS: tuple[Order, ...] = ("ascending", "score")
"""Orders by number, from 1 on, as the wire contract numbers them."""

RETURN_SCORES, WAIT_FOR_KEYS, ROLLBACK, RAW_SCORES, PAGES = 1, 2, 4, 8, 16
"""Flags of a request."""

HAS_BLOCK_IDS, HAS_SCORES, HAS_LENGTHS, IS_STATE = 1, 2, 4, 8
"""Flags of an answer."""


def aligned(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
