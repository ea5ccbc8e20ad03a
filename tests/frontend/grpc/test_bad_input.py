"""Every kind of bad input: its code, its reason, its words, over unary and stream; and that nothing changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from blockdex.v1 import indexer_pb2 as pb
from support.bad_requests import (
    CASES,
    FOREIGN,
    KEYS,
    QUERIES,
    UNKNOWN,
    A,
    B,
    append_to,
    both_of,
    columns,
    select_of,
    with_parts,
)
from support.serving import Serving
from support.wire import (
    STREAM_FIELDS,
    TIMEOUT,
    Refusal,
    Wire,
    append,
    append_and_select,
    close_request,
    in_stream,
    open_request,
    poll,
    refusal_of,
    refusal_of_status,
    refused,
    select,
    wire,
)


class State(NamedTuple):
    """What must not change."""

    sequences: list[pb.GetSequenceResponse]
    foreign: pb.GetSequenceResponse
    info: pb.GetInfoResponse
    selections: list[pb.SelectBlocksResponse]


@dataclass
class World:
    """A tenant and the sequences that bad requests are made for, and another tenant, who has FOREIGN."""

    mine: Wire
    other: Wire

    def __post_init__(self) -> None:
        self.before = self.state()
        self.epoch = self.before.info.epoch

    def state(self) -> State:
        """Everything that a request could change."""
        sequences = [self.mine.call(pb.GetSequenceRequest(sequence_id=sequence)) for sequence in (A, B)]
        selections = [
            self.mine.call(select(0, [(A, 260, 40), (B, 0, 10)], QUERIES[:50])),
            self.mine.call(select(1, [(A, 90, 10)], QUERIES[:10])),
        ]
        foreign = self.other.call(pb.GetSequenceRequest(sequence_id=FOREIGN))
        info = self.mine.call(pb.GetInfoRequest())
        return State(sequences, foreign, info, selections)


@pytest.fixture(scope="module")
def world(server: Serving) -> Iterator[World]:
    """The sequences, on the small server, for all tests here: none of them changes anything."""
    with wire(server.grpc_address, "refused") as mine, wire(server.grpc_address, "another than refused") as other:
        yield _fill(mine, other)


@pytest.fixture
def unchanged(world: World) -> Iterator[None]:
    """Compares everything that a request could change before and after a test."""
    before = world.before
    yield
    world.before = world.state()
    assert world.before == before


def _fill(mine: Wire, other: Wire) -> World:
    mine.call(open_request(A))
    mine.call(open_request(B))
    other.call(open_request(FOREIGN))
    mine.call(append(0, [(A, 0, 200)], KEYS[:200]))
    mine.call(append(0, [(A, 200, 100, 5)], KEYS[200:]))
    mine.call(append(1, [(A, 0, 100)], KEYS[:100]))
    mine.call(append(0, [(B, 0, 10)], KEYS[:10]))
    return World(mine, other)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_changes_nothing(world: World, name: str) -> None:
    case = CASES[name]
    expected = Refusal(case.code, case.reason, "blockdex", case.message.format(epoch=world.epoch))
    assert world.mine.refusal(case.request) == expected
    if type(case.request) in STREAM_FIELDS:
        (response,) = world.mine.stream(in_stream(4, case.request))
        assert response.request_id == 4
        assert refusal_of_status(response.error) == expected


@pytest.mark.usefixtures("unchanged")
def test_closing_what_is_not_there_is_fine(world: World) -> None:
    for sequence in (UNKNOWN, FOREIGN):
        world.mine.call(close_request(sequence))


@pytest.mark.parametrize("name", ["", "x" * 257], ids=["empty", "too long"])
def test_invalid_tenant(server: Serving, name: str) -> None:
    expected = Refusal(
        "INVALID_ARGUMENT",
        "INVALID_TENANT",
        "blockdex",
        f"blockdex-tenant: must have 1 to 256 characters, got {len(name)}",
    )
    with wire(server.grpc_address, name) as connection:
        assert connection.refusal(open_request(A)) == expected
        with refused() as caught:
            connection.stream(in_stream(1, append_to((A, 0, 1))))
        assert caught == [expected]


def test_the_longest_tenant_is_one(server: Serving) -> None:
    with wire(server.grpc_address, "x" * 256) as connection:
        connection.call(open_request(A))


@pytest.mark.usefixtures("unchanged")
def test_past_deadline(world: World) -> None:
    """gRPC itself ends a call past its deadline; for a request of a stream it is the server that does."""
    waiting = select_of((A, 300, 1), wait_for_keys=True)
    assert world.mine.refusal(waiting, timeout=0.05).code == "DEADLINE_EXCEEDED"
    (response,) = world.mine.stream(in_stream(1, waiting, timeout_ms=50))
    said = refusal_of_status(response.error)
    assert said[:3] == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "blockdex")
    assert re.fullmatch(r"timeout: 0\.050 s were allowed, \d+\.\d{3} s have passed", said.message)


def test_out_of_pages(tight: Wire, tight_server: Serving) -> None:
    with wire(tight_server.grpc_address, "nobody") as other:
        world = _fill(tight, other)  # all four pages are in use: three by A, one by B
        cases = {
            "append": (append_to((B, 10, 119)), "sequence 8, layer 0: append", 1),
            "append to two": (append_to((B, 10, 119), (A, 300, 85)), "2 sequences, layer 0: append", 2),
            "both": (
                append_and_select(0, [(B, 10, 119)], KEYS[:119], QUERIES[:119, :1], num_heads=1),
                "sequence 8, layer 0: append",
                1,
            ),
            "fork": (
                pb.ForkSequenceRequest(parent_id=A, child_id=20, length=300),
                "sequence 20: fork of sequence 7",
                2,
            ),
        }
        for request, subject, pages in cases.values():
            expected = Refusal(
                "RESOURCE_EXHAUSTED",
                "OUT_OF_PAGES",
                "blockdex",
                f"{subject} is out of pages: {pages} needed, 0 free, 0 evictable, 4 in all",
            )
            assert tight.refusal(request) == expected
            if type(request) in STREAM_FIELDS:
                (response,) = tight.stream(in_stream(1, request))
                assert refusal_of_status(response.error) == expected
        assert world.state() == world.before


def test_message_over_the_limit(tight: Wire) -> None:
    tight.call(open_request(A))
    tight.call(append_to((A, 0, 256)))  # exactly the limit
    cases = {"append": (append_to((A, 256, 257)), 257 * 256), "both": (both_of((A, 256, 60)), 60 * 5 * 256)}
    for request, count in cases.values():
        expected = Refusal(
            "RESOURCE_EXHAUSTED",
            "MESSAGE_TOO_LARGE",
            "blockdex",
            f"keys and queries together must be at most 65536 bytes, got {count}",
        )
        assert tight.refusal(request) == expected
        (response,) = tight.stream(in_stream(1, request))
        assert refusal_of_status(response.error) == expected
    huge = with_parts(append_to((A, 256, 1)), keys=pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(1 << 20)))
    assert tight.refusal(huge).code == "RESOURCE_EXHAUSTED", "so far beyond it is gRPC that refuses"
    assert list(tight.call(pb.GetSequenceRequest(sequence_id=A)).lengths) == [256, 0, 0]


def test_more_spans_than_the_limit(tight: Wire) -> None:
    request = columns(sequence_ids=list(range(9)), starts=[0] * 9, lengths=[1] * 9)
    assert tight.refusal(request).message == "spans: must be 1 to 8, got 9"


def test_overload(tight: Wire) -> None:
    tight.call(open_request(A))
    request = select_of((A, 0, 1), wait_for_keys=True)
    waiting = [tight.stub.SelectBlocks.future(request, timeout=TIMEOUT, metadata=tight.metadata) for _ in range(6)]
    expected = Refusal("RESOURCE_EXHAUSTED", "OVERLOADED", "blockdex", "queue: at most 6 requests may wait, 6 do")
    probe = pb.GetSequenceRequest(sequence_id=A)
    poll(lambda: _refusal_or_none(tight, probe) == expected)
    (response,) = tight.stream(in_stream(1, append_to((A, 0, 1))))
    assert refusal_of_status(response.error) == expected
    # Callers that go leave their places to others.
    for call in waiting:
        call.cancel()
    poll(lambda: _refusal_or_none(tight, probe) is None)
    assert list(tight.call(probe).lengths) == [0, 0, 0]


def _refusal_or_none(connection: Wire, request: Any) -> Refusal | None:
    try:
        connection.call(request)
    except grpc.RpcError as error:
        return refusal_of(error)
    return None


INDEXER = pb.DESCRIPTOR.services_by_name["IndexerService"]
PARSED = [f"{INDEXER.full_name}/{method.name}" for method in INDEXER.methods if method.name != "Stream"]


@pytest.mark.parametrize("method", [*PARSED, "grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"])
def test_bytes_that_are_no_message_are_refused_and_not_logged(server: Serving, method: str) -> None:
    before = len(server.output)
    with grpc.insecure_channel(server.grpc_address) as channel, refused() as refusals:
        if method.endswith("Watch"):
            watch: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{method}")
            list(watch(b"\x0a", timeout=TIMEOUT))
        else:
            ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{method}")
            ask(b"\x0a", timeout=TIMEOUT)
    assert refusals[0][:3] == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE", "blockdex")
    assert not [line for line in server.output[before:] if "Traceback" in line]


def test_reflection_refuses_bytes_that_are_no_message(server: Serving) -> None:
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    good = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    with grpc.insecure_channel(server.grpc_address) as channel:
        reflect: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(method)
        answers = reflect(iter([good, b"\x0a"]), timeout=TIMEOUT)
        listed = reflection_pb2.ServerReflectionResponse.FromString(next(answers)).list_services_response
        assert INDEXER.full_name in {service.name for service in listed.service}
        with refused() as refusals:
            next(answers)
    assert refusals[0][:2] == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")


def test_what_is_far_too_long_is_cut_off_by_its_length(tight: Wire) -> None:
    """The tensors may have 64 KiB, and a MiB more is refused in words; of what is longer the body is not taken."""
    request = select_of((A, 0, 1))
    request.queries.data = bytes(2 << 20)
    with refused() as refusals:
        tight.call(request)
    assert refusals[0].code == "RESOURCE_EXHAUSTED" and "larger than max" in refusals[0].message
