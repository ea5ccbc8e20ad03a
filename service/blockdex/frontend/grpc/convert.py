"""Between protobuf and the ring, but for what `blockdex._native` reads and writes itself: token requests as encoders
write them, and their responses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from blockdex.contract.errors import InvalidArgumentError, Reason, UnimplementedError
from blockdex.contract.messages import (
    CloseSequence,
    ForkSequence,
    GetSequence,
    Info,
    OpenSequence,
    SequenceRequest,
    SequenceState,
    Totals,
    TruncateSequence,
)
from blockdex.v1 import indexer_pb2 as pb

_Message = TypeVar("_Message", bound=Message)

FEATURES = (
    pb.FEATURE_HEAD_RANGES,
    pb.FEATURE_REVISIONS,
    pb.FEATURE_WAIT_FOR_KEYS,
    pb.FEATURE_SCORES,
)

SequenceWireRequest = (
    pb.OpenSequenceRequest
    | pb.GetSequenceRequest
    | pb.ForkSequenceRequest
    | pb.TruncateSequenceRequest
    | pb.CloseSequenceRequest
)
SequenceWireResponse = (
    pb.OpenSequenceResponse
    | pb.GetSequenceResponse
    | pb.ForkSequenceResponse
    | pb.TruncateSequenceResponse
    | pb.CloseSequenceResponse
)


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


def sequence_request(tenant: str, request: SequenceWireRequest) -> SequenceRequest:
    """The plain message of a request about a sequence.

    Raises:
        UnimplementedError: it insists on a feature that this server does not know.
    """
    _check_features(request.required_features)
    match request:
        case pb.OpenSequenceRequest():
            return OpenSequence(tenant, request.epoch, request.sequence_id, request.lease_seconds)
        case pb.GetSequenceRequest():
            return GetSequence(tenant, request.epoch, request.sequence_id)
        case pb.ForkSequenceRequest():
            return ForkSequence(tenant, request.epoch, request.parent_id, request.child_id, request.length)
        case pb.TruncateSequenceRequest():
            return TruncateSequence(tenant, request.epoch, request.sequence_id, request.length)
        case _:
            return CloseSequence(tenant, request.epoch, request.sequence_id)


def sequence_response(request: SequenceWireRequest, state: SequenceState) -> SequenceWireResponse:
    """What such a request is answered on the wire."""
    lengths, revisions, epoch = state.lengths, state.revisions, state.epoch
    match request:
        case pb.OpenSequenceRequest():
            return pb.OpenSequenceResponse(epoch=epoch)
        case pb.GetSequenceRequest():
            return pb.GetSequenceResponse(lengths=lengths, revisions=revisions, epoch=epoch)
        case pb.ForkSequenceRequest():
            return pb.ForkSequenceResponse(lengths=lengths, epoch=epoch)
        case pb.TruncateSequenceRequest():
            return pb.TruncateSequenceResponse(lengths=lengths, epoch=epoch)
        case _:
            return pb.CloseSequenceResponse(epoch=epoch)


def _check_features(required: Iterable[int]) -> None:
    """Refuses a request that insists on a feature this server does not know."""
    for feature in required:
        if feature not in FEATURES:
            words = f"required_features: {feature} is unknown, known are {FEATURES[0]} to {FEATURES[-1]}"
            raise UnimplementedError(words, Reason.UNKNOWN_FEATURE)


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
            score=spec.score,
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
        kernels=[
            pb.KernelChoice(phase=phase, kernel=kernel, reason=reason)
            for phase, (kernel, reason) in info.kernels.items()
        ],
        version=version,
        features=FEATURES,
        transports=transports,
        totals=_totals(info.totals),
    )


def _totals(totals: Totals) -> pb.Totals:
    return pb.Totals(
        requests=totals.requests,
        batches=totals.batches,
        phases=[
            pb.PhaseTotals(
                phase=phase,
                requests=came_to.requests,
                tokens=came_to.tokens,
                device_seconds=came_to.device_seconds,
                stage_seconds=came_to.stage_seconds,
            )
            for phase, came_to in totals.phases.items()
        ],
        dropped=totals.dropped,
        busy_seconds=totals.busy_seconds,
        device_busy_seconds=totals.device_busy_seconds,
        uptime_seconds=totals.uptime_seconds,
    )
