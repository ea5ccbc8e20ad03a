"""Requests to a real server with nothing but the generated stub, and what it answers or refuses them with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
import ml_dtypes
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from numpy.typing import NDArray

from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc
from blockdex_kernels import IndexSpec

SPEC = IndexSpec(num_layers=3)
"""What `serving.SMALL` serves."""

TIMEOUT = 20.0

NUMPY_DTYPES: dict[int, Any] = {
    pb.DTYPE_BF16: ml_dtypes.bfloat16,
    pb.DTYPE_FP16: np.float16,
    pb.DTYPE_FP32: np.float32,
    pb.DTYPE_FP8_E4M3: ml_dtypes.float8_e4m3fn,
}
STREAM_FIELDS: dict[type[Any], str] = {
    getattr(pb, field.message_type.name): field.name
    for field in pb.StreamRequest.DESCRIPTOR.oneofs_by_name["request"].fields
    if field.message_type is not None
}
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Refusal(NamedTuple):
    """A refused request: canonical code, reason and domain of its `ErrorInfo`, message, and that one's numbers."""

    code: str
    reason: str
    domain: str
    message: str


class Wire:
    """A tenant's connection to a server: one call at a time, blocking."""

    def __init__(self, address: str, channel: grpc.Channel, tenant: str) -> None:
        self.address = address
        self.stub = pb_grpc.IndexerServiceStub(channel)
        self.metadata = (("blockdex-tenant", tenant),)
        self._opened: set[int] = set()

    def call(self, request: Any, *, timeout: float = TIMEOUT) -> Any:
        """The answer of the RPC that takes such a request."""
        rpc = type(request).__name__.removesuffix("Request")
        answer = getattr(self.stub, rpc)(request, timeout=timeout, metadata=self.metadata)
        if isinstance(request, pb.OpenSequencesRequest):
            self._opened.update(sequence.sequence_id for sequence in request.sequences)
        elif isinstance(request, pb.ForkSequenceRequest):
            self._opened.add(request.child_id)
        return answer

    def forget_all(self) -> None:
        """Leaves open what was opened here, for instance since the server is gone."""
        self._opened.clear()

    def close_all(self) -> None:
        """Closes what was opened here, so that the server's pages are free again."""
        if self._opened:
            self.call(close_request(*self._opened))

    def refusal(self, request: Any, *, timeout: float = TIMEOUT) -> Refusal:
        """What a request is refused with."""
        try:
            answer = self.call(request, timeout=timeout)
        except grpc.RpcError as error:
            return refusal_of(error)
        raise AssertionError(f"answered: {answer}")

    def stream(self, *requests: pb.StreamRequest) -> list[pb.StreamResponse]:
        """All answers of a stream that carries these requests and is then closed by the client."""
        return list(self.stub.Stream(iter(requests), timeout=TIMEOUT, metadata=self.metadata))


@contextmanager
def wire(address: str, tenant: str) -> Iterator[Wire]:
    """Connects a tenant to a server; what it opens is closed at the end."""
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        connection = Wire(address, channel, tenant)
        yield connection
        connection.close_all()


def poll(condition: Callable[[], bool]) -> None:
    """Asks again until a condition holds, for `TIMEOUT` seconds at most."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


@contextmanager
def refused() -> Iterator[list[Refusal]]:
    """Collects what the call inside is refused with."""
    caught: list[Refusal] = []
    try:
        yield caught
    except grpc.RpcError as error:
        caught.append(refusal_of(error))
    assert caught, "not refused"


def refusal_of(error: Any) -> Refusal:
    """What an RPC failed with; without an `ErrorInfo` reason and domain are empty."""
    trailing = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailing.get("grpc-status-details-bin", b""))
    if not status.details:
        return Refusal(error.code().name, "", "", error.details())
    said = refusal_of_status(status)
    assert (said.code, said.message) == (error.code().name, error.details()), "the status says something else"
    return said


def refusal_of_status(status: status_pb2.Status) -> Refusal:
    """What a request of a stream failed with."""
    detail, *hints = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert len(hints) == (info.reason in {"OVERLOADED", "OUT_OF_PAGES"}), "when to try again"
    assert all(hint.Unpack(error_details_pb2.RetryInfo()) for hint in hints)
    (code,) = [code.name for code in grpc.StatusCode if code.value[0] == status.code]
    return Refusal(code, info.reason, info.domain, status.message)


def in_stream(request_id: int, request: Any, timeout_ms: int = 0) -> pb.StreamRequest:
    """A request as it goes over a stream."""
    field = {STREAM_FIELDS[type(request)]: request}
    return pb.StreamRequest(request_id=request_id, timeout_ms=timeout_ms, **field)


def open_request(*sequence_ids: int, header: pb.RequestHeader | None = None) -> pb.OpenSequencesRequest:
    """A request to open sequences."""
    sequences = [pb.NewSequence(sequence_id=sequence_id) for sequence_id in sequence_ids]
    return pb.OpenSequencesRequest(header=header, sequences=sequences)


def close_request(*sequence_ids: int, header: pb.RequestHeader | None = None) -> pb.CloseSequencesRequest:
    """A request to close sequences."""
    return pb.CloseSequencesRequest(header=header, sequence_ids=sequence_ids)


def spans(*rows: tuple[int, ...]) -> pb.Spans:
    """Spans of rows (sequence id, start, length[, revision])."""
    named = any(len(row) > 3 for row in rows)
    ids, starts, lengths, revisions = zip(*((*row, 0)[:4] for row in rows), strict=True)
    return pb.Spans(sequence_ids=ids, starts=starts, lengths=lengths, revisions=revisions if named else ())


def tensor(values: NDArray[np.float32], dtype: pb.Dtype = pb.DTYPE_BF16) -> pb.Tensor:
    """Values as a tensor with the bytes inside."""
    return pb.Tensor(dtype=dtype, data=values.astype(NUMPY_DTYPES[dtype]).tobytes())


def append(
    layer: int, rows: Sequence[tuple[int, ...]], keys: NDArray[np.float32], **fields: Any
) -> pb.AppendKeysRequest:
    """A request to append."""
    return pb.AppendKeysRequest(layer=layer, spans=spans(*rows), keys=tensor(keys), **fields)


def select(
    layer: int, rows: Sequence[tuple[int, ...]], queries: NDArray[np.float32], **fields: Any
) -> pb.SelectBlocksRequest:
    """A request to select."""
    return pb.SelectBlocksRequest(layer=layer, spans=spans(*rows), queries=tensor(queries), **fields)


def append_and_select(
    layer: int,
    rows: Sequence[tuple[int, ...]],
    keys: NDArray[np.float32],
    queries: NDArray[np.float32],
    **fields: Any,
) -> pb.AppendAndSelectRequest:
    """A request to do both."""
    return pb.AppendAndSelectRequest(
        layer=layer, spans=spans(*rows), keys=tensor(keys), queries=tensor(queries), **fields
    )


def keys_of(random: np.random.Generator, length: int) -> NDArray[np.float32]:
    """Random keys, small integers: exact in every dtype, as are their products."""
    return random.integers(-4, 5, (length, SPEC.head_dim)).astype(np.float32)


def queries_of(random: np.random.Generator, length: int, heads: int = SPEC.num_index_heads) -> NDArray[np.float32]:
    """Random queries, as exact."""
    return random.integers(-4, 5, (length, heads, SPEC.head_dim)).astype(np.float32)


def block_ids_of(response: Any) -> NDArray[np.int32]:
    """int32 `[T, heads * topk]` of an answer."""
    assert response.block_ids.dtype == pb.DTYPE_INT32
    return np.frombuffer(response.block_ids.data, "<i4")
