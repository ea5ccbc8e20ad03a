"""A compiled client's side of a link, and a core at the other end that does what the test says."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.ring_messages import Answer, TokenRequest
from blockdex._native import SENT
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import Limits
from blockdex.ring import layout
from blockdex.ring.caller import RPCS
from blockdex.ring.layout import ANSWER_STRUCT, AT, REQUEST_STRUCT, RequestSlot
from blockdex.ring.segment import Segment, Sizes
from blockdex.v1 import indexer_pb2 as pb
from blockdex_kernels import IndexSpec
from support import slots
from support.links import link_of

SPEC = IndexSpec(num_layers=3, num_index_heads=4, head_dim=4, topk=4, max_sequence_tokens=300)
LIMITS = Limits(max_message_bytes=2000, max_spans=6, max_queued_requests=8, max_stream_requests=4, max_wait_ms=7000)
SLOTS, ROOM = 8, 1 << 14
ME = object()
TENANT = "tenant"
GET_RPC = RPCS.index("GetSequence")
KINDS = (pb.AppendKeysRequest, pb.SelectBlocksRequest, pb.AppendAndSelectRequest)
NAMES = ("append_keys", "select_blocks", "append_and_select")
DTYPE_NAMES = dict(enumerate(layout.DTYPES, start=1))
LARGE = 1 << 22
ROOMY: dict[str, Any] = {"requests": 3 * LARGE, "max_waiting": 100, "max_message_bytes": LARGE}


class Core:
    """The engine's side of a link, by `slots`."""

    def __init__(
        self,
        requests: int = ROOM,
        slots: int = SLOTS,
        max_waiting: int = LIMITS.max_queued_requests,
        max_message_bytes: int = LIMITS.max_message_bytes,
        **options: Any,
    ) -> None:
        self.segment = Segment.create(Sizes(slots, requests, ROOM), epoch=1)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        limits = replace(LIMITS, max_queued_requests=max_waiting, max_message_bytes=max_message_bytes)
        self.link = link_of(self.segment, self.bell, spec=SPEC, limits=limits, **options)
        self.answered = 0
        self.epoll = select.epoll()
        self.epoll.register(self.bell, select.EPOLLIN)

    def close(self) -> None:
        self.epoll.close()
        os.close(self.segment.fd)
        os.close(self.bell)

    @property
    def written(self) -> int:
        return self.segment.counters[AT["requests_written"] // 8]

    def slot(self, number: int) -> int:
        return int(self.segment.request_slots_offset + number % self.segment.request_slots * layout.SLOT_BYTES)

    def numbers(self, number: int) -> RequestSlot:
        return RequestSlot._make(REQUEST_STRUCT.unpack_from(self.segment.memory, self.slot(number)))

    def take(self) -> slots.Received:
        """The oldest request."""
        read = self.segment.counters[AT["requests_read"] // 8]
        assert read < self.written
        received = slots.read_request(self.segment, self.slot(read))
        self.segment.counters[AT["requests_read"] // 8] = read + 1
        return received

    def answer(self, ticket: int, answer: Answer | BlockdexError, offset: int = 0) -> None:
        """Writes an answer, with its payload at an offset."""
        slot = self.segment.answer_slots_offset + self.answered % self.segment.answer_slots * layout.SLOT_BYTES
        slots.write_answer(self.segment, slot, ticket, answer, "decode", {"queue": 0.5}, offset)
        self.answered += 1
        self.segment.counters[AT["answers_written"] // 8] = self.answered

    def send(self, rpc: int, message: bytes, owner: object = ME, tenant: str = TENANT) -> Any:
        """As `ClientLink.send`, with one timeout."""
        return self.link.send(owner, rpc, tenant, 7.0, message)

    def ask(self, owner: object = ME, number: int = 0) -> Any:
        """Asks for the state of a sequence."""
        return self.link.send_sequence(owner, number, GET_RPC, TENANT, 7.0, layout.GET, 0, 5, 0, 0, 0, b"")

    def spoil(self, **numbers: int) -> None:
        """Changes numbers of the answer written last."""
        slot = self.segment.answer_slots_offset + (self.answered - 1) % self.segment.answer_slots * layout.SLOT_BYTES
        was = layout.AnswerSlot._make(ANSWER_STRUCT.unpack_from(self.segment.memory, slot))
        ANSWER_STRUCT.pack_into(self.segment.memory, slot, *was._replace(**numbers))


@contextmanager
def opened(**options: Any) -> Iterator[Core]:
    core = Core(**options)
    try:
        yield core
    finally:
        core.close()


def in_stream(kind: int, body: Any, number: int = 0, timeout_ms: int = 0) -> pb.StreamRequest:
    return pb.StreamRequest(request_id=number, timeout_ms=timeout_ms, **{NAMES[kind]: body})


def append(tokens: int = 2) -> pb.AppendKeysRequest:
    """A right one, of one sequence."""
    spans = pb.Spans(sequence_ids=[7], starts=[1], lengths=[tokens])
    return pb.AppendKeysRequest(layer=1, spans=spans, keys=pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(8 * tokens)))


def selection(tokens: int = 2, **fields: Any) -> pb.SelectBlocksRequest:
    """A right one, of one sequence and all heads."""
    queries = pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(4 * 8 * tokens))
    return pb.SelectBlocksRequest(spans=append(tokens).spans, queries=queries, **fields)


def large(number: int, sequence: int = 1) -> bytes:
    """An append of `LARGE` bytes, of a stream."""
    keys = pb.Tensor(dtype=pb.DTYPE_BF16, data=np.arange(LARGE // 4, dtype=np.uint32).tobytes())
    spans = pb.Spans(sequence_ids=[sequence], starts=[0], lengths=[LARGE // 8])
    return in_stream(0, pb.AppendKeysRequest(spans=spans, keys=keys), number).SerializeToString()


def said_by(body: Any) -> list[Any]:
    """All that a request says, to be compared; heads as a ring has them."""
    spans, count = body.spans, len(body.spans.sequence_ids)
    columns = [spans.sequence_ids, spans.starts, spans.lengths, spans.revisions or [0] * count]
    said: list[Any] = [TENANT, body.header.epoch, body.layer, *(list(column) for column in columns)]
    appends = "keys" in body.DESCRIPTOR.fields_by_name
    said.append((DTYPE_NAMES[body.keys.dtype], body.keys.data, body.rollback) if appends else None)
    if "queries" not in body.DESCRIPTOR.fields_by_name:
        return [*said, None]
    heads = body.num_heads or max(SPEC.num_index_heads - body.first_head, 0)
    order = layout.ORDERS[max(body.order - 1, 0)]
    said.append((DTYPE_NAMES[body.queries.dtype], body.queries.data, body.first_head, heads, order))
    return [*said, body.return_scores, getattr(body, "wait_for_keys", False)]


def said_in(request: Any) -> list[Any]:
    """The same of what a slot says."""
    assert isinstance(request, TokenRequest)
    spans, keys, queries = request.spans, request.keys, request.queries
    said: list[Any] = [request.tenant, request.epoch, request.layer]
    said += [getattr(spans, column).tolist() for column in spans.__slots__]
    said.append(keys and (keys.tensor.dtype, bytes(keys.tensor.data), keys.rollback))
    if queries is None:
        return [*said, None]
    tensor = queries.tensor
    said.append((tensor.dtype, bytes(tensor.data), queries.first_head, queries.num_heads, queries.order))
    return [*said, queries.return_scores + queries.raw_scores, queries.wait_for_keys]


def check_sent(core: Core, body: Any, timeout: float) -> None:
    """Asserts that the slot written last says what a request says."""
    sent = core.numbers(core.written - 1)
    received = core.take()
    assert said_in(received.request) == said_by(body)
    assert 0 <= time.monotonic() - received.received < 5
    assert abs(sent.deadline - sent.received - timeout * 1e9) < 2


def check_untouched(core: Core, before: bytes) -> None:
    assert (core.written, core.link.waiting) == (0, 0)
    assert bytes(core.segment.memory) == before
    assert core.ask() == SENT and core.numbers(0).payload_offset == 0, "all room is there"
