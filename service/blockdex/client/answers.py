"""What the clients answer with, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from blockdex.contract.messages import STAGES, CacheUsage, Limits, PhaseTotals, Totals
from blockdex.v1 import indexer_pb2 as pb
from blockdex_kernels import IndexSpec
from blockdex_kernels.spec import KeyDtype

_SCORINGS = {pb.SCORING_BLOCK_MAX: "max"}
_KEY_DTYPES: dict[int, KeyDtype] = {pb.DTYPE_BF16: "bf16", pb.DTYPE_FP8_E4M3: "fp8_e4m3"}


@dataclass(frozen=True, slots=True)
class Info:
    """What a server is, holds and can do.

    Attributes:
        spec: the indexer it serves.
        limits: bounds on requests.
        cache: state of the cache when it was asked.
        epoch: drawn at random when the cache was born; another one means that every sequence is gone.
        device: device of the cache, as torch writes it.
        device_name: its product name; empty where it is not known.
        kernels: phase (`append`, `decode`, `prefill`) to the kernel's name and why it was chosen.
        version: version of the server.
        features: names of the features that a request may require, those that this version knows.
        transports: ways to reach the server.
        region_kinds: of memory that a client on its host may share.
    """

    spec: IndexSpec
    limits: Limits
    cache: CacheUsage
    epoch: int
    device: str
    device_name: str
    kernels: dict[str, tuple[str, str]]
    version: str
    features: frozenset[str]
    transports: tuple[str, ...]
    region_kinds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceState:
    """State of a sequence.

    Attributes:
        lengths: `[L]`, tokens of each layer.
        revisions: `[L]`, revision of each layer, 0 where no append carried one.
        epoch: the cache's epoch.
    """

    lengths: tuple[int, ...]
    revisions: tuple[int, ...]
    epoch: int


def info_of(response: pb.GetInfoResponse) -> Info:
    """The answer of GetInfo as plain data."""
    spec, limits, cache = response.spec, response.limits, response.cache
    known = dict(pb.Feature.items())
    return Info(
        spec=IndexSpec(
            num_layers=spec.num_layers,
            num_index_heads=spec.num_index_heads,
            head_dim=spec.head_dim,
            block_size=spec.block_size,
            topk=spec.topk,
            init_blocks=spec.init_blocks,
            local_blocks=spec.local_blocks,
            score=_SCORINGS.get(spec.scoring, str(spec.scoring)),
            scale=spec.scale,
            key_dtype=_KEY_DTYPES[spec.key_dtype],
            max_sequence_tokens=spec.max_sequence_tokens,
        ),
        limits=Limits(
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
        cache=CacheUsage(
            pages_total=cache.pages_total,
            pages_used=cache.pages_used,
            pages_shared=cache.pages_shared,
            capacity_tokens=cache.capacity_tokens,
            page_bytes=cache.page_bytes,
            sequences=cache.sequences,
            evictions=cache.evictions,
            pools=cache.pools,
        ),
        epoch=response.epoch,
        device=response.device,
        device_name=response.device_name,
        kernels={_phase(choice.phase): (choice.kernel, choice.reason) for choice in response.kernels},
        version=response.version,
        features=frozenset(
            name.removeprefix("FEATURE_") for name, number in known.items() if number in response.features
        ),
        transports=tuple(response.transports),
        region_kinds=tuple(response.region_kinds),
    )


def totals_of(message: pb.GetStatsResponse) -> Totals:
    """The answer of GetStats as plain data."""
    return Totals(
        requests=message.requests,
        batches=message.batches,
        phases={
            _phase(phase.phase): PhaseTotals(
                phase.requests,
                phase.tokens,
                phase.device_seconds,
                {stage: getattr(phase.stage_seconds, stage) for stage in STAGES},
            )
            for phase in message.phases
        },
        dropped={"cancelled": message.dropped_cancelled, "deadline": message.dropped_deadline},
        busy_seconds=message.busy_seconds,
        device_busy_seconds=message.device_busy_seconds,
        uptime_seconds=message.uptime_seconds,
    )


def _phase(number: int) -> str:
    """Its name in the words of the metrics; a later server may have phases that this version does not know."""
    name = pb.Phase.Name(pb.Phase.ValueType(number)) if number in pb.Phase.values() else str(number)
    return name.removeprefix("PHASE_").lower()
