"""The compiled core beside the cache and the device that it shares."""

from __future__ import annotations

from blockdex._native import SIGNALS, STEPS, Core
from blockdex.cache import IndexCache, SequenceColumns
from blockdex.contract.errors import Code
from blockdex.contract.messages import KERNEL_PHASES, PHASES, STAGES, Limits
from blockdex.contract.stats import SECONDS_BUCKETS, SIZE_BUCKETS, Histogram, Stats
from blockdex.executor import interface
from blockdex.executor.interface import Executor, Replays
from blockdex.ring.caller import LINK_RPCS
from blockdex.ring.server import RingInbox

HOLD_SECONDS = 5e-6
"""For which a device channel's request is held for those of other channels that came with it the last time."""


def make_core(inbox: RingInbox, executor: Executor, limits: Limits, decode_queries: int) -> Core:
    """A core that serves the links of an inbox, and whose steps an executor runs; it has no cache yet.

    Args:
        inbox: where links come.
        executor: of the device.
        limits: bounds on requests.
        decode_queries: most tokens of a decode's span.
    """
    spec = executor.backend.spec
    core = Core(
        layers=spec.num_layers,
        heads=spec.num_index_heads,
        head_dim=spec.head_dim,
        topk=spec.topk,
        init_blocks=spec.init_blocks,
        local_blocks=spec.local_blocks,
        block_size=spec.block_size,
        longest=decode_queries,
        max_sequence_tokens=spec.max_sequence_tokens,
        max_spans=limits.max_spans,
        max_queued=limits.max_queued_requests,
        max_queue_seconds=limits.max_queue_ms / 1000,
        max_message_bytes=limits.max_message_bytes,
        scale=spec.score_scale,
        # What becomes e4m3 later on is rounded to odd first, so that both roundings together are one.
        odd_keys=spec.key_dtype == "fp8_e4m3",
        odd_queries=executor.backend.rounds_queries,
        nudge=inbox.nudge,
        spin_seconds=inbox.spin_seconds,
        hold_seconds=HOLD_SECONDS,
        seconds_bounds=SECONDS_BUCKETS,
        size_bounds=SIZE_BUCKETS,
    )
    buffers = executor.step_buffers()
    assert (len(buffers), interface.SIGNALS) == (STEPS, SIGNALS)
    for number, buffer in enumerate(buffers):
        core.set_step(number, buffer.host, buffer.block_ids, buffer.scores)
    if executor.replays is None:
        core.set_run_step(executor.run_step_buffer)
    inbox.serve(core)
    return core


class Shared:
    """What a core shares with a cache and a device: arrays and programs, which are replaced as they grow."""

    def __init__(self, core: Core, executor: Executor, cache: IndexCache) -> None:
        self._core = core
        self._executor = executor
        self._cache = cache
        self._columns: SequenceColumns | None = None
        self._replays: Replays | None = None
        core.set_epoch(cache.epoch)
        self.update()

    def update(self) -> None:
        """Hands the core what has been replaced."""
        columns, replays = self._cache.sequence_columns, self._executor.replays
        if self._columns is None or any(new is not old for new, old in zip(columns, self._columns, strict=True)):
            self._columns = columns
            self._core.set_sequence_columns(*columns)
        if replays is not None and replays is not self._replays:
            self._replays = replays
            steps = [(*step[:-1], *step.programs) for step in replays.steps]
            self._core.set_replays(steps, replays.launch, replays.stream, replays.signal)


def add_counts(core: Core, stats: Stats) -> None:
    """Adds what a core did to a snapshot of what was counted beside it; from any thread."""
    counts = core.counts()
    stages = iter(counts["stages"])
    for phase in PHASES:
        for stage in STAGES:
            stats.stage_seconds[phase][stage].add(Histogram(SECONDS_BUCKETS, *next(stages)))
    for phase in KERNEL_PHASES[:2]:
        stats.launch_requests[phase].add(Histogram(SIZE_BUCKETS, *counts[f"{phase}_requests"]))
        stats.batch_tokens[phase].add(Histogram(SIZE_BUCKETS, *counts[f"{phase}_sizes"]))
        stats.tokens[phase] += counts[f"{phase}_tokens"]
    stats.batch_requests.add(Histogram(SIZE_BUCKETS, *counts["step_requests"]))
    stats.batches += counts["steps"]
    stats.device_seconds["decode"] += counts["device_seconds"]
    stats.device_busy_seconds += counts["device_busy_seconds"]
    stats.busy_seconds += counts["device_busy_seconds"]
    stats.dropped["cancelled"] += counts["cancelled"]
    stats.dropped["deadline"] += counts["late"]
    stats.integrity_checks, stats.integrity_faults = counts["integrity_checks"], counts["integrity_faults"]
    stats.queued, stats.waiting = core.queued, core.waiting
    links = stats.links
    links.seconds = {
        rpc: Histogram(SECONDS_BUCKETS, *each) for rpc, each in zip(LINK_RPCS, counts["calls"], strict=True)
    }
    links.outcomes = [
        (LINK_RPCS[call], Code(code).name if code else "OK", reason, count)
        for call, code, reason, count in counts["outcomes"]
    ]
