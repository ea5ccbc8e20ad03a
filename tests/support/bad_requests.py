"""The table of bad input: requests that a server must refuse, with which code, reason and words.

They are made for a tenant whose sequence A has 300 tokens in layer 0, at revision 5, and 100 in layer 1, and whose
sequence B has 10 in layer 0. FOREIGN is another tenant's, UNKNOWN is nobody's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from blockdex.v1 import indexer_pb2 as pb
from support.wire import append, append_and_select, close_request, keys_of, open_request, queries_of, select, tensor

A, B, FOREIGN, UNKNOWN = 7, 8, 9, 10

_RANDOM = np.random.default_rng(16)
KEYS, QUERIES = keys_of(_RANDOM, 300), queries_of(_RANDOM, 300)


@dataclass(frozen=True)
class Case:
    """A request, and what it is refused with; `{epoch}` in the message stands for the server's."""

    request: Any
    code: str
    reason: str
    message: str


Named = Iterator[tuple[str, Case]]


def append_to(*rows: tuple[int, ...], layer: int = 0, **fields: Any) -> pb.AppendKeysRequest:
    """An append of rows (sequence id, start, length[, revision])."""
    return append(layer, rows, KEYS[: sum(row[2] for row in rows)], **fields)


def select_of(*rows: tuple[int, ...], layer: int = 0, **fields: Any) -> pb.SelectBlocksRequest:
    """A selection of such rows."""
    return select(layer, rows, QUERIES[: sum(row[2] for row in rows)], **fields)


def both_of(*rows: tuple[int, ...], layer: int = 0, **fields: Any) -> pb.AppendAndSelectRequest:
    """Both of such rows."""
    count = sum(row[2] for row in rows)
    return append_and_select(layer, rows, KEYS[:count], QUERIES[:count], **fields)


def columns(**changed: list[int]) -> pb.AppendKeysRequest:
    """A good append of one token to A but for the columns given."""
    whole: dict[str, Any] = {"sequence_ids": [A], "starts": [300], "lengths": [1]}
    return pb.AppendKeysRequest(layer=0, spans=pb.Spans(**(whole | changed)), keys=tensor(KEYS[:1]))


def with_parts(request: Any, **parts: Any) -> Any:
    """A request with other messages in some of its fields."""
    for name, part in parts.items():
        getattr(request, name).CopyFrom(part)
    return request


def _good(**header: Any) -> dict[str, Any]:
    """A request of every RPC that would be done but for what its header says."""
    said: dict[str, Any] = {"header": pb.RequestHeader(**header)}
    return {
        "open": open_request(UNKNOWN, **said),
        "get": pb.GetSequenceRequest(sequence_id=A, **said),
        "fork": pb.ForkSequenceRequest(parent_id=A, child_id=UNKNOWN, length=5, **said),
        "truncate": pb.TruncateSequenceRequest(sequence_id=A, length=5, **said),
        "close": close_request(A, **said),
        "append": append_to((A, 300, 1), **said),
        "select": select_of((A, 299, 1), **said),
        "both": both_of((A, 300, 1), **said),
    }


def _invalid(reason: str, request: Any, message: str) -> Case:
    return Case(request, "INVALID_ARGUMENT", reason, message)


def _sequences() -> Named:
    for whose, sequence in (("unknown", UNKNOWN), ("another tenant's", FOREIGN)):
        requests = {
            "get": pb.GetSequenceRequest(sequence_id=sequence),
            "fork": pb.ForkSequenceRequest(parent_id=sequence, child_id=20, length=5),
            "truncate": pb.TruncateSequenceRequest(sequence_id=sequence, length=5),
            "append": append_to((A, 300, 1), (sequence, 0, 1)),
            "select": select_of((A, 299, 1), (sequence, 0, 1)),
            "waiting select": select_of((A, 299, 1), (sequence, 0, 1), wait_for_keys=True),
            "both": both_of((A, 300, 1), (sequence, 0, 1)),
        }
        message = f"sequence {sequence}: unknown (never opened, closed, or evicted)"
        for rpc, request in requests.items():
            yield f"{whose} sequence, {rpc}", Case(request, "NOT_FOUND", "UNKNOWN_SEQUENCE", message)
    requests = {
        "open": open_request(UNKNOWN, A),
        "fork onto another": pb.ForkSequenceRequest(parent_id=B, child_id=A, length=5),
        "fork onto itself": pb.ForkSequenceRequest(parent_id=A, child_id=A, length=5),
    }
    for name, request in requests.items():
        yield f"open already, {name}", Case(request, "ALREADY_EXISTS", "SEQUENCE_EXISTS", "sequence 7: open already")


def _epochs() -> Named:
    message = "epoch: request names 1, the cache's is {epoch}"
    for rpc, request in _good(epoch=1).items():
        yield f"another epoch, {rpc}", Case(request, "FAILED_PRECONDITION", "EPOCH_MISMATCH", message)


def _positions() -> Named:
    message = "sequence 7, layer 0: append starts at 301, length is 300"
    for rpc, request in {
        "append": append_to((B, 10, 1), (A, 301, 2)),
        "append with a revision": append_to((B, 10, 1, 1), (A, 301, 2, 6)),
        "both": both_of((B, 10, 1), (A, 301, 2)),
    }.items():
        yield f"beyond the length, {rpc}", Case(request, "OUT_OF_RANGE", "APPEND_BEYOND_LENGTH", message)
    message = "sequence 7, layer 0: append starts at 299, length is 300; to roll back takes a revision or rollback"
    for rpc, request in {
        "append": append_to((B, 10, 1), (A, 299, 2)),
        "both": both_of((B, 10, 1), (A, 299, 1)),
        "another has a revision": append_to((B, 5, 1, 6), (A, 299, 1, 0)),
    }.items():
        yield f"before the length, {rpc}", Case(request, "OUT_OF_RANGE", "APPEND_OVERLAPS", message)
    message = "sequence 7, layer 0: selection ends at 301, length is 300"
    for name, request in {
        "select": select_of((B, 0, 1), (A, 299, 2)),
        "waiting at a revision that is there": select_of((A, 299, 2, 5), wait_for_keys=True),
    }.items():
        yield f"not yet appended, {name}", Case(request, "FAILED_PRECONDITION", "KEYS_NOT_APPENDED", message)
    too_long = "sequence 7: length must be 0 to 1048576, got 1048577"
    for rpc, request in {
        "fork": pb.ForkSequenceRequest(parent_id=A, child_id=UNKNOWN, length=1_048_577),
        "truncate": pb.TruncateSequenceRequest(sequence_id=A, length=1_048_577),
    }.items():
        yield f"length of a sequence, {rpc}", _invalid("INVALID_LENGTH", request, too_long)


def _revisions() -> Named:
    message = "sequence 7, layer 0: append has revision 4, the layer is at 5"
    for rpc, request in {
        "append": append_to((B, 10, 1), (A, 300, 1, 4)),
        "both": both_of((B, 10, 1, 9), (A, 300, 1, 4)),
    }.items():
        yield f"stale revision, {rpc}", Case(request, "ABORTED", "STALE_REVISION", message)
    for rpc, (request, end) in {
        "shorter": (append_to((B, 10, 1), (A, 298, 1, 5)), 299),
        "longer": (both_of((B, 10, 1), (A, 298, 3, 5)), 301),
        "with rollback": (append_to((A, 200, 5, 5), rollback=True), 205),
    }.items():
        message = f"sequence 7, layer 0: append ends at {end}, length at its revision 5 is 300"
        yield f"another append at the revision, {rpc}", Case(request, "ABORTED", "STALE_REVISION", message)
    message = "sequence 7, layer 0: selection has revision 4, the layer is at 5"
    for wait in (False, True):
        request = select_of((B, 0, 1, 9), (A, 299, 1, 4), wait_for_keys=wait)
        yield f"stale revision, {'waiting ' * wait}select", Case(request, "ABORTED", "STALE_REVISION", message)
    message = "sequence 7, layer 0: selection has revision 6, the layer is at 5"
    request = select_of((B, 0, 1), (A, 299, 1, 6))
    yield "future revision, select", Case(request, "ABORTED", "FUTURE_REVISION", message)


def _numbers() -> Named:
    for rpc, request in _good().items():
        if rpc in {"append", "select", "both"}:
            request.layer = 3
            yield f"layer, {rpc}", _invalid("INVALID_LAYER", request, "layer must be below 3, got 3")
    for rpc in ("select", "both"):

        def request_of(rpc: str = rpc, **fields: int) -> Any:
            return select_of((A, 299, 1), **fields) if rpc == "select" else both_of((A, 300, 1), **fields)

        message = "first_head must be below 4, got 4"
        yield f"first head, {rpc}", _invalid("INVALID_HEADS", request_of(first_head=4), message)
        for first, count in ((2, 3), (0, 5), (1, 2**32 - 1)):
            message = f"first_head + num_heads must be at most 4, got {first} + {count}"
            request = request_of(first_head=first, num_heads=count)
            yield f"{count} heads from {first} on, {rpc}", _invalid("INVALID_HEADS", request, message)
        message = "order must be one of 0, 1, 2, got 3"
        yield f"order, {rpc}", _invalid("INVALID_ORDER", request_of(order=3), message)
        message = "return_scores must be one of 0, 1, 2, got 3"
        yield f"scores, {rpc}", _invalid("INVALID_SCORES", request_of(return_scores=3), message)


def _spans() -> Named:
    uneven = "spans: columns must be equally long, got"
    limit = "sequence 7: start + length must be at most 1048576, got"
    most = 2**32 - 1
    many = columns(sequence_ids=list(range(4097)), starts=[0] * 4097, lengths=[1] * 4097)
    for name, request, message in (
        ("length 0", append_to((A, 300, 0)), "sequence 7: length must be at least 1, got 0"),
        ("start + length", append_to((A, 1_048_576, 1)), f"{limit} 1048576 + 1"),
        ("start + length, most", columns(starts=[most], lengths=[most]), f"{limit} {most} + {most}"),
        (
            "two starts",
            columns(starts=[300, 300]),
            f"{uneven} 1 sequence_ids, 2 starts, 1 lengths, 1 revisions",
        ),
        ("no length", columns(lengths=[]), f"{uneven} 1 sequence_ids, 1 starts, 0 lengths, 1 revisions"),
        ("two revisions", columns(revisions=[1, 2]), f"{uneven} 1 sequence_ids, 1 starts, 1 lengths, 2 revisions"),
        ("none", columns(sequence_ids=[], starts=[], lengths=[]), "spans: must be 1 to 4096, got 0"),
        ("too many", many, "spans: must be 1 to 4096, got 4097"),
    ):
        yield f"spans, {name}", _invalid("INVALID_SPANS", request, message)
    for rpc, several in {"open": open_request, "close": close_request}.items():
        words = "sequences: must be 1 to 4096, got"
        yield f"no sequence, {rpc}", _invalid("INVALID_SPANS", several(), f"{words} 0")
        yield f"too many sequences, {rpc}", _invalid("INVALID_SPANS", several(*range(20, 4117)), f"{words} 4097")
        message = "sequences: sequence 20 is named 2 times, at most 1 is allowed"
        yield f"a sequence again, {rpc}", _invalid("DUPLICATE_SEQUENCE", several(20, 21, 20), message)
    message = "spans: sequence 8 is named 2 times, at most 1 is allowed"
    rows = ((B, 0, 1), (A, 0, 1), (B, 1, 1), (A, 1, 1), (A, 2, 1))
    for rpc, again in {"append": append_to(*rows), "select": select_of(*rows), "both": both_of(*rows)}.items():
        yield f"one sequence again, {rpc}", _invalid("DUPLICATE_SEQUENCE", again, message)


_DTYPES = "DTYPE_BF16, DTYPE_FP16, DTYPE_FP32, DTYPE_FP8_E4M3"


def _tensors() -> Named:
    for dtype in (0, pb.DTYPE_INT32, 6):
        wrong = pb.Tensor(data=bytes(512))
        wrong.dtype = cast(pb.Dtype, dtype)
        name = pb.Dtype.Name(wrong.dtype) if dtype in pb.Dtype.values() else str(dtype)
        message = f"dtype must be one of {_DTYPES}, got {name}"
        for part, request in {"keys": append_to((A, 300, 1)), "queries": select_of((A, 299, 1))}.items():
            case = _invalid("INVALID_TENSOR", with_parts(request, **{part: wrong}), f"{part}: {message}")
            yield f"dtype {dtype}, {part}", case
    for count in (0, 255, 257, 512):
        keys, queries = (pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(number)) for number in (count, 2 * count + 1))
        message = f"keys: [1, 128] of bf16 takes 256 bytes, got {count}"
        for rpc, request in {"append": append_to((A, 300, 1)), "both": both_of((A, 300, 1))}.items():
            yield f"{count} bytes, {rpc}", _invalid("INVALID_TENSOR", with_parts(request, keys=keys), message)
        message = f"queries: [1, 2, 128] of bf16 takes 512 bytes, got {2 * count + 1}"
        for rpc, request in {
            "select": select_of((A, 299, 1), num_heads=2),
            "both, queries": both_of((A, 300, 1), num_heads=2),
        }.items():
            yield f"{count} bytes, {rpc}", _invalid("INVALID_TENSOR", with_parts(request, queries=queries), message)
    absent = both_of((A, 300, 1))
    absent.ClearField("queries")
    message = f"queries: dtype must be one of {_DTYPES}, got DTYPE_UNSPECIFIED"
    yield "no queries at all", _invalid("INVALID_TENSOR", absent, message)


def _features() -> Named:
    has = "this server has HEAD_RANGES, REVISIONS, WAIT_FOR_KEYS, SCORES, ROLLBACK, RAW_SCORES, POOLS"
    for feature, name in ((0, "UNSPECIFIED"), (pb.FEATURE_BLOCK_HASHES, "BLOCK_HASHES"), (99, "99")):
        message = f"required_features: {name} is not offered, {has}"
        for rpc, request in _good(required_features=[pb.FEATURE_REVISIONS, feature]).items():
            yield f"feature {name}, {rpc}", Case(request, "UNIMPLEMENTED", "UNKNOWN_FEATURE", message)
    message = "model: must be empty, for the only one that is served, got 'other'"
    for rpc, request in _good(model="other").items():
        yield f"model, {rpc}", Case(request, "NOT_FOUND", "UNKNOWN_MODEL", message)


CASES: dict[str, Case] = {
    name: case
    for part in (_sequences, _epochs, _positions, _revisions, _numbers, _spans, _tensors, _features)
    for name, case in part()
}
