"""Between the wire and plain messages: requests are checked here for all that needs no cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from blockdex.contract import limits as checks
from blockdex.contract.errors import InvalidArgumentError, NotFoundError, Reason, UnimplementedError
from blockdex.contract.messages import (
    Answer,
    CloseSequences,
    FloatDtype,
    ForkSequence,
    GetSequence,
    Info,
    Keys,
    Limits,
    OpenSequences,
    Order,
    Queries,
    Request,
    Spans,
    TensorData,
    TokenAnswer,
    TokenRequest,
    Totals,
    TruncateSequence,
)
from blockdex.v1 import indexer_pb2 as pb
from blockdex_kernels import IndexSpec

_Message = TypeVar("_Message", bound=Message)

FLOAT_DTYPES: dict[int, FloatDtype] = {
    pb.DTYPE_BF16: "bf16",
    pb.DTYPE_FP16: "fp16",
    pb.DTYPE_FP32: "fp32",
    pb.DTYPE_FP8_E4M3: "fp8_e4m3",
}
_ORDERS: dict[int, Order] = {
    pb.SELECTION_ORDER_UNSPECIFIED: "ascending",
    pb.SELECTION_ORDER_ASCENDING: "ascending",
    pb.SELECTION_ORDER_SCORE: "score",
}
FEATURES = (
    pb.FEATURE_HEAD_RANGES,
    pb.FEATURE_REVISIONS,
    pb.FEATURE_WAIT_FOR_KEYS,
    pb.FEATURE_SCORES,
    pb.FEATURE_ROLLBACK,
)
"""What a request may require."""

_PHASES: dict[str, pb.Phase] = {
    "append": pb.PHASE_APPEND,
    "decode": pb.PHASE_DECODE,
    "prefill": pb.PHASE_PREFILL,
    "sequence": pb.PHASE_SEQUENCE,
}
_SCORE_FORMATS = (pb.SCORE_FORMAT_UNSPECIFIED, pb.SCORE_FORMAT_SCALED, pb.SCORE_FORMAT_RAW)

SequenceWireRequest = (
    pb.OpenSequencesRequest
    | pb.GetSequenceRequest
    | pb.ForkSequenceRequest
    | pb.TruncateSequenceRequest
    | pb.CloseSequencesRequest
)
TokenWireRequest = pb.AppendKeysRequest | pb.SelectBlocksRequest | pb.AppendAndSelectRequest
WireRequest = SequenceWireRequest | TokenWireRequest
SequenceWireResponse = (
    pb.OpenSequencesResponse
    | pb.GetSequenceResponse
    | pb.ForkSequenceResponse
    | pb.TruncateSequenceResponse
    | pb.CloseSequencesResponse
)
TokenWireResponse = pb.AppendKeysResponse | pb.SelectBlocksResponse | pb.AppendAndSelectResponse


def parsed(kind: type[_Message], message: bytes) -> _Message:
    """A message off the wire.

    Raises:
        InvalidArgumentError: the bytes are no such message.
    """
    try:
        return kind.FromString(message)
    except DecodeError:
        words = f"message: its {len(message)} bytes are no {kind.DESCRIPTOR.full_name}"
        raise InvalidArgumentError(words, Reason.MALFORMED_MESSAGE) from None


def message_of(spec: IndexSpec, limits: Limits, tenant: str, request: WireRequest) -> Request:
    """The plain message of a request.

    Raises:
        BlockdexError: a field is out of bounds, whatever the cache holds.
    """
    check_header(request.header)
    epoch = request.header.epoch
    match request:
        case pb.OpenSequencesRequest(sequences=sequences):
            ids = tuple(sequence.sequence_id for sequence in sequences)
            checks.check_sequences(limits.max_spans, ids)
            return OpenSequences(tenant, epoch, ids, tuple(sequence.lease_seconds for sequence in sequences))
        case pb.GetSequenceRequest():
            return GetSequence(tenant, epoch, request.sequence_id)
        case pb.ForkSequenceRequest():
            checks.check_length(spec, request.parent_id, request.length)
            return ForkSequence(tenant, epoch, request.parent_id, request.child_id, request.length)
        case pb.TruncateSequenceRequest():
            checks.check_length(spec, request.sequence_id, request.length)
            return TruncateSequence(tenant, epoch, request.sequence_id, request.length)
        case pb.CloseSequencesRequest():
            checks.check_sequences(limits.max_spans, request.sequence_ids)
            return CloseSequences(tenant, epoch, tuple(request.sequence_ids))
        case _:
            return _token_request(spec, limits, tenant, request)


def response_of(request: WireRequest, answer: Answer) -> SequenceWireResponse | TokenWireResponse:
    """What a request is answered on the wire."""
    if isinstance(answer, TokenAnswer):
        return _token_response(request, answer)
    lengths, revisions, epoch = answer.lengths, answer.revisions, answer.epoch
    match request:
        case pb.OpenSequencesRequest():
            return pb.OpenSequencesResponse(epoch=epoch)
        case pb.GetSequenceRequest():
            return pb.GetSequenceResponse(lengths=lengths, revisions=revisions, epoch=epoch)
        case pb.ForkSequenceRequest():
            return pb.ForkSequenceResponse(lengths=lengths, epoch=epoch)
        case pb.TruncateSequenceRequest():
            return pb.TruncateSequenceResponse(lengths=lengths, epoch=epoch)
        case _:
            return pb.CloseSequencesResponse(epoch=epoch)


def check_header(header: pb.RequestHeader) -> None:
    """Refuses a request that insists on a feature this server does not have, or on a model.

    Raises:
        UnimplementedError: UNKNOWN_FEATURE.
        NotFoundError: UNKNOWN_MODEL.
    """
    for feature in header.required_features:
        if feature not in FEATURES:
            known = ", ".join(map(_feature_name, FEATURES))
            words = f"required_features: {_feature_name(feature)} is not offered, this server has {known}"
            raise UnimplementedError(words, Reason.UNKNOWN_FEATURE, feature=feature)
    if header.model:
        words = f"model: must be empty, for the only one that is served, got {header.model!r}"
        raise NotFoundError(words, Reason.UNKNOWN_MODEL)


def _feature_name(feature: int) -> str:
    return (
        pb.Feature.Name(pb.Feature.ValueType(feature)).removeprefix("FEATURE_")
        if feature in pb.Feature.values()
        else str(feature)
    )


def _token_request(spec: IndexSpec, limits: Limits, tenant: str, message: TokenWireRequest) -> TokenRequest:
    checks.check_layer(spec, message.layer)
    columns = message.spans
    spans = checks.check_spans(
        spec, limits.max_spans, columns.sequence_ids, columns.starts, columns.lengths, columns.revisions
    )
    keys = queries = None
    num_bytes = 0
    if not isinstance(message, pb.SelectBlocksRequest):
        keys = Keys(_tensor("keys", message.keys), message.rollback)
        num_bytes += len(keys.tensor.data)
    if not isinstance(message, pb.AppendKeysRequest):
        queries = _queries(spec, message)
        num_bytes += len(queries.tensor.data)
    checks.check_message_bytes(num_bytes, limits.max_message_bytes)
    _check_shapes(spec, spans, keys, queries)
    return TokenRequest(tenant, message.header.epoch, message.layer, spans, keys, queries)


def _queries(spec: IndexSpec, message: pb.SelectBlocksRequest | pb.AppendAndSelectRequest) -> Queries:
    num_heads = checks.check_heads(spec, message.first_head, message.num_heads)
    order = _ORDERS.get(message.order)
    if order is None:
        raise InvalidArgumentError(
            f"order must be one of {', '.join(map(str, _ORDERS))}, got {message.order}", Reason.INVALID_ORDER
        )
    if message.return_scores not in _SCORE_FORMATS:
        known = ", ".join(map(str, _SCORE_FORMATS))
        raise InvalidArgumentError(
            f"return_scores must be one of {known}, got {message.return_scores}", Reason.INVALID_SCORES
        )
    return Queries(
        tensor=_tensor("queries", message.queries),
        first_head=message.first_head,
        num_heads=num_heads,
        order=order,
        return_scores=message.return_scores != pb.SCORE_FORMAT_UNSPECIFIED,
        wait_for_keys=isinstance(message, pb.SelectBlocksRequest) and message.wait_for_keys,
        raw_scores=message.return_scores == pb.SCORE_FORMAT_RAW,
    )


def _check_shapes(spec: IndexSpec, spans: Spans, keys: Keys | None, queries: Queries | None) -> None:
    tokens = spans.num_tokens
    if keys is not None:
        tensor = keys.tensor
        checks.check_tensor_bytes("keys", tensor.dtype, len(tensor.data), (tokens, spec.head_dim))
    if queries is not None:
        tensor = queries.tensor
        shape = (tokens, queries.num_heads, spec.head_dim)
        checks.check_tensor_bytes("queries", tensor.dtype, len(tensor.data), shape)


def _tensor(name: str, message: pb.Tensor) -> TensorData:
    dtype = FLOAT_DTYPES.get(message.dtype)
    if dtype is None:
        known = ", ".join(map(str, FLOAT_DTYPES))
        raise InvalidArgumentError(f"{name}: dtype must be one of {known}, got {message.dtype}", Reason.INVALID_TENSOR)
    return TensorData(dtype, message.data)


def _token_response(request: WireRequest, answer: TokenAnswer) -> TokenWireResponse:
    if isinstance(request, pb.AppendKeysRequest):
        return pb.AppendKeysResponse(epoch=answer.epoch)
    block_ids, scores = _selection(answer)
    kind = pb.SelectBlocksResponse if isinstance(request, pb.SelectBlocksRequest) else pb.AppendAndSelectResponse
    return kind(block_ids=block_ids, scores=scores, epoch=answer.epoch)


def _selection(answer: TokenAnswer) -> tuple[pb.Tensor, pb.Tensor | None]:
    assert answer.block_ids is not None
    block_ids = pb.Tensor(dtype=pb.DTYPE_INT32, data=answer.block_ids.astype("<i4", copy=False).tobytes())
    if answer.scores is None:
        return block_ids, None
    return block_ids, pb.Tensor(dtype=pb.DTYPE_FP32, data=answer.scores.astype("<f4", copy=False).tobytes())


def info_response(info: Info, version: str, transports: Iterable[str]) -> pb.GetInfoResponse:
    """What `GetInfo` answers."""
    spec, limits, cache = info.spec, info.limits, info.cache
    return pb.GetInfoResponse(
        spec=pb.IndexSpec(
            num_layers=spec.num_layers,
            num_index_heads=spec.num_index_heads,
            head_dim=spec.head_dim,
            block_size=spec.block_size,
            topk=spec.topk,
            init_blocks=spec.init_blocks,
            local_blocks=spec.local_blocks,
            scoring=pb.SCORING_BLOCK_MAX,
            scale=spec.score_scale,
            key_dtype=pb.DTYPE_BF16 if spec.key_dtype == "bf16" else pb.DTYPE_FP8_E4M3,
            max_sequence_tokens=spec.max_sequence_tokens,
        ),
        limits=pb.Limits(
            max_message_bytes=limits.max_message_bytes,
            max_spans=limits.max_spans,
            max_queued_requests=limits.max_queued_requests,
            max_stream_requests=limits.max_stream_requests,
            max_wait_ms=limits.max_wait_ms,
        ),
        cache=pb.CacheUsage(
            pages_total=cache.pages_total,
            pages_used=cache.pages_used,
            pages_shared=cache.pages_shared,
            capacity_tokens=cache.capacity_tokens,
            page_bytes=cache.page_bytes,
            sequences=cache.sequences,
            evictions=cache.evictions,
        ),
        epoch=info.epoch,
        device=info.device,
        device_name=info.device_name,
        kernels=[
            pb.KernelChoice(phase=_PHASES[phase], kernel=kernel, reason=reason)
            for phase, (kernel, reason) in info.kernels.items()
        ],
        version=version,
        features=FEATURES,
        transports=transports,
    )


def stats_response(epoch: int, totals: Totals) -> pb.GetStatsResponse:
    """What `GetStats` answers."""
    return pb.GetStatsResponse(
        epoch=epoch,
        requests=totals.requests,
        batches=totals.batches,
        phases=[
            pb.PhaseStats(
                phase=_PHASES[phase],
                requests=came_to.requests,
                tokens=came_to.tokens,
                device_seconds=came_to.device_seconds,
                stage_seconds=pb.StageSeconds(**came_to.stage_seconds),
            )
            for phase, came_to in totals.phases.items()
        ],
        dropped_cancelled=totals.dropped["cancelled"],
        dropped_deadline=totals.dropped["deadline"],
        busy_seconds=totals.busy_seconds,
        device_busy_seconds=totals.device_busy_seconds,
        uptime_seconds=totals.uptime_seconds,
    )
