"""Between protobuf and the ring, but for what `blockdex._native` reads and writes: token requests and responses."""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from blockdex.contract.errors import InvalidArgumentError, NotFoundError, Reason, UnimplementedError
from blockdex.contract.limits import check_even_columns, check_num_rows
from blockdex.contract.messages import (
    ClosePool,
    CloseSequences,
    CreatePool,
    ForkSequence,
    GetSequence,
    Info,
    OpenSequences,
    SequenceRequest,
    SequenceState,
    SetPageTables,
    Totals,
    TruncateSequence,
)
from blockdex.ring.caller import SEQUENCE_RPCS
from blockdex.v1 import indexer_pb2 as pb

_Message = TypeVar("_Message", bound=Message)

FEATURES = (
    pb.FEATURE_HEAD_RANGES,
    pb.FEATURE_REVISIONS,
    pb.FEATURE_WAIT_FOR_KEYS,
    pb.FEATURE_SCORES,
    pb.FEATURE_ROLLBACK,
    pb.FEATURE_RAW_SCORES,
    pb.FEATURE_POOLS,
)
"""What a request may require."""

_PHASES: dict[str, pb.Phase] = {
    "append": pb.PHASE_APPEND,
    "decode": pb.PHASE_DECODE,
    "prefill": pb.PHASE_PREFILL,
    "sequence": pb.PHASE_SEQUENCE,
}
SequenceWireRequest = (
    pb.OpenSequencesRequest
    | pb.GetSequenceRequest
    | pb.ForkSequenceRequest
    | pb.TruncateSequenceRequest
    | pb.CloseSequencesRequest
    | pb.CreatePoolRequest
    | pb.SetPageTablesRequest
    | pb.ClosePoolRequest
)
TokenWireRequest = pb.AppendKeysRequest | pb.SelectBlocksRequest | pb.AppendAndSelectRequest
SequenceWireResponse = (
    pb.OpenSequencesResponse
    | pb.GetSequenceResponse
    | pb.ForkSequenceResponse
    | pb.TruncateSequenceResponse
    | pb.CloseSequencesResponse
    | pb.CreatePoolResponse
    | pb.SetPageTablesResponse
    | pb.ClosePoolResponse
)
_RESPONSES: dict[type[SequenceWireRequest], type[SequenceWireResponse]] = {
    getattr(pb, f"{rpc}Request"): getattr(pb, f"{rpc}Response") for rpc in SEQUENCE_RPCS
}


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


def usual(message: Message) -> bytes:
    """A message as encoders write it, whichever way it came; what this server does not know is left out."""
    message.DiscardUnknownFields()
    return bytes(message.SerializeToString())


def sequence_request(tenant: str, max_spans: int, request: SequenceWireRequest) -> SequenceRequest:
    """The plain message of a request about sequences or pools.

    Raises:
        BlockdexError: as `check_header`; or it names more sequences than a slot can carry.
    """
    check_header(request.header)
    epoch = request.header.epoch
    plain: SequenceRequest
    match request:
        case pb.OpenSequencesRequest(sequences=sequences):
            check_num_rows(max_spans, len(sequences))
            ids = tuple(sequence.sequence_id for sequence in sequences)
            plain = OpenSequences(tenant, epoch, ids, tuple(sequence.lease_seconds for sequence in sequences))
        case pb.GetSequenceRequest():
            plain = GetSequence(tenant, epoch, request.sequence_id)
        case pb.ForkSequenceRequest():
            plain = ForkSequence(tenant, epoch, request.parent_id, request.child_id, request.length)
        case pb.TruncateSequenceRequest():
            plain = TruncateSequence(tenant, epoch, request.sequence_id, request.length)
        case pb.CloseSequencesRequest():
            check_num_rows(max_spans, len(request.sequence_ids))
            plain = CloseSequences(tenant, epoch, tuple(request.sequence_ids))
        case pb.CreatePoolRequest():
            sizes = request.num_pages, request.num_rows, request.max_blocks
            plain = CreatePool(tenant, epoch, request.pool_id, *sizes)
        case pb.SetPageTablesRequest(rows=rows, first_blocks=first_blocks, counts=counts):
            check_num_rows(max_spans, len(rows), "rows")
            check_even_columns(rows=rows, first_blocks=first_blocks, counts=counts)
            plain = SetPageTables(tenant, epoch, request.pool_id, rows, first_blocks, counts, request.page_ids)
        case _:
            plain = ClosePool(tenant, epoch, request.pool_id)
    return plain


def sequence_response(request: SequenceWireRequest, state: SequenceState) -> SequenceWireResponse:
    """What such a request is answered on the wire."""
    response = _RESPONSES[type(request)]
    named: dict[str, Any] = {"epoch": state.epoch, "lengths": state.lengths, "revisions": state.revisions}
    return response(**{name: named[name] for name in response.DESCRIPTOR.fields_by_name})


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


def info_response(info: Info, version: str, *, totals: bool = True) -> pb.GetInfoResponse:
    """What `GetInfo` answers; without totals it is silent about what others have in the cache."""
    spec, limits, cache = info.spec, info.limits, info.cache
    held = pb.CacheUsage(
        pages_used=cache.pages_used,
        pages_shared=cache.pages_shared,
        sequences=cache.sequences,
        evictions=cache.evictions,
        pools=cache.pools,
    )
    response = pb.GetInfoResponse(
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
            max_queue_ms=limits.max_queue_ms,
            max_link_regions=limits.max_link_regions,
            max_link_region_bytes=limits.max_link_region_bytes,
            max_region_bytes=limits.max_region_bytes,
        ),
        cache=pb.CacheUsage(
            pages_total=cache.pages_total, capacity_tokens=cache.capacity_tokens, page_bytes=cache.page_bytes
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
        transports=info.transports,
        region_kinds=info.region_kinds,
    )
    if totals:
        response.cache.MergeFrom(held)
    return response


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
