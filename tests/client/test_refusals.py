"""A request that cannot be is refused in the same words, whoever asks in whatever way, and changes nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

import blockdex
from blockdex import Reason, ResourceExhaustedError
from blockdex.contract.limits import TENANT_KEY
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1.indexer_pb2_grpc import IndexerServiceStub
from support.clients import connect, new_sequence
from support.serving import Serving
from support.wire import close_request

Words = tuple[str, str, str]
"""Code, reason and message of a refusal."""


@pytest.fixture
def client(flavour: Any, small_server: Serving) -> Iterator[blockdex.Client]:
    with connect(flavour, small_server.grpc_address) as client:
        yield client


@pytest.fixture
def stub(small_server: Serving) -> Iterator[Any]:
    with grpc.insecure_channel(small_server.grpc_address) as channel:
        yield IndexerServiceStub(channel)


def server_words(method: Any, request: Any) -> Words:
    with pytest.raises(grpc.RpcError) as refused:
        method(request, timeout=10)
    call: Any = refused.value
    (details,) = [value for key, value in call.trailing_metadata() if key == "grpc-status-details-bin"]
    status, info = status_pb2.Status.FromString(details), error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return call.code().name, info.reason, status.message


def client_words(call: Callable[[], Any]) -> Words:
    with pytest.raises(blockdex.BlockdexError) as refused:
        call()
    return refused.value.code.name, str(refused.value.reason), refused.value.message


def tensor(array: Any) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DTYPE_FP32, data=np.ascontiguousarray(array).tobytes())


def request_of(kind: Any, arguments: dict[str, Any]) -> Any:
    """The request that a client would send if it checked nothing."""
    fields = copy.copy(arguments)
    spans = pb.Spans(
        sequence_ids=fields.pop("sequences"),
        starts=fields.pop("starts"),
        lengths=fields.pop("lengths"),
        revisions=fields.pop("revisions", None),
    )
    tensors = {name: tensor(fields.pop(name)) for name in ("keys", "queries") if name in fields}
    return kind(spans=spans, **tensors, **fields)


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


ONE: dict[str, Any] = {"layer": 0, "sequences": [7], "starts": [0], "lengths": [2]}
KEYS = ONE | {"keys": zeros(2, 128)}
QUERIES = ONE | {"queries": zeros(2, 4, 128)}
FIVE: dict[str, Any] = {"sequences": [1, 2, 3, 4, 5], "starts": [0] * 5, "lengths": [1] * 5, "keys": zeros(5, 128)}

WRONG: dict[str, tuple[str, dict[str, Any], Reason]] = {
    "layer": ("append_keys", KEYS | {"layer": 3}, Reason.INVALID_LAYER),
    "layer of a selection": ("select_blocks", QUERIES | {"layer": 2**32 - 1}, Reason.INVALID_LAYER),
    "first head": ("select_blocks", QUERIES | {"first_head": 4}, Reason.INVALID_HEADS),
    "heads": ("select_blocks", QUERIES | {"first_head": 2, "num_heads": 3}, Reason.INVALID_HEADS),
    "no spans": ("append_keys", KEYS | {"sequences": [], "starts": [], "lengths": []}, Reason.INVALID_SPANS),
    "too many spans": ("append_keys", KEYS | FIVE, Reason.INVALID_SPANS),
    "fewer starts": ("append_keys", KEYS | {"sequences": [7, 8], "lengths": [1, 1]}, Reason.INVALID_SPANS),
    "fewer lengths": ("append_keys", KEYS | {"sequences": [7, 8], "starts": [0, 0]}, Reason.INVALID_SPANS),
    "fewer revisions": ("append_keys", KEYS | {"revisions": [3, 4]}, Reason.INVALID_SPANS),
    "length 0": ("append_keys", KEYS | {"lengths": [0]}, Reason.INVALID_SPANS),
    "beyond the longest": ("append_keys", KEYS | {"starts": [2**20 - 1]}, Reason.INVALID_SPANS),
    "twice": (
        "append_keys",
        KEYS | {"sequences": [8, 8], "starts": [0, 0], "lengths": [1, 1]},
        Reason.DUPLICATE_SEQUENCE,
    ),
    "too few keys": ("append_keys", KEYS | {"keys": zeros(1, 128)}, Reason.INVALID_TENSOR),
    "keys of both": (
        "append_and_select",
        KEYS | {"queries": zeros(2, 4, 128), "keys": zeros(3, 128)},
        Reason.INVALID_TENSOR,
    ),
    "too large": (
        "append_and_select",
        KEYS | {"queries": zeros(30, 4, 128), "lengths": [30], "keys": zeros(30, 128)},
        Reason.MESSAGE_TOO_LARGE,
    ),
}
RPCS: dict[str, tuple[str, Any]] = {
    "append_keys": ("AppendKeys", pb.AppendKeysRequest),
    "select_blocks": ("SelectBlocks", pb.SelectBlocksRequest),
    "append_and_select": ("AppendAndSelect", pb.AppendAndSelectRequest),
}


@pytest.mark.parametrize("name", WRONG)
def test_every_client_is_refused_in_the_words_of_the_server(client: blockdex.Client, stub: Any, name: str) -> None:
    method, arguments, reason = WRONG[name]
    rpc, kind = RPCS[method]
    words = client_words(lambda: getattr(client, method)(**arguments))
    assert words == server_words(getattr(stub, rpc), request_of(kind, arguments))
    assert words[1] == reason


def test_lengths_of_forks_and_truncations_too(client: blockdex.Client, stub: Any) -> None:
    fork = pb.ForkSequenceRequest(parent_id=7, child_id=8, length=2**20 + 1)
    assert client_words(lambda: client.fork_sequence(7, 8, 2**20 + 1)) == server_words(stub.ForkSequence, fork)
    cut = pb.TruncateSequenceRequest(sequence_id=7, length=2**20 + 1)
    assert client_words(lambda: client.truncate_sequence(7, 2**20 + 1)) == server_words(stub.TruncateSequence, cut)


@pytest.mark.parametrize("tenant", ["", "x" * 257])
def test_a_tenant_that_cannot_be(flavour: Any, stub: Any, tenant: str) -> None:
    method = functools.partial(stub.CloseSequences, metadata=((TENANT_KEY, tenant),))
    assert client_words(lambda: flavour[0]("127.0.0.1:1", tenant=tenant)) == server_words(method, close_request(1))


@pytest.mark.parametrize("tenant", ["ä", "a\nb"])
def test_a_tenant_that_metadata_cannot_carry(flavour: Any, tenant: str) -> None:
    words = client_words(lambda: flavour[0]("127.0.0.1:1", tenant=tenant))
    assert words == ("INVALID_ARGUMENT", "INVALID_TENANT", f"blockdex-tenant: must be printable ASCII, got {tenant!r}")


def test_tenants_do_not_see_each_other(flavour: Any, small_server: Serving) -> None:
    sequence = new_sequence()
    with (
        connect(flavour, small_server.grpc_address, tenant="one") as one,
        connect(flavour, small_server.grpc_address, tenant="two") as two,
    ):
        one.open_sequence(sequence)
        two.open_sequence(sequence)
        one.append_keys(0, sequences=sequence, keys=zeros(3, 128))
        assert two.get_sequence(sequence).lengths[0] == 0
        one.close_sequence(sequence)
        two.append_keys(0, sequences=sequence, keys=zeros(1, 128))
        two.close_sequence(sequence)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "queries",
            {"queries": np.zeros((4, 2, 128), np.float32)},
            "queries: shape must be [2, 4, 128], got [4, 2, 128]",
        ),
        ("queries", {"num_heads": 2}, "queries: shape must be [2, 2, 128], got [2, 4, 128]"),
        ("queries", {"queries": zeros(2, 1, 128)}, "queries: shape must be [2, 4, 128], got [2, 1, 128]"),
        ("keys", {"keys": zeros(2, 256)}, "keys: shape must be [2, 128], got [2, 256]"),
        ("keys", {"keys": np.array(1, np.float32)}, "keys: shape must be [2, 128], got []"),
        ("keys", {"keys": np.zeros((128, 2), np.float32)}, "keys: shape must be [2, 128], got [128, 2]"),
        ("keys", {"keys": np.zeros(256, np.float32)}, "keys: shape must be [2, 128], got [256]"),
        (
            "keys",
            {"keys": np.zeros((2, 128))},
            "keys: dtype must be one of bf16, fp16, fp32, fp8_e4m3, got float64",
        ),
    ],
)
def test_what_only_the_client_can_see(
    client: blockdex.Client, name: str, arguments: dict[str, Any], message: str
) -> None:
    arguments = {"keys": zeros(2, 128), "queries": zeros(2, 4, 128)} | arguments
    code, reason, words = client_words(lambda: client.append_and_select(**ONE, **arguments))
    assert (code, reason, words) == ("INVALID_ARGUMENT", "INVALID_TENSOR", message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequences": [-1]}, "sequences must be 0 to 18446744073709551615, got -1"),
        ({"sequences": np.array([5, -2])}, "sequences must be 0 to 18446744073709551615, got -2"),
        ({"starts": [2**32]}, "starts must be 0 to 4294967295, got 4294967296"),
        ({"lengths": -3}, "lengths must be 0 to 4294967295, got -3"),
        ({"revisions": 2**64}, "revisions must be 0 to 18446744073709551615, got 18446744073709551616"),
        ({"sequences": [7, 8], "lengths": None}, "lengths: may be left out for 1 sequence only, got 2"),
        ({"epoch": -1}, "epoch must be 0 to 18446744073709551615, got -1"),
        ({"epoch": 2**64}, "epoch must be 0 to 18446744073709551615, got 18446744073709551616"),
        ({"lengths": None, "keys": zeros(0, 128)}, "sequence 7: length must be at least 1, got 0"),
    ],
)
def test_integers_that_the_wire_cannot_carry(client: blockdex.Client, arguments: dict[str, Any], message: str) -> None:
    code, reason, words = client_words(lambda: client.append_keys(**(KEYS | arguments)))
    assert (code, reason, words) == ("INVALID_ARGUMENT", "INVALID_SPANS", message)


def test_ids_that_the_wire_cannot_carry(client: blockdex.Client) -> None:
    calls: dict[str, Callable[[], object]] = {
        "sequences must be 0 to 18446744073709551615, got -1": lambda: client.open_sequence(-1),
        "sequence_id must be 0 to 18446744073709551615, got 18446744073709551616": lambda: client.get_sequence(2**64),
        "sequences must be 0 to 18446744073709551615, got -2": lambda: client.close_sequence(-2),
        "sequence_id must be 0 to 18446744073709551615, got -3": lambda: client.truncate_sequence(-3, 0),
        "child_id must be 0 to 18446744073709551615, got -4": lambda: client.fork_sequence(1, -4, 0),
        "lease_seconds must be 0 to 4294967295, got -5": lambda: client.open_sequence(1, lease_seconds=-5),
        "epoch must be 0 to 18446744073709551615, got -6": lambda: client.open_sequence(1, epoch=-6),
        "epoch must be 0 to 18446744073709551615, got -7": lambda: client.get_sequence(1, epoch=-7),
        "epoch must be 0 to 18446744073709551615, got -8": lambda: client.close_sequence(1, epoch=-8),
        "epoch must be 0 to 18446744073709551615, got -9": lambda: client.truncate_sequence(1, 0, epoch=-9),
        "epoch must be 0 to 18446744073709551615, got -10": lambda: client.fork_sequence(1, 2, 0, epoch=-10),
        "epoch must be 0 to 18446744073709551615, got -11": lambda: client.select_blocks(**QUERIES, epoch=-11),
    }
    for message, call in calls.items():
        assert client_words(call) == ("INVALID_ARGUMENT", "INVALID_SPANS", message)


def test_what_is_no_tensor_and_no_integer(client: blockdex.Client) -> None:
    with pytest.raises(TypeError, match="keys must be a numpy array or a torch tensor, got list"):
        client.append_keys(**(KEYS | {"keys": [[0.0] * 128] * 2}))
    with pytest.raises(TypeError, match="keys must be a numpy array or a torch tensor, got list"):
        client.append_keys(**(KEYS | {"keys": [[0.0] * 128] * 2, "lengths": None}))
    with pytest.raises(TypeError, match="queries must be a numpy array or a torch tensor, got NoneType"):
        client.select_blocks(**(QUERIES | {"queries": None, "lengths": None}))
    with pytest.raises(TypeError, match=r"starts must be integers, got \[?1.5"):
        client.append_keys(**(KEYS | {"starts": [1.5]}))
    with pytest.raises(TypeError, match="sequences must be integers, got 's"):
        client.append_keys(**(KEYS | {"sequences": "seven"}))


@pytest.mark.parametrize("scores", ["cooked", 1, None])
def test_scores_that_are_none(client: blockdex.Client, scores: Any) -> None:
    code, reason, words = client_words(lambda: client.select_blocks(**QUERIES, return_scores=scores))
    assert (code, reason) == ("INVALID_ARGUMENT", "INVALID_SCORES")
    assert words == f"return_scores must be one of False, True, raw, got {scores}"


@pytest.mark.parametrize("order", ["falling", [], None])
def test_an_order_that_is_none(client: blockdex.Client, order: Any) -> None:
    arguments = QUERIES | {"order": order}
    code, reason, words = client_words(lambda: client.select_blocks(**arguments))
    assert (code, reason) == ("INVALID_ARGUMENT", "INVALID_ORDER")
    assert words == f"order must be one of ascending, score, got {order}"


def test_more_positions_than_there_are(client: blockdex.Client) -> None:
    sequence = new_sequence()
    client.open_sequence(sequence)
    client.append_keys(0, sequences=sequence, keys=zeros(2, 128))
    words = client_words(lambda: client.select_blocks(0, sequences=sequence, queries=zeros(3, 4, 128)))
    assert words[2] == f"sequence {sequence}, layer 0: its last 3 positions are asked for, its length is 2"
    client.close_sequence(sequence)


def test_a_message_that_grpc_itself_finds_too_large(stub: Any) -> None:
    from blockdex.client.failures import error_of_call

    request = request_of(pb.AppendKeysRequest, KEYS | {"keys": zeros(600, 128)})
    with pytest.raises(grpc.RpcError) as refused:
        stub.AppendKeys(request, timeout=10)
    error = error_of_call(refused.value, "AppendKeys")
    assert isinstance(error, ResourceExhaustedError)
    assert error.reason == Reason.MESSAGE_TOO_LARGE


def test_a_method_that_is_not_there(small_server: Serving) -> None:
    from blockdex.client.failures import error_of_call

    with grpc.insecure_channel(small_server.grpc_address) as channel:
        method: Any = channel.unary_unary("/blockdex.v1.IndexerService/Guess")
        with pytest.raises(grpc.RpcError) as refused:
            method(b"", timeout=10)
    error = error_of_call(refused.value, "Guess at here")
    assert isinstance(error, blockdex.UnimplementedError)
    assert error.reason == "UNIMPLEMENTED"
    assert error.message.startswith("Guess at here: ")
