"""Requests about sequences, answers and reports as plain data, without torch and gRPC.

Token requests have no class here: they go from the wire into the ring, and back, in C (`csrc/wire`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from blockdex_kernels import IndexSpec

FloatDtype = Literal["bf16", "fp16", "fp32", "fp8_e4m3"]
Order = Literal["ascending", "score"]

Phase = Literal["append", "decode", "prefill", "sequence"]
Stage = Literal["queue", "plan", "device", "reply"]

KERNEL_PHASES: tuple[Phase, ...] = ("append", "decode", "prefill")
PHASES: tuple[Phase, ...] = (*KERNEL_PHASES, "sequence")
"""What a request comes to: keys alone, queries of short spans, queries of a long one, or nothing for a kernel."""

STAGES: tuple[Stage, ...] = ("queue", "plan", "device", "reply")
"""Where a request's time in the engine goes, in order."""


@dataclass(frozen=True, slots=True)
class OpenSequences:
    """Opens empty sequences, all or none; a lease of 0 seconds stands for the server's default.

    Attributes:
        sequence_ids: N of them, no two alike.
        lease_seconds: N of them.
    """

    tenant: str
    epoch: int
    sequence_ids: tuple[int, ...]
    lease_seconds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GetSequence:
    """Asks for a sequence's lengths and revisions."""

    tenant: str
    epoch: int
    sequence_id: int


@dataclass(frozen=True, slots=True)
class ForkSequence:
    """Opens `child_id` as a prefix of `parent_id`."""

    tenant: str
    epoch: int
    parent_id: int
    child_id: int
    length: int


@dataclass(frozen=True, slots=True)
class TruncateSequence:
    """Cuts every layer to at most `length` tokens."""

    tenant: str
    epoch: int
    sequence_id: int
    length: int


@dataclass(frozen=True, slots=True)
class CloseSequences:
    """Gives up sequences, no two alike."""

    tenant: str
    epoch: int
    sequence_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CreatePool:
    """Sets pages aside, and a table of rows."""

    tenant: str
    epoch: int
    pool_id: int
    num_pages: int
    num_rows: int
    max_blocks: int


@dataclass(frozen=True, slots=True)
class SetPageTables:
    """Writes runs of cells.

    Attributes:
        rows, first_blocks, counts: N of each.
        page_ids: the sum of the counts.
    """

    tenant: str
    epoch: int
    pool_id: int
    rows: Sequence[int]
    first_blocks: Sequence[int]
    counts: Sequence[int]
    page_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class ClosePool:
    """Gives up a pool."""

    tenant: str
    epoch: int
    pool_id: int


SequenceRequest = (
    OpenSequences
    | GetSequence
    | ForkSequence
    | TruncateSequence
    | CloseSequences
    | CreatePool
    | SetPageTables
    | ClosePool
)
"""A request on the life of sequences or pools."""


@dataclass(frozen=True, slots=True)
class SequenceState:
    """Answer to a sequence request: `lengths` int64 `[L]` and `revisions` uint64 `[L]`; None after open and close."""

    epoch: int
    lengths: NDArray[np.int64] | None = None
    revisions: NDArray[np.uint64] | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that requests must keep, as `blockdex.v1.Limits` says."""

    max_message_bytes: int
    max_spans: int
    max_queued_requests: int
    max_stream_requests: int
    max_wait_ms: int
    max_queue_ms: int = 1000
    max_link_regions: int = 256
    max_link_region_bytes: int = 16 << 30
    max_region_bytes: int = 64 << 30


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """State of the cache, as `blockdex.v1.CacheUsage` says."""

    pages_total: int
    pages_used: int
    pages_shared: int
    capacity_tokens: int
    page_bytes: int
    sequences: int
    evictions: int
    pools: int


@dataclass(frozen=True, slots=True)
class CacheOverview:
    """What the pages and sequences are like, without saying whose they are.

    The pages are drawn as C cells of `pages_per_cell` consecutive page ids, the last one of the rest. A page that is
    neither idle nor private nor shared is free.

    Attributes:
        pages_total: pages there are.
        pages_per_cell: pages of a cell.
        private: int64 `[C]`, pages that one sequence holds.
        shared: int64 `[C]`, pages that several sequences hold.
        idle: int64 `[C]`, pages that only sequences past their lease hold, one or several; counted nowhere else.
        idle_sequences: sequences past their lease.
        tokens: tokens of all sequences, each as long as its longest layer; a shared prefix counts once for each.
        lengths: int64 `[B]`, sequences by length: `lengths[b]` are at most `length_bounds[b]` long.
        length_bounds: tokens.
    """

    pages_total: int
    pages_per_cell: int
    private: NDArray[np.int64]
    shared: NDArray[np.int64]
    idle: NDArray[np.int64]
    idle_sequences: int
    tokens: int
    lengths: NDArray[np.int64]
    length_bounds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PhaseTotals:
    """What the requests and launches of one phase came to.

    Attributes:
        requests: requests answered.
        tokens: tokens that kernels worked on.
        device_seconds: time of its launches on the device.
        stage_seconds: time of its requests, all together, by stage.
    """

    requests: int
    tokens: int
    device_seconds: float
    stage_seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Totals:
    """What the engine did since it started.

    Attributes:
        requests: requests taken into batches.
        batches: batches run.
        phases: by phase, what its requests and launches came to.
        dropped: requests given up before any work, by why.
        busy_seconds: time in which the engine was not waiting for work.
        device_busy_seconds: time in which at least one launch was on the device.
        uptime_seconds: since counting began.
    """

    requests: int
    batches: int
    phases: dict[str, PhaseTotals]
    dropped: dict[str, int]
    busy_seconds: float
    device_busy_seconds: float
    uptime_seconds: float


@dataclass(frozen=True, slots=True)
class Info:
    """What the engine is, holds and can do.

    Attributes:
        device_name: empty where the product is not known.
        socket: path that it listens on for clients on its host; empty where it does not.
        region_kinds: of memory that these may share.
    """

    spec: IndexSpec
    limits: Limits
    cache: CacheUsage
    epoch: int
    device: str
    device_name: str
    kernels: dict[str, tuple[str, str]]
    socket: str = ""
    region_kinds: tuple[str, ...] = ()

    @property
    def transports(self) -> tuple[str, ...]:
        """Ways to reach it, as `GetInfo` names them."""
        if not self.socket:
            return ("grpc",)
        channels = ("device_channel",) if "cuda_fd" in self.region_kinds else ()
        return ("grpc", f"ring:{self.socket}", *channels)
