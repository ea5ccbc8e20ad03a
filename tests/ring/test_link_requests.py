"""The client's side of a link as it is compiled: which slot a message becomes, or what it is refused with."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdex._native import SENT, UNUSUAL
from blockdex.contract.errors import Code, Reason
from blockdex.frontend.grpc import convert
from blockdex.ring.caller import STREAM
from blockdex.v1 import indexer_pb2 as pb
from support.client_link import (
    DTYPE_NAMES,
    KINDS,
    LIMITS,
    ME,
    NAMES,
    SPEC,
    TENANT,
    append,
    check_sent,
    check_untouched,
    in_stream,
    opened,
    selection,
)

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
        "keys: dtype must be one of DTYPE_BF16, DTYPE_FP16, DTYPE_FP32, DTYPE_FP8_E4M3, got DTYPE_UNSPECIFIED",
    ),
    "int32": (
        with_keys(dtype=pb.DTYPE_INT32, data=bytes(32)),
        Code.INVALID_ARGUMENT,
        Reason.INVALID_TENSOR,
        "keys: dtype must be one of DTYPE_BF16, DTYPE_FP16, DTYPE_FP32, DTYPE_FP8_E4M3, got DTYPE_INT32",
    ),
    "dtype": (
        with_keys(dtype=-1, data=bytes(32)),
        Code.INVALID_ARGUMENT,
        Reason.INVALID_TENSOR,
        "keys: dtype must be one of DTYPE_BF16, DTYPE_FP16, DTYPE_FP32, DTYPE_FP8_E4M3, got -1",
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


HEADER = pb.RequestHeader(epoch=7)

UNREAD: dict[str, tuple[int, bytes]] = {
    "empty": (STREAM, pb.StreamRequest(request_id=1).SerializeToString()),
    "cancel": (STREAM, pb.StreamRequest(cancel=pb.CancelRequest(request_id=1)).SerializeToString()),
    "two requests": (STREAM, 2 * in_stream(0, append()).SerializeToString()),
    "garbage": (STREAM, b"\x0a\xff"),
    "its end is missing": (STREAM, in_stream(0, append()).SerializeToString()[:-1]),
    "model": (STREAM, in_stream(0, pb.AppendKeysRequest(header=pb.RequestHeader(model="m"))).SerializeToString()),
    "open": (STREAM, pb.StreamRequest(open_sequences=pb.OpenSequencesRequest()).SerializeToString()),
    "a second tensor": (
        0,
        (append().SerializeToString() + pb.AppendKeysRequest(keys=append().keys).SerializeToString()),
    ),
    "a number that the end of its header cuts": (0, field(1, 2, field(1, 1, b"1234")) + append().SerializeToString()),
    "a number beyond 64 bits": (0, append().SerializeToString() + field(15, 0, b"\xff" * 9 + b"\x02")),
    "a second header": (0, 2 * pb.AppendKeysRequest(header=HEADER).SerializeToString() + append().SerializeToString()),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_no_token_request_as_encoders_write_it_is_for_protobuf(name: str) -> None:
    rpc, message = UNREAD[name]
    with opened() as core:
        before = bytes(core.segment.memory)
        assert core.send(rpc, message) == UNUSUAL
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


def test_revisions_that_are_left_out_are_not_those_of_the_request_before() -> None:
    with opened() as core:
        for owner, body in enumerate((appending(revisions=[5, 6]), appending())):
            assert core.send(0, body.SerializeToString(), owner) == SENT
            check_sent(core, body, 7.0)


@pytest.mark.parametrize(("timeout", "kept"), [(-1.0, 0), (float("nan"), 0), (float("inf"), 1e9), (1e10, 1e9)])
def test_timeouts_that_no_slot_can_say(timeout: float, kept: float) -> None:
    with opened() as core:
        assert core.link.send(ME, 0, TENANT, timeout, append().SerializeToString()) == SENT
        check_sent(core, append(), kept)
