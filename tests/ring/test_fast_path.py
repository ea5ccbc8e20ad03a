"""The compiled short way beside protobuf, `convert` and `codec`: it writes what they would, or leaves it to them."""

from __future__ import annotations

import os
import select
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

from blockdex import _native
from blockdex.contract.errors import BlockdexError, NotFoundError, Reason
from blockdex.contract.messages import Answer, Limits, Request, TensorData, TokenAnswer, TokenRequest
from blockdex.frontend.grpc import convert
from blockdex.ring import codec, layout
from blockdex.ring.channel import STREAM
from blockdex.ring.layout import ANSWER_STRUCT, AT, REQUEST_STRUCT, RequestSlot, aligned
from blockdex.ring.segment import Segment, Sizes
from blockdex.v1 import indexer_pb2 as pb
from blockdex_kernels import IndexSpec

SPEC = IndexSpec(num_layers=3, num_index_heads=4, head_dim=4, topk=4, max_sequence_tokens=300)
LIMITS = Limits(max_message_bytes=2000, max_spans=6, max_queued_requests=8, max_stream_requests=4, max_wait_ms=7000)
SLOTS, ROOM = 8, 1 << 14
BOUNDS = (0.001, 0.1, 10.0)
ME = object()
TENANT = "tenant"
KINDS = (pb.AppendKeysRequest, pb.SelectBlocksRequest, pb.AppendAndSelectRequest)
NAMES = ("append_keys", "select_blocks", "append_and_select")


class Core:
    """The engine's side of a link, by `codec`."""

    def __init__(
        self,
        requests: int = ROOM,
        slots: int = SLOTS,
        max_waiting: int = LIMITS.max_queued_requests,
        spin_seconds: float = 0.0,
    ) -> None:
        self.segment = Segment.create(Sizes(slots, requests, ROOM), epoch=1)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.link = _native.Link(self.segment.memory, self.bell, spin_seconds)
        self.link.open_short_way(
            num_layers=SPEC.num_layers,
            num_heads=SPEC.num_index_heads,
            head_dim=SPEC.head_dim,
            max_sequence_tokens=SPEC.max_sequence_tokens,
            max_spans=LIMITS.max_spans,
            max_message_bytes=LIMITS.max_message_bytes,
            max_waiting=max_waiting,
            slow_seconds=100.0,
            time_bounds=BOUNDS,
        )
        self.answered = 0
        self.epoll = select.epoll()
        self.epoll.register(self.bell, select.EPOLLIN)

    def close(self) -> None:
        self.epoll.close()
        os.close(self.segment.fd)
        os.close(self.bell)

    @property
    def written(self) -> int:
        return int(self.segment.words[AT["requests_written"] // 8])

    def slot(self, number: int) -> int:
        return int(self.segment.request_slots_offset + number % self.segment.request_slots * layout.SLOT_BYTES)

    def numbers(self, number: int) -> RequestSlot:
        return RequestSlot._make(REQUEST_STRUCT.unpack_from(self.segment.memory, self.slot(number)))

    def take(self) -> codec.Received:
        """The oldest request."""
        read = self.segment.counters[AT["requests_read"] // 8]
        assert read < self.written
        received = codec.read_request(self.segment, self.slot(read))
        self.segment.counters[AT["requests_read"] // 8] = read + 1
        return received

    def answer(self, ticket: int, answer: Answer | BlockdexError, offset: int = 0) -> None:
        """Writes an answer, with its payload at an offset."""
        numbers, columns = codec.columns_of(answer)
        slot = self.segment.answer_slots_offset + self.answered % self.segment.answer_slots * layout.SLOT_BYTES
        place = (offset, offset + codec.answer_bytes(columns))
        codec.write_answer(self.segment, slot, ticket, numbers, columns, "decode", {"queue": 0.5}, place)
        self.answered += 1
        self.segment.counters[AT["answers_written"] // 8] = self.answered

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

    fields: dict[str, Any] = {"layer": draw(st.integers(0, 2))}
    features: list[Any] = draw(st.lists(st.integers(1, 5), max_size=3))
    fields["header"] = pb.RequestHeader(
        epoch=draw(st.integers(0, 2**64 - 1)), required_features=features, root_id=draw(NUMBERS)
    )
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
            body.return_scores = draw(st.integers(-1, 4))
        else:
            tensor = body.queries if kind == 1 else body.keys
            tensor.dtype = draw(st.integers(-1, 6))
            if draw(st.booleans()):
                tensor.data += b"x"
            elif draw(st.booleans()):
                body.header.model = "other"
    return kind, body


def verdict(body: Any) -> TokenRequest | None:
    """The message that Python makes of a request; None where it refuses it."""
    try:
        message = convert.message_of(SPEC, LIMITS, TENANT, body)
    except BlockdexError:
        return None
    assert isinstance(message, TokenRequest)
    return message


def plain(request: Request | None) -> list[Any]:
    """All that a token request says, to be compared."""
    assert isinstance(request, TokenRequest)
    spans, keys, queries = request.spans, request.keys, request.queries
    said: list[Any] = [request.tenant, request.epoch, request.layer]
    said += [getattr(spans, column).tolist() for column in spans.__slots__]
    said += [keys and (keys.tensor.dtype, bytes(keys.tensor.data))]
    return [*said, queries and replace(queries, tensor=TensorData(queries.tensor.dtype, bytes(queries.tensor.data)))]


def check_sent(core: Core, message: TokenRequest, timeout: float) -> None:
    """Asserts that the request just sent is what `codec` would have written, to the last number of its slot."""
    sent = core.numbers(core.written - 1)
    with opened() as other:
        slot, offset = other.segment.request_slots_offset, sent.payload_offset
        codec.write_request(other.segment, slot, offset, sent.ticket, message, 0.0, 0.0)
        assert sent._replace(received=0, deadline=0) == other.numbers(0)
        received = core.take()
        assert plain(received.request) == plain(codec.read_request(other.segment, slot).request) == plain(message)
        assert 0 <= time.monotonic() - received.received < 5
        assert abs(sent.deadline - sent.received - timeout * 1e9) < 2


def check_untouched(core: Core, before: bytes) -> None:
    assert (core.written, core.link.waiting, core.link.on_short_way) == (0, 0, 0)
    assert bytes(core.segment.memory) == before
    assert core.link.claim(ME, ROOM) is not None, "all room is there"


@settings(deadline=None)
@given(right_requests(), st.booleans(), st.integers(0, 2**64 - 1), st.sampled_from((0, 1, 1500, 2**32 - 1)))
def test_right_requests_take_the_short_way(right: tuple[int, Any], stream: bool, number: int, timeout_ms: int) -> None:
    kind, body = right
    message = verdict(body)
    assert message is not None
    wire = in_stream(kind, body, number, timeout_ms) if stream else body
    with opened() as core:
        assert core.link.send(ME, STREAM if stream else kind, TENANT, 7.0, wire.SerializeToString())
        check_sent(core, message, timeout_ms / 1000 if stream and timeout_ms else 7.0)
        assert core.link.awaits(ME, number if stream else 0)


@settings(deadline=None)
@given(any_requests(), st.booleans())
def test_wrong_requests_are_left_to_python(any_request: tuple[int, Any], stream: bool) -> None:
    kind, body = any_request
    message = verdict(body)
    wire = in_stream(kind, body, 5) if stream else body
    with opened() as core:
        before = bytes(core.segment.memory)
        if core.link.send(ME, STREAM if stream else kind, TENANT, 7.0, wire.SerializeToString()):
            assert message is not None, "Python refuses it"
            check_sent(core, message, 7.0)
        else:
            check_untouched(core, before)
            # Numbers beyond their type are left to protobuf, whatever it makes of them.
            assert message is None


@settings(max_examples=300, deadline=None)
@given(right_requests(), st.data())
def test_whatever_bytes_come_python_says_the_same(right: tuple[int, Any], data: st.DataObject) -> None:
    kind, body = right
    wire = bytearray(in_stream(kind, body, 5).SerializeToString())
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
    with opened() as core:
        before = bytes(core.segment.memory)
        if not core.link.send(ME, STREAM, TENANT, 7.0, bytes(wire)):
            check_untouched(core, before)
            return
        request = pb.StreamRequest.FromString(bytes(wire))
        kind_name = request.WhichOneof("request")
        message = verdict(getattr(request, kind_name or "nothing"))
        assert message is not None
        check_sent(core, message, request.timeout_ms / 1000 if request.timeout_ms else 7.0)
        assert core.link.awaits(ME, request.request_id)


def selection(tokens: int = 2, **fields: Any) -> pb.SelectBlocksRequest:
    """A right one, of one sequence and all heads."""
    queries = pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(4 * 8 * tokens))
    return pb.SelectBlocksRequest(spans=append(tokens).spans, queries=queries, **fields)


def appending(**columns: list[int]) -> pb.AppendKeysRequest:
    """A right one but for what is said of its spans."""
    spans: dict[str, Any] = {"sequence_ids": [7, 8], "starts": [1, 2], "lengths": [1, 1]} | columns
    return pb.AppendKeysRequest(spans=pb.Spans(**spans), keys=append().keys)


WRONG: dict[str, Any] = {
    "layer": pb.AppendKeysRequest(layer=3, spans=append().spans, keys=append().keys),
    "end": appending(starts=[1, 300]),
    "length": appending(lengths=[2, 0]),
    "twice": appending(sequence_ids=[7, 7]),
    "few starts": appending(starts=[1]),
    "few lengths": appending(lengths=[2]),
    "few revisions": appending(revisions=[1]),
    "many revisions": appending(revisions=[1, 2, 3]),
    "no spans": pb.AppendKeysRequest(keys=append().keys),
    "no keys": pb.AppendKeysRequest(spans=append().spans),
    "bytes": pb.AppendKeysRequest(spans=append(3).spans, keys=append().keys),
    "no dtype": pb.AppendKeysRequest(spans=append().spans, keys=pb.Tensor(data=append().keys.data)),
    "int32": pb.AppendKeysRequest(spans=append().spans, keys=pb.Tensor(dtype=pb.DTYPE_INT32, data=bytes(32))),
    "large": append(LIMITS.max_message_bytes // 8 + 1),
    "order": selection(order=3),
    "first head": selection(first_head=4),
    "heads": selection(first_head=1, num_heads=4),
    "all heads": selection(first_head=1),
    "scores": selection(return_scores=3),
    "feature 0": selection(header=pb.RequestHeader(required_features=[pb.FEATURE_UNSPECIFIED])),
    "feature 7": selection(header=pb.RequestHeader(required_features=[pb.FEATURE_HEAD_RANGES, pb.FEATURE_POOLS])),
    "model": selection(header=pb.RequestHeader(model="other")),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_thing_is_left_to_python(name: str) -> None:
    body = WRONG[name]
    kind = KINDS.index(type(body))
    assert verdict(body) is None
    with opened() as core:
        before = bytes(core.segment.memory)
        assert not core.link.send(ME, kind, TENANT, 7.0, body.SerializeToString())
        assert not core.link.send(ME, STREAM, TENANT, 7.0, in_stream(kind, body).SerializeToString())
        check_untouched(core, before)


def test_what_is_right_up_to_the_last() -> None:
    for body in (appending(starts=[1, 299]), append(LIMITS.max_message_bytes // 8), selection(order=2)):
        assert verdict(body) is not None
        with opened() as core:
            assert core.link.send(ME, KINDS.index(type(body)), TENANT, 7.0, body.SerializeToString())


@pytest.mark.parametrize(
    "numbers", [{"topk": 5}, {"topk": 2**32 - 1, "num_heads": 2**32 - 1}, {"flags": 3}, {"flags": 0}]
)
def test_selections_that_are_not_in_their_payload(numbers: dict[str, int]) -> None:
    with opened() as core:
        assert core.link.send(ME, 1, TENANT, 7.0, selection().SerializeToString())
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
    header = field(2, 0, b"\x02") + field(1, 1, bytes(8)) + field(9, 5, b"abcd") + field(2, 2, b"\x01\x03")
    body = field(14, 2, b"future") + field(4, 2, tensor) + field(2, 0, b"\x00") + field(1, 2, header)
    body += field(3, 2, spans) + field(2, 0, b"\x02") + field(5, 2, b"another's") + field(15, 1, bytes(8))
    message = verdict(pb.AppendKeysRequest.FromString(body))
    assert message is not None and message.spans.starts.tolist() == [5, 6, 7]
    with opened() as core:
        assert core.link.send(ME, 0, TENANT, 7.0, body)
        check_sent(core, message, 7.0)


@pytest.mark.parametrize(
    "wire",
    [
        pb.StreamRequest(request_id=1),
        pb.StreamRequest(cancel=pb.CancelRequest(request_id=1)),
    ],
    ids=["empty", "cancel"],
)
def test_what_is_no_request_for_tokens_is_left(wire: pb.StreamRequest) -> None:
    with opened() as core:
        assert not core.link.send(ME, STREAM, TENANT, 7.0, wire.SerializeToString())


def test_two_of_a_stream_s_requests_in_one_message_are_left() -> None:
    wire = in_stream(0, append()).SerializeToString()
    with opened() as core:
        assert not core.link.send(ME, STREAM, TENANT, 7.0, wire + wire)


@pytest.mark.parametrize(
    ("tenant", "taken"), [("", 0), ("x" * 256, 1), ("x" * 257, 0), ("\x7f", 0), ("ü", 0), (" ~", 1)]
)
def test_tenants(tenant: str, taken: int) -> None:
    with opened() as core:
        assert core.link.send(ME, 0, tenant, 7.0, append().SerializeToString()) == taken


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), float("inf"), 1e10])
def test_timeouts_that_are_none_are_left(timeout: float) -> None:
    with opened() as core:
        assert not core.link.send(ME, 0, TENANT, timeout, append().SerializeToString())


def test_numbers_in_flight_twice_are_left() -> None:
    wire = in_stream(0, append(), 5).SerializeToString()
    with opened() as core:
        assert core.link.send(ME, STREAM, TENANT, 7.0, wire)
        assert not core.link.send(ME, STREAM, TENANT, 7.0, wire)
        assert core.link.send(object(), STREAM, TENANT, 7.0, wire), "another one's"
        core.answer(core.take().ticket, TokenAnswer(9))
        assert [(asker, number) for asker, number, *_ in core.link.take()] == [(ME, 5)]
        assert core.link.send(ME, STREAM, TENANT, 7.0, wire)


def test_more_than_may_wait_and_full_rings_are_left() -> None:
    def fill(core: Core) -> int:
        number = 0
        while core.link.send(ME, STREAM, TENANT, 7.0, in_stream(0, append(), number).SerializeToString()):
            number += 1
        return number

    with opened(max_waiting=3) as core:
        assert fill(core) == 3
    with opened(max_waiting=100) as core:
        assert fill(core) == SLOTS
        core.take()
        assert core.link.send(ME, STREAM, TENANT, 7.0, in_stream(0, append(), 99).SerializeToString())
    with opened(requests=3 * 128 + 64, max_waiting=100) as core:
        assert fill(core) == 3
        ticket = core.take().ticket
        core.answer(ticket, TokenAnswer(9))
        assert len(core.link.take()) == 1
        assert core.link.send(ME, STREAM, TENANT, 7.0, in_stream(0, append(), 99).SerializeToString())


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
    expected: Any = convert.response_of(body, answer)
    wire: Any = body
    if stream:
        wire = in_stream(kind, body, number)
        expected = pb.StreamResponse(request_id=number, **{NAMES[kind]: expected})
    with opened() as core:
        assert core.link.send(ME, STREAM if stream else kind, TENANT, 7.0, wire.SerializeToString())
        core.answer(core.take().ticket, answer, offset=64 * data.draw(st.integers(0, 9)))
        ((asker, told, response, rest),) = core.link.take()
        assert (asker, told, rest) == (ME, number if stream else 0, None)
        assert response is not None and type(expected).FromString(response) == expected
        assert len(response) == expected.ByteSize()
        if ids is not None:
            assert core.segment.counters[AT["answer_bytes_freed"] // 8] > 0
        assert core.link.take() == [] and core.segment.flags[AT["client_sleeps"] // 4] == 1


def waits(core: Core, seconds: float = 5.0) -> bool:
    return core.link.await_alone(core.epoll.fileno(), seconds)


@pytest.mark.parametrize("event", [False, True])
def test_the_only_request_in_flight_is_waited_for_while_there_is_nothing_else_to_do(event: bool) -> None:
    seconds = 0.02

    def looked() -> tuple[float, float]:
        """Seconds that it waited for an answer that does not come, and those of its core."""
        with opened(spin_seconds=1.0) as core:
            core.segment.flags[AT["client_sleeps"] // 4] = 1
            assert core.link.send(ME, STREAM, TENANT, 7.0, in_stream(0, append(), 1).SerializeToString())
            if event:
                os.eventfd_write(core.bell, 1)
            began, took = time.monotonic(), time.thread_time()
            assert not waits(core, seconds)
            assert core.segment.flags[AT["client_sleeps"] // 4] == 0, "nobody rings for what is looked for"
            return time.monotonic() - began, time.thread_time() - took

    waited, took = zip(*(looked() for _ in range(10)), strict=True)
    assert max(waited) < 10
    assert max(took) < seconds / 4 if event else min(waited) >= seconds


def test_its_answer_ends_the_wait() -> None:
    with opened(spin_seconds=1.0) as core:
        assert core.link.send(ME, STREAM, TENANT, 7.0, in_stream(0, append(), 1).SerializeToString())
        core.answer(core.take().ticket, TokenAnswer(9))
        took = time.thread_time()
        assert waits(core)
        assert time.thread_time() - took < 0.001


@pytest.mark.parametrize(("spin_seconds", "requests"), [(0.0, 1), (1.0, 2), (1.0, 0)])
def test_nothing_is_waited_for_beside_others_or_without_spinning(spin_seconds: float, requests: int) -> None:
    with opened(spin_seconds=spin_seconds) as core:
        core.segment.flags[AT["client_sleeps"] // 4] = 1
        for number in range(requests):
            assert core.link.send(ME, STREAM, TENANT, 7.0, in_stream(0, append(), number).SerializeToString())
        assert not waits(core)
        assert core.segment.flags[AT["client_sleeps"] // 4] == 1
        for _ in range(requests):
            core.answer(core.take().ticket, TokenAnswer(9))
        assert waits(core) == (requests > 0)


def test_errors_and_what_python_wrote_come_as_they_are() -> None:
    with opened() as core:
        assert core.link.send(ME, 0, TENANT, 7.0, append().SerializeToString())
        core.answer(core.take().ticket, NotFoundError("no such", Reason.UNKNOWN_SEQUENCE))
        claimed = core.link.claim(ME, 10)
        assert claimed is not None
        core.answer(claimed[0], TokenAnswer(9), offset=64)
        (_, _, response, rest), (_, _, none, other) = core.link.take()
        assert response is None and rest is not None and none is None and other is not None
        numbers = layout.AnswerSlot._make(ANSWER_STRUCT.unpack(rest[2]))
        error = codec.read_answer(numbers, np.frombuffer(rest[3], np.uint8))
        assert (str(error), rest[0], other[0]) == ("no such [NOT_FOUND, UNKNOWN_SEQUENCE]", 0, 255)
        assert codec.stage_seconds_of(numbers) == {"queue": 0.5}


def test_who_gives_up_is_told_of_no_answer_and_the_engine_hears_of_it() -> None:
    with opened() as core:
        other = object()
        for asker, number in ((ME, 1), (ME, 2), (other, 1)):
            wire = in_stream(0, append(), number).SerializeToString()
            assert core.link.send(asker, STREAM, TENANT, 7.0, wire)
        tickets = [core.take().ticket for _ in range(3)]
        assert core.link.give_up(ME, 3) is None
        taken = core.link.give_up(ME, 2)
        assert taken is not None and taken[:3] == (ME, 2, 3) and taken[4] == tickets[1]
        assert core.link.cancel(tickets[1])
        assert core.take()[:2] == (tickets[1], None)
        assert core.link.on_short_way == 2
        assert [each[0] for each in core.link.give_up_all(other)] == [other]
        assert [each[:2] for each in core.link.give_up_all(None)] == [(ME, 1)]
        for ticket in tickets:
            core.answer(ticket, TokenAnswer(9))
        assert core.link.take() == []
        assert core.segment.flags[AT["client_sleeps"] // 4] == 1, "it looked again before it lay down"
        assert core.link.waiting == 0


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
            assert core.link.send(ME, STREAM, TENANT, 7.0, wire)
            core.answer(core.take().ticket, TokenAnswer(9))
        core.spoil(**numbers)
        assert [number for _, number, *_ in core.link.take()] == [1]
        with pytest.raises(ValueError, match=words):
            core.link.take()
        assert core.link.on_short_way == 1, "it can still be refused"


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
            _native.Link(core.segment.memory, core.bell)


def test_answers_are_timed() -> None:
    with opened() as core:
        waits = (0.0, 0.005, 0.0)
        for number, seconds in enumerate(waits):
            wire = in_stream(0, append(), number).SerializeToString()
            assert core.link.send(ME, STREAM, TENANT, 7.0, wire)
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
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2000), st.integers(0, 100)), max_size=120))
def test_extents_never_overlap_and_all_room_comes_back(steps: list[tuple[bool, int, int]]) -> None:
    with opened(requests=ARENA, slots=256) as core:
        taken: dict[int, tuple[int, int]] = {}

        def give_back(offset: int) -> None:
            core.answer(taken.pop(offset)[0], TokenAnswer(9))
            assert len(core.link.take()) == 1

        for gives_back, size, which in steps:
            if gives_back and taken:
                give_back(sorted(taken)[which % len(taken)])
                continue
            wanted = aligned(max(size, 1))
            used = sorted((offset, offset + length) for offset, (_, length) in taken.items())
            edges = [0, *(edge for extent in used for edge in extent), ARENA]
            holes = [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if end - begin >= wanted]
            place = core.link.claim(ME, size)
            assert (place and place[2]) == (holes[0][0] if holes else None), "the lowest hole that is wide enough"
            if place is not None:
                taken[place[2]] = (place[0], wanted)
        for offset in list(taken):
            give_back(offset)
        place = core.link.claim(ME, ARENA)
        assert place is not None and place[2] == 0


def test_garbage_is_no_message() -> None:
    """What protobuf cannot read is left to it, too."""
    with pytest.raises(DecodeError):
        pb.StreamRequest.FromString(b"\x0a\xff")
    with opened() as core:
        assert not core.link.send(ME, STREAM, TENANT, 7.0, b"\x0a\xff")
