"""A link as it is compiled: which slot a message becomes or what it is refused with, and what comes of the answers."""

from __future__ import annotations

import os
import select
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ring_messages import Answer, TokenAnswer, TokenRequest
from blockdex._native import MORE_TO_COPY, NOTHING_LEFT, QUEUED, SENT, UNUSUAL, WAITS_FOR_ROOM
from blockdex.contract.errors import BlockdexError, Code, NotFoundError, Reason
from blockdex.contract.messages import GetSequence, Limits, SequenceState
from blockdex.frontend.grpc import convert
from blockdex.ring import codec, layout
from blockdex.ring.caller import RPCS, STREAM
from blockdex.ring.layout import ANSWER_STRUCT, AT, REQUEST_STRUCT, RequestSlot, aligned
from blockdex.ring.segment import Segment, Sizes
from blockdex.v1 import indexer_pb2 as pb
from blockdex_kernels import IndexSpec
from support import slots
from support.asking import RESPONSES
from support.links import BOUNDS, link_of
from support.ring import flags_of

SPEC = IndexSpec(num_layers=3, num_index_heads=4, head_dim=4, topk=4, max_sequence_tokens=300)
LIMITS = Limits(max_message_bytes=2000, max_spans=6, max_queued_requests=8, max_stream_requests=4, max_wait_ms=7000)
SLOTS, ROOM = 8, 1 << 14
ME = object()
TENANT = "tenant"
GET_RPC = RPCS.index("GetSequence")
KINDS = (pb.AppendKeysRequest, pb.SelectBlocksRequest, pb.AppendAndSelectRequest)
NAMES = ("append_keys", "select_blocks", "append_and_select")


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

    def send(self, rpc: int, message: bytes, owner: object = ME) -> Any:
        """As `ClientLink.send`, of one tenant and with one timeout."""
        return self.link.send(owner, rpc, TENANT, 7.0, message)

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


DTYPE_BYTES = {pb.DTYPE_BF16: 2, pb.DTYPE_FP16: 2, pb.DTYPE_FP32: 4, pb.DTYPE_FP8_E4M3: 1}
NUMBERS = st.sampled_from((0, 1, 2, 3, 4, 127, 128, 299, 300, 2**31, 2**32 - 1))


@st.composite
def right_requests(draw: st.DrawFn) -> tuple[int, Any]:
    """A kind and a request of it with which nothing is wrong."""
    kind = draw(st.integers(0, 2))
    ids = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=LIMITS.max_spans, unique=True))
    lengths = [draw(st.integers(1, 4)) for _ in ids]
    starts = [draw(st.integers(0, SPEC.max_sequence_tokens - length)) for length in lengths]
    revisions = draw(st.one_of(st.just([]), st.lists(NUMBERS, min_size=len(ids), max_size=len(ids))))
    spans = pb.Spans(sequence_ids=ids, starts=starts, lengths=lengths, revisions=revisions)
    first = draw(st.integers(0, 3))
    num_heads = draw(st.integers(0, 4 - first))

    def tensor(heads: int) -> pb.Tensor:
        dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
        size = sum(lengths) * heads * SPEC.head_dim * DTYPE_BYTES[dtype]
        return pb.Tensor(dtype=dtype, data=draw(st.binary(min_size=size, max_size=size)))

    features: Any = draw(st.lists(st.integers(1, 5), max_size=3))
    header = pb.RequestHeader(epoch=draw(st.integers(0, 2**64 - 1)), required_features=features)
    fields: dict[str, Any] = {"layer": draw(st.integers(0, 2)), "header": header}
    if kind != 1:
        fields |= {"keys": tensor(1), "rollback": draw(st.booleans())}
    if kind != 0:
        fields |= {"queries": tensor(num_heads or 4 - first), "first_head": first, "num_heads": num_heads}
        fields |= {"order": draw(st.integers(0, 2)), "return_scores": draw(st.integers(0, 2))}
    if kind == 1:
        fields["wait_for_keys"] = draw(st.booleans())
    return kind, KINDS[kind](spans=spans, **fields)


@st.composite
def any_requests(draw: st.DrawFn) -> tuple[int, Any]:
    """The same with some field changed, which mostly makes it a wrong one."""
    kind, body = draw(right_requests())
    for change in draw(st.lists(st.integers(0, 11), min_size=1, max_size=2)):
        column = ("sequence_ids", "starts", "lengths", "revisions")[change % 4]
        values = getattr(body.spans, column)
        number = draw(NUMBERS)
        if change < 4:
            values.append(number)
        elif change < 7 and values:
            values[draw(st.integers(0, len(values) - 1))] = number
        elif change == 7:
            body.header.required_features.append(draw(st.integers(-1, 7)))
        elif change == 8:
            body.layer = number
        elif change == 9 and kind:
            body.first_head, body.num_heads, body.order = number, draw(NUMBERS), draw(st.integers(-1, 4))
        else:
            tensor = body.queries if kind == 1 else body.keys
            tensor.dtype = draw(st.integers(-1, 6))
            if draw(st.booleans()):
                tensor.data += b"x"
            elif kind and draw(st.booleans()):
                body.return_scores = draw(st.integers(-1, 4))
    return kind, body


DTYPE_NAMES = dict(enumerate(layout.DTYPES, start=1))


def insists(body: Any) -> bool:
    """Whether a request names what only protobuf's reader knows to refuse."""
    return bool(body.header.model) or any(feature not in convert.FEATURES for feature in body.header.required_features)


def unfit(body: Any) -> Reason | None:
    """Why no slot can carry what a request says: the first of what is wrong with it."""
    tensors = [getattr(body, part) for part in ("keys", "queries") if part in body.DESCRIPTOR.fields_by_name]
    spans, count = body.spans, len(body.spans.sequence_ids)
    even = count == len(spans.starts) == len(spans.lengths) == (len(spans.revisions) or count)
    wrong = [(not even or count > LIMITS.max_spans, Reason.INVALID_SPANS)]
    for tensor in tensors:
        wrong += [(tensor.dtype not in DTYPE_NAMES, Reason.INVALID_TENSOR)]
    wrong += [(getattr(body, "order", 0) not in (0, 1, 2), Reason.INVALID_ORDER)]
    wrong += [(getattr(body, "return_scores", 0) not in (0, 1, 2), Reason.INVALID_SCORES)]
    wrong += [(sum(len(tensor.data) for tensor in tensors) > LIMITS.max_message_bytes, Reason.MESSAGE_TOO_LARGE)]
    return next((reason for is_wrong, reason in wrong if is_wrong), None)


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


@settings(deadline=None)
@given(right_requests(), st.booleans(), st.integers(0, 2**64 - 1), st.sampled_from((0, 1, 1500, 2**32 - 1)))
def test_right_requests_become_slots(right: tuple[int, Any], stream: bool, number: int, timeout_ms: int) -> None:
    kind, body = right
    wire = in_stream(kind, body, number, timeout_ms) if stream else body
    with opened() as core:
        assert core.send(STREAM if stream else kind, wire.SerializeToString()) == SENT
        check_sent(core, body, timeout_ms / 1000 if stream and timeout_ms else 7.0)
        assert core.link.give_up(ME, number if stream else 0)[2] == kind + 3 * stream


@settings(deadline=None)
@given(any_requests(), st.booleans())
def test_wrong_requests_become_slots_or_are_refused(any_request: tuple[int, Any], stream: bool) -> None:
    kind, body = any_request
    wire = in_stream(kind, body, 5) if stream else body
    with opened() as core:
        before = bytes(core.segment.memory)
        became = core.send(STREAM if stream else kind, wire.SerializeToString())
        if became == SENT:
            assert unfit(body) is None and not insists(body)
            check_sent(core, body, 7.0)
        elif became == UNUSUAL:
            assert insists(body)
            check_untouched(core, before)
        else:
            assert not insists(body)
            rpc, number, _, reason, _ = became
            assert (rpc, number, reason) == (kind + 3 * stream, 5 * stream, unfit(body))
            check_untouched(core, before)


def spoilt(message: bytes, data: st.DataObject) -> bytes:
    """A message with some of its bytes changed."""
    wire = bytearray(message)
    for _ in range(data.draw(st.integers(1, 3))):
        # Mostly among tags and lengths, which lie in front.
        at = min(data.draw(st.integers(0, 80)), len(wire) - 1)
        match data.draw(st.sampled_from(["change", "insert", "delete", "double", "cut"])):
            case "change":
                wire[at] = data.draw(st.integers(0, 255))
            case "insert":
                wire[at:at] = data.draw(st.binary(min_size=1, max_size=12))
            case "delete":
                del wire[at]
            case "double":
                wire += bytes(wire)
            case "cut":
                del wire[at:]
        if not wire:
            break
    return bytes(wire)


@settings(max_examples=300, deadline=None)
@given(right_requests(), st.data())
def test_whatever_bytes_come_protobuf_says_the_same(right: tuple[int, Any], data: st.DataObject) -> None:
    kind, body = right
    wire = spoilt(in_stream(kind, body, 5).SerializeToString(), data)
    with opened() as core:
        before = bytes(core.segment.memory)
        became = core.send(STREAM, wire)
        try:
            request = pb.StreamRequest.FromString(wire)
        except DecodeError:
            assert became == UNUSUAL, "protobuf is to say that it is no message"
            check_untouched(core, before)
            return
        name = request.WhichOneof("request")
        if name not in NAMES:
            assert became == UNUSUAL
            return
        if became == UNUSUAL:
            check_untouched(core, before)
    body = getattr(request, name)
    if insists(body):
        assert became == UNUSUAL
        return
    with opened() as core:
        became = core.send(STREAM, wire if became != UNUSUAL else convert.usual(request))
        if became == SENT:
            check_sent(core, body, request.timeout_ms / 1000 if request.timeout_ms else 7.0)
            assert core.link.give_up(ME, request.request_id) is not None
        else:
            assert became[:2] == (NAMES.index(name) + STREAM, request.request_id)
            assert became[3] == unfit(body) is not None


def selection(tokens: int = 2, **fields: Any) -> pb.SelectBlocksRequest:
    """A right one, of one sequence and all heads."""
    queries = pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(4 * 8 * tokens))
    return pb.SelectBlocksRequest(spans=append(tokens).spans, queries=queries, **fields)


def appending(**columns: list[int]) -> pb.AppendKeysRequest:
    """A right one but for what is said of its spans."""
    spans: dict[str, Any] = {"sequence_ids": [7, 8], "starts": [1, 2], "lengths": [1, 1]} | columns
    return pb.AppendKeysRequest(spans=pb.Spans(**spans), keys=append().keys)


def with_keys(**tensor: Any) -> pb.AppendKeysRequest:
    """A right one but for its tensor."""
    return pb.AppendKeysRequest(spans=append().spans, keys=pb.Tensor(**tensor))


REFUSED: dict[str, tuple[Any, Code, Reason, str]] = {
    "few starts": (
        appending(starts=[1]),
        Code.INVALID_ARGUMENT,
        Reason.INVALID_SPANS,
        "spans: columns must be equally long, got 2 sequence_ids, 1 starts, 2 lengths, 2 revisions\n"
        "sequence_ids=2\nstarts=1\nlengths=2\nrevisions=2",
    ),
    "many revisions": (
        appending(revisions=[1, 2, 3]),
        Code.INVALID_ARGUMENT,
        Reason.INVALID_SPANS,
        "spans: columns must be equally long, got 2 sequence_ids, 2 starts, 2 lengths, 3 revisions\n"
        "sequence_ids=2\nstarts=2\nlengths=2\nrevisions=3",
    ),
    "many spans": (
        appending(**{column: list(range(1, 9)) for column in ("sequence_ids", "starts", "lengths")}),
        Code.INVALID_ARGUMENT,
        Reason.INVALID_SPANS,
        "spans: must be 1 to 6, got 8\ncount=8\nmax_spans=6",
    ),
    "no keys": (
        pb.AppendKeysRequest(spans=append().spans),
        Code.INVALID_ARGUMENT,
        Reason.INVALID_TENSOR,
        "keys: dtype must be one of 1, 2, 3, 4, got 0",
    ),
    "int32": (
        with_keys(dtype=pb.DTYPE_INT32, data=bytes(32)),
        Code.INVALID_ARGUMENT,
        Reason.INVALID_TENSOR,
        "keys: dtype must be one of 1, 2, 3, 4, got 5",
    ),
    "dtype": (
        with_keys(dtype=-1, data=bytes(32)),
        Code.INVALID_ARGUMENT,
        Reason.INVALID_TENSOR,
        "keys: dtype must be one of 1, 2, 3, 4, got -1",
    ),
    "large": (
        append(LIMITS.max_message_bytes // 8 + 1),
        Code.RESOURCE_EXHAUSTED,
        Reason.MESSAGE_TOO_LARGE,
        "keys and queries together must be at most 2000 bytes, got 2008\nbytes=2008\nmax_message_bytes=2000",
    ),
    "order": (selection(order=3), Code.INVALID_ARGUMENT, Reason.INVALID_ORDER, "order must be one of 0, 1, 2, got 3"),
    "scores": (
        selection(return_scores=3),
        Code.INVALID_ARGUMENT,
        Reason.INVALID_SCORES,
        "return_scores must be one of 0, 1, 2, got 3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_slot_can_carry_is_refused(name: str) -> None:
    body, code, reason, message = REFUSED[name]
    kind = KINDS.index(type(body))
    with opened() as core:
        before = bytes(core.segment.memory)
        assert core.send(kind, body.SerializeToString()) == (kind, 0, code, reason, message)
        wire = in_stream(kind, body, 9).SerializeToString()
        assert core.send(STREAM, wire) == (kind + STREAM, 9, code, reason, message)
        check_untouched(core, before)


CORE_CHECKS: dict[str, Any] = {
    "layer": pb.AppendKeysRequest(layer=3, spans=append().spans, keys=append().keys),
    "end": appending(starts=[1, 300]),
    "length": appending(lengths=[2, 0]),
    "twice": appending(sequence_ids=[7, 7]),
    "no spans": pb.AppendKeysRequest(keys=append().keys),
    "bytes": pb.AppendKeysRequest(spans=append(3).spans, keys=append().keys),
    "first head": selection(first_head=4),
    "heads": selection(first_head=1, num_heads=4),
}


@pytest.mark.parametrize("name", CORE_CHECKS)
def test_what_the_core_checks_is_left_to_it(name: str) -> None:
    body = CORE_CHECKS[name]
    with opened() as core:
        assert core.send(KINDS.index(type(body)), body.SerializeToString()) == SENT
        check_sent(core, body, 7.0)


@pytest.mark.parametrize(
    "numbers", [{"topk": 5}, {"topk": 2**32 - 1, "num_heads": 2**32 - 1}, {"flags": 3}, {"flags": 0}]
)
def test_selections_that_are_not_in_their_payload(numbers: dict[str, int]) -> None:
    with opened() as core:
        assert core.send(1, selection().SerializeToString()) == SENT
        core.answer(core.take().ticket, TokenAnswer(9, np.zeros((2, 4, 4), np.int32)))
        core.spoil(**numbers)
        with pytest.raises(ValueError, match="it is none to its request"):
            core.link.take()


def field(number: int, kind: int, payload: bytes) -> bytes:
    return bytes([number << 3 | kind]) + (bytes([len(payload)]) if kind == 2 else b"") + payload


def test_what_encoders_may_write_is_read() -> None:
    """Fields in any order, numbers that are not packed or in pieces, unknown fields, the last one of several."""
    ids = [field(1, 1, number.to_bytes(8, "little")) for number in (7, 8, 9)]
    spans = field(3, 2, b"\x01\x02") + ids[0] + field(2, 0, b"\x05") + field(3, 0, b"\x81\x00") + ids[1] + ids[2]
    spans += field(9, 5, b"abcd") + field(2, 2, b"\x06\x07")
    tensor = field(2, 2, b"k") + field(1, 0, b"\x00") + field(2, 2, bytes(4 * 4 * 2)) + field(1, 0, b"\x01")
    header = field(2, 0, b"\x02") + field(14, 2, b"future") + field(2, 2, b"\x01\x03") + field(1, 1, bytes(8))
    body = field(14, 2, b"future") + field(4, 2, tensor) + field(2, 0, b"\x00") + field(1, 2, header)
    body += field(3, 2, spans) + field(2, 0, b"\x02") + field(15, 1, bytes(8))
    read = pb.AppendKeysRequest.FromString(body)
    assert list(read.spans.starts) == [5, 6, 7]
    with opened() as core:
        assert core.send(0, body) == SENT
        check_sent(core, read, 7.0)


UNREAD = {
    "empty": pb.StreamRequest(request_id=1).SerializeToString(),
    "cancel": pb.StreamRequest(cancel=pb.CancelRequest(request_id=1)).SerializeToString(),
    "two requests": 2 * in_stream(0, append()).SerializeToString(),
    "garbage": b"\x0a\xff",
    "model": in_stream(0, pb.AppendKeysRequest(header=pb.RequestHeader(model="m"))).SerializeToString(),
    "open": pb.StreamRequest(open_sequences=pb.OpenSequencesRequest()).SerializeToString(),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_no_token_request_as_encoders_write_it_is_for_protobuf(name: str) -> None:
    with opened() as core:
        before = bytes(core.segment.memory)
        assert core.send(STREAM, UNREAD[name]) == UNUSUAL
        check_untouched(core, before)


@pytest.mark.parametrize(
    ("tenant", "taken"), [("", 0), ("x" * 256, 1), ("x" * 257, 0), ("\x7f", 0), ("ü", 0), (" ~", 1)]
)
def test_tenants(tenant: str, taken: bool) -> None:
    with opened() as core:
        if taken:
            assert core.link.send(ME, 0, tenant, 7.0, append().SerializeToString()) == SENT
        else:
            with pytest.raises(ValueError, match="tenant: must be 1 to 256 printable"):
                core.link.send(ME, 0, tenant, 7.0, append().SerializeToString())


@pytest.mark.parametrize(("timeout", "kept"), [(-1.0, 0), (float("nan"), 0), (float("inf"), 1e9), (1e10, 1e9)])
def test_timeouts_that_no_slot_can_say(timeout: float, kept: float) -> None:
    with opened() as core:
        assert core.link.send(ME, 0, TENANT, timeout, append().SerializeToString()) == SENT
        check_sent(core, append(), kept)


def test_numbers_in_flight_twice_are_refused() -> None:
    wire = in_stream(0, append(), 5).SerializeToString()
    with opened() as core:
        assert core.send(STREAM, wire) == SENT
        twice = core.send(STREAM, wire)
        assert twice[1:] == (5, 3, Reason.DUPLICATE_REQUEST_ID, "request_id: 5 is in flight already")
        assert core.send(STREAM, wire, object()) == SENT, "another one's"
        core.answer(core.take().ticket, TokenAnswer(9))
        assert [(asker, number) for asker, number, *_ in core.link.take()] == [(ME, 5)]
        assert core.send(STREAM, wire) == SENT


def fill(core: Core, count: int) -> list[Any]:
    """What became of so many appends of one stream."""
    return [core.send(STREAM, in_stream(0, append(), number).SerializeToString()) for number in range(count)]


def test_one_more_than_may_wait_is_refused() -> None:
    with opened(max_waiting=3) as core:
        *sent, refused = fill(core, 4)
        assert sent == 3 * [SENT]
        assert refused[1:] == (3, 8, Reason.OVERLOADED, "queue: at most 3 requests may wait, 3 do")


def test_who_finds_no_slot_waits_and_so_do_all_behind() -> None:
    with opened(max_waiting=100) as core:
        assert fill(core, SLOTS + 2) == SLOTS * [SENT] + 2 * [QUEUED]
        assert core.link.flush() == WAITS_FOR_ROOM
        core.take()
        assert core.send(0, append().SerializeToString(), object()) == QUEUED, "it does not overtake them"
        core.take()
        assert core.link.flush() == WAITS_FOR_ROOM and core.written == SLOTS + 2
        core.take()
        assert core.link.flush() == NOTHING_LEFT and core.written == SLOTS + 3
        numbers = [core.numbers(slot).ticket for slot in range(SLOTS + 3)]
        assert len(set(numbers[-SLOTS:])) == SLOTS


def test_who_finds_no_room_waits_and_says_the_same_later() -> None:
    with opened(requests=3 * 128 + 64, max_waiting=100) as core:
        assert fill(core, 4) == 3 * [SENT] + [QUEUED]
        assert core.ask(number=4) == QUEUED
        first = core.take().ticket
        core.answer(first, TokenAnswer(9))
        assert len(core.link.take()) == 1
        assert core.link.flush() == NOTHING_LEFT and core.written == 5
        for _ in range(2):
            core.take()
        check_sent(core, append(), 7.0)
        assert core.numbers(4).kind == layout.GET


def test_who_waits_too_long_is_given_up() -> None:
    with opened(requests=128, max_waiting=100) as core:
        assert fill(core, 3) == [SENT, QUEUED, QUEUED]
        assert core.link.overdue(60.0) == []
        late = core.link.overdue(0.0)
        assert [(each[0], each[1], each[2]) for each in late] == [(ME, 1, 3), (ME, 2, 3)]
        assert all(each[7] == 128 for each in late), "bytes that there was no room for"
        assert core.link.flush() == NOTHING_LEFT
        assert (core.written, core.link.waiting) == (1, 1)


LARGE = 1 << 22


def large(number: int, sequence: int = 1) -> bytes:
    """An append of `LARGE` bytes, of a stream."""
    keys = pb.Tensor(dtype=pb.DTYPE_BF16, data=np.arange(LARGE // 4, dtype=np.uint32).tobytes())
    spans = pb.Spans(sequence_ids=[sequence], starts=[0], lengths=[LARGE // 8])
    return in_stream(0, pb.AppendKeysRequest(spans=spans, keys=keys), number).SerializeToString()


ROOMY: dict[str, Any] = {"requests": 3 * LARGE, "max_waiting": 100, "max_message_bytes": LARGE}


def test_long_requests_are_copied_in_slices_beside_those_of_others() -> None:
    other = object()
    with opened(**ROOMY) as core:
        assert core.send(STREAM, large(1)) == QUEUED
        assert core.send(STREAM, in_stream(0, append(), 2).SerializeToString()) == QUEUED, "behind its own"
        for step in range(LARGE // (1 << 19) - 1):
            assert core.link.flush() == MORE_TO_COPY
            assert core.send(0, append().SerializeToString(), other) == SENT
            assert core.written == step + 1
            core.answer(core.take().ticket, TokenAnswer(9))
            assert [each[0] for each in core.link.take()] == [other]
        before = core.written
        assert core.link.flush() == NOTHING_LEFT
        assert core.written == before + 2
        request = core.take().request
        assert isinstance(request, TokenRequest) and request.keys is not None
        assert bytes(request.keys.tensor.data) == np.arange(LARGE // 4, dtype=np.uint32).tobytes()
        check_sent(core, append(), 7.0)


def test_no_slice_takes_longer_than_its_share() -> None:
    """One after the other, so that what else this machine does counts for both."""
    with opened(requests=1 << 28, max_waiting=100, max_message_bytes=80 << 20) as core:
        keys = pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(80 << 20))
        spans = pb.Spans(sequence_ids=[1], starts=[0], lengths=[10 << 20])
        message = pb.AppendKeysRequest(spans=spans, keys=keys).SerializeToString()
        began = time.thread_time()
        assert core.send(0, message) == QUEUED
        took = [time.thread_time() - began]
        while core.written == 0:
            began = time.thread_time()
            core.link.flush()
            took.append(time.thread_time() - began)
        assert len(took) == 1 + 160
        assert max(took) < sum(took) / 10, "at most a tenth of 80 MiB, where a slice is a 160th"


@pytest.mark.parametrize("flushes", [0, 1])
def test_giving_up_what_is_being_copied_gives_all_back(flushes: int) -> None:
    with opened(**ROOMY) as core:
        for number in range(3):
            assert core.send(STREAM, large(number)) == QUEUED
        for _ in range(flushes):
            core.link.flush()
        assert [each[1] for each in core.link.give_up_all(ME)] == [0, 1, 2]
        assert core.link.flush() == NOTHING_LEFT
        assert (core.written, core.link.waiting) == (0, 0)
        assert core.ask() == SENT and core.numbers(0).payload_offset == 0


@settings(deadline=None)
@given(st.integers(0, 2), st.booleans(), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.data())
def test_responses_are_those_of_protobuf(kind: int, stream: bool, number: int, epoch: int, data: st.DataObject) -> None:
    body: Any = append()
    if kind:
        queries = pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(2 * 4 * 4 * 2))
        keys: dict[str, Any] = {"keys": body.keys} if kind == 2 else {}
        make: Any = KINDS[kind]
        body = make(spans=body.spans, queries=queries, **keys)
    shape = tuple(data.draw(st.integers(1, 9)) for _ in range(3))
    ids = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) - 1 if kind else None
    scores = np.sqrt(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape) if data.draw(st.booleans()) else None
    answer = TokenAnswer(epoch, ids, scores if kind else None)
    tensors: dict[str, Any] = {}
    if ids is not None:
        tensors["block_ids"] = pb.Tensor(dtype=pb.DTYPE_INT32, data=ids.tobytes())
        if scores is not None:
            tensors["scores"] = pb.Tensor(dtype=pb.DTYPE_FP32, data=scores.tobytes())
    expected: Any = RESPONSES[kind](epoch=epoch, **tensors)
    wire: Any = body
    if stream:
        wire = in_stream(kind, body, number)
        expected = pb.StreamResponse(request_id=number, **{NAMES[kind]: expected})
    with opened() as core:
        assert core.send(STREAM if stream else kind, wire.SerializeToString()) == SENT
        core.answer(core.take().ticket, answer, offset=64 * data.draw(st.integers(0, 9)))
        ((asker, told, response, rest),) = core.link.take()
        assert (asker, told, rest) == (ME, number if stream else 0, None)
        assert response is not None and type(expected).FromString(response) == expected
        assert len(response) == expected.ByteSize()
        if ids is not None:
            assert core.segment.counters[AT["answer_bytes_freed"] // 8] > 0
        assert core.link.take() == [] and flags_of(core.segment)[AT["client_sleeps"] // 4] == 1


def waits(core: Core, seconds: float = 5.0) -> bool:
    return bool(core.link.await_alone(core.epoll.fileno(), seconds))


@pytest.mark.parametrize("event", [False, True])
def test_the_only_request_in_flight_is_waited_for_while_there_is_nothing_else_to_do(event: bool) -> None:
    seconds = 0.02

    def looked() -> tuple[float, float]:
        """Seconds that it waited for an answer that does not come, and those of its core."""
        with opened(spin_seconds=1.0) as core:
            flags_of(core.segment)[AT["client_sleeps"] // 4] = 1
            assert core.send(STREAM, in_stream(0, append(), 1).SerializeToString()) == SENT
            if event:
                os.eventfd_write(core.bell, 1)
            began, took = time.monotonic(), time.thread_time()
            assert not waits(core, seconds)
            assert flags_of(core.segment)[AT["client_sleeps"] // 4] == 0, "nobody rings for what is looked for"
            return time.monotonic() - began, time.thread_time() - took

    waited, took = zip(*(looked() for _ in range(10)), strict=True)
    assert max(waited) < 10
    assert max(took) < seconds / 4 if event else min(waited) >= seconds


def test_its_answer_ends_the_wait() -> None:
    with opened(spin_seconds=1.0) as core:
        assert core.send(STREAM, in_stream(0, append(), 1).SerializeToString()) == SENT
        core.answer(core.take().ticket, TokenAnswer(9))
        took = time.thread_time()
        assert waits(core)
        assert time.thread_time() - took < 0.001


@pytest.mark.parametrize(("spin_seconds", "requests"), [(0.0, 1), (1.0, 2), (1.0, 0)])
def test_nothing_is_waited_for_beside_others_or_without_spinning(spin_seconds: float, requests: int) -> None:
    with opened(spin_seconds=spin_seconds) as core:
        flags_of(core.segment)[AT["client_sleeps"] // 4] = 1
        for number in range(requests):
            assert core.send(STREAM, in_stream(0, append(), number).SerializeToString()) == SENT
        assert not waits(core)
        assert flags_of(core.segment)[AT["client_sleeps"] // 4] == 1
        for _ in range(requests):
            core.answer(core.take().ticket, TokenAnswer(9))
        assert waits(core) == (requests > 0)


def test_errors_and_states_come_as_they_are() -> None:
    with opened() as core:
        assert core.send(0, append(3).SerializeToString()) == SENT
        core.answer(core.take().ticket, NotFoundError("no such", Reason.UNKNOWN_SEQUENCE))
        assert core.ask(number=4) == SENT
        ticket, request, *_ = core.take()
        assert request == GetSequence(TENANT, 0, 5)
        core.answer(ticket, SequenceState(9, np.array([3, 4, 5]), np.array([0, 1, 2], np.uint64)), offset=64)
        (_, _, response, rest), (_, number, none, other) = core.link.take()
        assert (response, none, number) == (None, None, 4)
        numbers = layout.AnswerSlot._make(ANSWER_STRUCT.unpack(rest[2]))
        error = codec.read_error(numbers, np.frombuffer(rest[3], np.uint8))
        assert (str(error), rest[0], rest[4:]) == ("no such [NOT_FOUND, UNKNOWN_SEQUENCE]", 0, (1, 1, 3))
        assert codec.stage_seconds_of(numbers) == {"queue": 0.5}
        state = codec.read_state(
            layout.AnswerSlot._make(ANSWER_STRUCT.unpack(other[2])), np.frombuffer(other[3], np.uint8)
        )
        assert isinstance(state, SequenceState) and state.lengths is not None and state.revisions is not None
        assert (state.epoch, state.lengths.tolist(), state.revisions.tolist()) == (9, [3, 4, 5], [0, 1, 2])
        assert other[0] == GET_RPC


def test_of_what_took_long_the_rest_is_told_too() -> None:
    with opened(tell_seconds=-1.0) as core:
        assert core.send(0, append(3).SerializeToString()) == SENT
        core.answer(core.take().ticket, TokenAnswer(9))
        ((_, _, response, rest),) = core.link.take()
        assert pb.AppendKeysResponse.FromString(response).epoch == 9
        assert (rest[0], rest[3], rest[4:]) == (0, b"", (1, 1, 3))
        assert codec.stage_seconds_of(layout.AnswerSlot._make(ANSWER_STRUCT.unpack(rest[2]))) == {"queue": 0.5}


def test_who_gives_up_is_told_of_no_answer_and_the_engine_hears_of_it() -> None:
    with opened() as core:
        other = object()
        for owner, number in ((ME, 1), (ME, 2), (other, 1)):
            assert core.send(STREAM, in_stream(0, append(), number).SerializeToString(), owner) == SENT
        tickets = [core.take().ticket for _ in range(3)]
        assert core.link.give_up(ME, 3) is None
        assert core.link.give_up(ME, 2)[:3] == (ME, 2, 3)
        assert core.take()[:2] == (tickets[1], None)
        assert core.link.waiting == 2
        assert [each[0] for each in core.link.give_up_all(other)] == [other]
        assert [each[:2] for each in core.link.give_up_all(None)] == [(ME, 1)]
        for ticket in tickets:
            core.answer(ticket, TokenAnswer(9))
        assert core.link.take() == []
        assert flags_of(core.segment)[AT["client_sleeps"] // 4] == 1, "it looked again before it lay down"
        assert core.link.waiting == 0


def test_cancellations_wait_for_slots_and_requests_wait_behind_them() -> None:
    with opened(max_waiting=100) as core:
        assert fill(core, SLOTS) == SLOTS * [SENT]
        tickets = [core.numbers(slot).ticket for slot in range(SLOTS)]
        for number in (0, 1):
            assert core.link.give_up(ME, number) is not None
        assert core.link.flush() == WAITS_FOR_ROOM
        for _ in range(SLOTS):
            core.take()
        assert core.link.flush() == NOTHING_LEFT
        assert [core.take()[:2] for _ in range(2)] == [(ticket, None) for ticket in tickets[:2]]


def references(*objects: object) -> list[int]:
    return [sys.getrefcount(each) for each in objects]


def test_no_reference_is_lost_or_kept() -> None:
    """Of an owner, a message and a tenant, whichever way a request ends, and of what an answer is told with."""
    owner, tenant = object(), "a tenant of its own"
    short, long_one = in_stream(0, append(), 1).SerializeToString(), large(1)
    with opened(**ROOMY) as core:

        def send(message: bytes) -> Any:
            return core.link.send(owner, STREAM, tenant, 7.0, message)

        def answered(answer: Answer | BlockdexError) -> None:
            assert send(short) == SENT
            core.answer(core.take().ticket, answer)
            ((_, _, response, rest),) = core.link.take()
            told = rest if response is None else response
            del response, rest
            count = sys.getrefcount(told)
            assert count == 2, "here, and where it is counted"

        def given_up() -> None:
            assert send(short) == SENT
            core.take()
            assert len(core.link.give_up_all(owner)) == 1
            core.take()

        def refused() -> None:
            assert send(short) == SENT
            assert send(short)[3] == Reason.DUPLICATE_REQUEST_ID
            assert core.link.give_up(owner, 1) is not None
            core.take()
            core.take()

        def copied() -> None:
            assert send(long_one) == QUEUED
            while core.link.flush() != NOTHING_LEFT:
                pass
            core.answer(core.take().ticket, TokenAnswer(9))
            assert len(core.link.take()) == 1

        def given_up_unsent() -> None:
            assert send(long_one) == QUEUED
            core.link.flush()
            assert core.link.give_up(owner, 1) is not None

        def asked() -> None:
            assert core.link.send_sequence(owner, 1, GET_RPC, tenant, 7.0, layout.GET, 0, 5, 0, 0, 0, b"") == SENT
            core.answer(core.take().ticket, SequenceState(9))
            assert len(core.link.take()) == 1

        before = references(owner, short, long_one, tenant)
        ways: list[Any] = [given_up, refused, copied, given_up_unsent, asked]
        ways += [lambda: answered(TokenAnswer(9)), lambda: answered(NotFoundError("no", Reason.UNKNOWN_SEQUENCE))]
        for way in ways:
            for _ in range(10):
                way()
            assert references(owner, short, long_one, tenant) == before
    with opened(**ROOMY) as core:
        assert send(short) == SENT and send(long_one)[3] == Reason.DUPLICATE_REQUEST_ID
        assert core.link.send(owner, 0, tenant, 7.0, append().SerializeToString()) == SENT
        del core.link
    assert references(owner, short, long_one, tenant) == before, "a link that ends lets go of all"


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"ticket": 4711}, "ticket 4711 is not in flight"),
        ({"payload_offset": ROOM, "payload_bytes": 1}, "1 bytes at 16384 are not in an arena"),
        ({"payload_offset": 64, "payload_bytes": 2**64 - 1}, "are not in an arena"),
        ({"phase": 5}, "phase must be 1 to 4, got 5"),
        ({"flags": 1, "topk": 2**32 - 1, "num_heads": 2**32 - 1, "num_tokens": 2**32 - 1}, "it is none to its request"),
        ({"flags": 4}, "it is none to its request"),
    ],
)
def test_answers_that_cannot_be(numbers: dict[str, int], words: str) -> None:
    """Those before it are told of first."""
    with opened() as core:
        for number in (1, 2):
            wire = in_stream(0, append(), number).SerializeToString()
            assert core.send(STREAM, wire) == SENT
            core.answer(core.take().ticket, TokenAnswer(9))
        core.spoil(**numbers)
        assert [number for _, number, *_ in core.link.take()] == [1]
        with pytest.raises(ValueError, match=words):
            core.link.take()
        assert core.link.waiting == 1, "it can still be refused"


def test_more_answers_than_slots_cannot_be() -> None:
    with opened() as core:
        core.segment.counters[AT["answers_written"] // 8] = SLOTS + 1
        with pytest.raises(ValueError, match="9 slots are said to be filled, there are 8"):
            core.link.take()


@pytest.mark.parametrize("field_name", ["magic", "version", "slot_bytes", "request_slots", "answer_arena_bytes"])
def test_a_header_that_cannot_be(field_name: str) -> None:
    with opened() as core:
        offset = AT[field_name]
        core.segment.memory[offset : offset + 4] = b"\xff\xff\xff\x7f"
        with pytest.raises(ValueError, match="its header is none of a ring"):
            link_of(core.segment, core.bell)


def test_answers_are_timed() -> None:
    with opened() as core:
        waits = (0.0, 0.005, 0.0)
        for number, seconds in enumerate(waits):
            wire = in_stream(0, append(), number).SerializeToString()
            assert core.send(STREAM, wire) == SENT
            time.sleep(seconds)
            core.answer(core.take().ticket, TokenAnswer(9))
            core.link.take()
        times = core.link.take_times()
        counts, total = times[STREAM]
        assert counts[bisect_left(BOUNDS, 0.005)] >= 1 and sum(counts) == 3
        assert 0.005 <= total < 5
        assert all(sum(others) == 0 for others, _ in times[:STREAM] + times[STREAM + 1 :])
        assert sum(core.link.take_times()[STREAM][0]) == 0


ARENA = 4096


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 249), st.integers(0, 100)), max_size=120))
def test_extents_never_overlap_and_all_room_comes_back(steps: list[tuple[bool, int, int]]) -> None:
    with opened(requests=ARENA, slots=256, max_waiting=200) as core:
        taken: dict[int, tuple[int, int]] = {}

        def give_back(offset: int) -> None:
            core.answer(taken.pop(offset)[0], TokenAnswer(9))
            assert len(core.link.take()) == 1

        for gives_back, size, which in steps:
            if gives_back and taken:
                give_back(sorted(taken)[which % len(taken)])
                continue
            wanted = aligned(64 + 8 * size)
            used = sorted((offset, offset + length) for offset, (_, length) in taken.items())
            edges = [0, *(edge for extent in used for edge in extent), ARENA]
            holes = [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if end - begin >= wanted]
            owner = object()
            became = core.send(0, append(size).SerializeToString(), owner)
            assert became == (SENT if holes else QUEUED)
            if holes:
                ticket, offset = core.take().ticket, core.numbers(core.written - 1).payload_offset
                assert offset == holes[0][0], "the lowest hole that is wide enough"
                taken[offset] = (ticket, wanted)
            else:
                core.link.give_up(owner, 0)
        for offset in list(taken):
            give_back(offset)
        assert core.ask() == SENT and core.numbers(core.written - 1).payload_offset == 0
