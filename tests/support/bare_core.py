"""A core without an engine: its cache is filled by the test, its device ends a step when it is told to."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.ring_messages import TokenAnswer, TokenRequest
from blockdex import _native as native
from blockdex.cache import IndexCache
from blockdex.contract.errors import Code
from blockdex.executor.interface import SIGNALS, addresses_of, keys_offset, step_buffer_bytes
from blockdex.ring.handshake import Handles, new_link
from blockdex.ring.segment import Sizes
from blockdex_kernels import IndexSpec
from blockdex_kernels.interface import RUN_SELECTS, RUN_WANTS_SCORES
from support.foreign_frontend import ForeignFrontend
from support.running_engine import TENANT, tokens, values

SPEC = IndexSpec(num_layers=3, num_index_heads=2, head_dim=8, block_size=8, topk=4, max_sequence_tokens=36)
LONGEST = 4
ALL = [(native.MAX_RUNS, 2, 1000), (128, LONGEST, 1000)]
"""Programs for more than any request of these tests."""
LENGTH, HELD = 20, 4
"""Tokens of every layer of every sequence, and pages, of which the last one is empty."""
FIRST_ROW = 1
"""Row of the page tables in which that of the first sequence begins; those of the others come behind it."""

BF16 = 1
SECONDS_BOUNDS, SIZE_BOUNDS = (0.001, 10.0), (1.0, 2.0, 64.0)
SIZES = Sizes(slots=64, request_bytes=1 << 20, answer_bytes=1 << 20)


class Seen(NamedTuple):
    """A step as the device finds it in its room.

    Attributes:
        room: number of the step's memory.
        columns: int32 `[5, R]`.
        keys: bfloat16, as uint16 `[T, D]`.
        queries: likewise `[T, H, D]`.
        targets: uint64 `[T, H]`, addresses that block ids go to; 0 where they go to the room.
        signals: uint64 `[2, SIGNALS]`, addresses, and numbers that are written there in the end.
    """

    room: int
    columns: NDArray[np.int32]
    keys: NDArray[np.uint16]
    queries: NDArray[np.uint16]
    targets: NDArray[np.uint64]
    signals: NDArray[np.uint64]


class Device:
    """Answers every query vector with its own first elements, so that an answer shows whose it is.

    Attributes:
        rooms: memory of the steps, and where their block ids and scores appear.
        begun: steps that were launched and have not ended.
        error: what the next launch returns, or what `run_step_buffer` raises.
    """

    def __init__(self, spec: IndexSpec) -> None:
        heads, tokens = spec.num_index_heads, native.MAX_TOKENS
        self.spec = spec
        size = step_buffer_bytes(spec)
        ids = tokens * heads * spec.topk
        self.rooms = [
            (np.full(size, 0xA5, np.uint8), np.zeros(ids, np.int32), np.zeros(ids, np.float32))
            for _ in range(native.STEPS)
        ]
        self.begun: deque[Seen] = deque()
        self.error = 0
        self._shapes: list[tuple[int, int]] = []
        self._launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(self._begin)

    def replays(self, shapes: Sequence[tuple[int, int, int]]) -> tuple[list[tuple[int, ...]], int, int]:
        """Arguments of `Core.set_replays`, for programs of (runs, length, width)."""
        self._shapes = [(runs, length) for runs, length, _ in shapes]
        programs: list[tuple[int, ...]] = [
            (*shape, 1 + 2 * number, 2 + 2 * number) for number, shape in enumerate(shapes)
        ]
        address = ctypes.cast(self._launch, ctypes.c_void_p).value
        assert address is not None
        return programs, address, 9

    def run_step_buffer(self, room: int, runs: int, num_tokens: int) -> None:
        """As `Executor.run_step_buffer`."""
        if self.error:
            raise RuntimeError(f"error {self.error}, made for this test")
        self._take(room, runs, num_tokens)
        self.end()

    def end(self) -> Seen:
        """Ends the oldest step."""
        seen = self.begun.popleft()
        spec = self.spec
        ids = np.full((len(seen.queries), spec.num_index_heads, spec.topk), -1, np.int32)
        lengths, flags = seen.columns[2], np.repeat(seen.columns[4], seen.columns[2])
        used = int(lengths.sum())
        selected = seen.queries[:used, :, : spec.topk].astype(np.int32)
        ids[:used] = np.where((flags & RUN_SELECTS)[:, None, None] != 0, selected, -1)
        for row, target in zip(ids.reshape(-1, spec.topk), seen.targets.reshape(-1).tolist(), strict=True):
            if target:
                ctypes.memmove(target, row.ctypes.data, row.nbytes)
                row[:] = -1
        for address, number in seen.signals.T.tolist():
            if address:
                ctypes.c_uint64.from_address(address).value = number
        _, block_ids, scores = self.rooms[seen.room]
        block_ids[: ids.size] = ids.reshape(-1)
        wanted = np.flatnonzero(flags & RUN_WANTS_SCORES)
        scores.reshape(-1, spec.num_index_heads, spec.topk)[wanted] = ids[wanted] + 0.5
        return seen

    def _begin(self, program: int, stream: int) -> int:
        assert stream == 9
        error, self.error = self.error, 0
        if not error:
            runs, length = self._shapes[(program - 1) // 2]
            self._take((program - 1) % 2, runs, runs * length)
        return error

    def _take(self, room: int, runs: int, num_tokens: int) -> None:
        host, spec = self.rooms[room][0], self.spec
        keys_at = keys_offset(runs)
        queries_at = keys_at + 2 * num_tokens * spec.head_dim
        end = queries_at + 2 * num_tokens * spec.num_index_heads * spec.head_dim
        columns = host[: 20 * runs].view(np.int32).reshape(5, runs).copy()
        columns[:, columns[2] == 0] = 0  # Padding says nothing but that.
        keys = host[keys_at:queries_at].view(np.uint16).reshape(num_tokens, spec.head_dim).copy()
        shape = (num_tokens, spec.num_index_heads, spec.head_dim)
        queries = host[queries_at:end].view(np.uint16).reshape(shape).copy()
        targets, signals = np.zeros(shape[:2], np.uint64), np.zeros((2, SIGNALS), np.uint64)
        if self._shapes:
            addresses = host[end : end + 8 * addresses_of(spec, num_tokens)].view(np.uint64)
            rows = num_tokens * (1 + spec.num_index_heads)
            sources, targets, signals = np.split(addresses, [rows, rows + num_tokens * spec.num_index_heads])
            _read_rows(sources[:num_tokens], keys)
            _read_rows(sources[num_tokens:], queries.reshape(-1, spec.head_dim))
        targets, signals = targets.reshape(shape[:2]).copy(), signals.reshape(2, SIGNALS).copy()
        self.begun.append(Seen(room, columns, keys, queries, targets, signals))


def _read_rows(addresses: NDArray[np.uint64], rows: NDArray[np.uint16]) -> None:
    """Reads bfloat16 rows that lie elsewhere, in memory of the host that stands for the device's."""
    for address, row in zip(addresses.tolist(), rows, strict=True):
        if address:
            assert address & 15 == BF16, "the others are for the kernel's own test"
            ctypes.memmove(row.ctypes.data, address & ~15, row.nbytes)


class BareCore:
    """A core, the cache that it shares, its device and its clients.

    Args:
        spec: of the indexer.
        sequences: how many there are: 1 to so many of the tenant, in entries from 0 on.
        replays: the device's programs (runs, length, width); None: it runs steps at once, in Python.
        spin_seconds, hold_seconds, max_spans, max_message_bytes, max_queued, odd_keys: see `Core`.
    """

    def __init__(
        self,
        spec: IndexSpec = SPEC,
        *,
        sequences: int = 16,
        replays: Sequence[tuple[int, int, int]] | None = None,
        spin_seconds: float = 0.0,
        hold_seconds: float = 0.0,
        max_spans: int = 1024,
        max_message_bytes: int = 1 << 30,
        max_queued: int = 256,
        odd_keys: bool = False,
        num_pages: int | None = None,
    ) -> None:
        self.spec, self.device = spec, Device(spec)
        self.nudge = os.eventfd(0, os.EFD_NONBLOCK)
        self.core = native.Core(
            layers=spec.num_layers,
            heads=spec.num_index_heads,
            head_dim=spec.head_dim,
            topk=spec.topk,
            init_blocks=spec.init_blocks,
            local_blocks=spec.local_blocks,
            block_size=spec.block_size,
            longest=LONGEST,
            max_sequence_tokens=spec.max_sequence_tokens,
            max_spans=max_spans,
            max_queued=max_queued,
            max_message_bytes=max_message_bytes,
            scale=spec.score_scale,
            odd_keys=odd_keys,
            odd_queries=False,
            nudge=self.nudge,
            spin_seconds=spin_seconds,
            hold_seconds=hold_seconds,
            seconds_bounds=SECONDS_BOUNDS,
            size_bounds=SIZE_BOUNDS,
        )
        self.cache = IndexCache(spec, HELD * sequences if num_pages is None else num_pages)
        held = self.cache._sequences
        for sequence in range(1, sequences + 1):
            self.cache.open_sequences(TENANT, {sequence: 0})
            entry = held.find(TENANT, sequence)
            assert entry == sequence - 1
            held.set_pages(entry, 0, self.cache._pool.allocate(HELD))
            held.lengths[:, entry] = LENGTH
        self.core.set_epoch(self.cache.epoch)
        self.core.set_sequence_columns(*self.cache.sequence_columns)
        for number, room in enumerate(self.device.rooms):
            self.core.set_step(number, *room)
        if replays is None:
            self.core.set_run_step(self.device.run_step_buffer)
        else:
            self.core.set_replays(*self.device.replays(replays))
        self.frontends: list[ForeignFrontend] = []
        self.engine_sides: list[Handles] = []
        self.lines: list[native.ServerLink] = []

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 `[L, S]`, of the cache."""
        return self.cache._sequences.lengths

    @property
    def revisions(self) -> NDArray[np.uint64]:
        """uint64 `[L, S]`, of the cache."""
        return self.cache._sequences.revisions

    def open_client(self, sizes: Sizes = SIZES) -> ForeignFrontend:
        """One more frontend."""
        engine, client = new_link(sizes, epoch=1)
        frontend = ForeignFrontend(client)
        line = native.ServerLink(engine.segment, engine.client_bell, engine.engine_bell)
        self.engine_sides.append(engine)
        self.core.add(line)
        self.frontends.append(frontend)
        self.lines.append(line)
        return frontend

    def both(self, layer: int, *rows: tuple[int, ...], rollback: bool = True, **options: Any) -> TokenRequest:
        """Appends to rows (sequence, start, length[, revision]) and selects for them."""
        length = sum(row[2] for row in rows)
        random = np.random.default_rng([layer, *(abs(number) for row in rows for number in row)])
        keys = values(random, length, self.spec.head_dim)
        queries = values(random, length, self.spec.num_index_heads, self.spec.head_dim)
        return tokens(layer, rows, keys=keys, queries=queries, rollback=rollback, **options)

    def look(self) -> int:
        """Has the core look round once; answers why it returned, but for a device that takes its time."""
        return self.core.run(0.0) & ~native.LATE

    def abandon(self) -> None:
        """Gives up what is on its way."""
        self.core.abandon(Code.INTERNAL, "INTERNAL", "a fault")

    def close(self) -> None:
        """Gives the files back."""
        for frontend in self.frontends:
            frontend.close()
        for engine in self.engine_sides:
            engine.close()
        os.close(self.nudge)

    def take(self) -> list[tuple[Any, ...]]:
        """What the core has left to Python."""
        return list(iter(self.core.take, None))

    @property
    def counted(self) -> dict[str, Any]:
        """What the core counted, by name."""
        return self.core.counts()


@contextmanager
def bare_core(spec: IndexSpec = SPEC, **options: Any) -> Iterator[BareCore]:
    """A core without an engine."""
    made = BareCore(spec, **options)
    try:
        yield made
    finally:
        made.close()


def usual(bare: BareCore) -> TokenRequest:
    """Goes on with one sequence, and writes the end of another one anew."""
    return bare.both(1, (1, LENGTH, 1, 5), (2, LENGTH - 2, 3))


def check_answer(frontend: ForeignFrontend, ticket: int, request: TokenRequest) -> None:
    """Checks that an answer is that of this request: its queries, as the device sends them back."""
    numbers, answer = frontend.told[ticket]
    assert isinstance(answer, TokenAnswer) and answer.block_ids is not None and answer.scores is None
    assert request.queries is not None
    sent = np.frombuffer(request.queries.tensor.data, np.uint16).reshape(-1, SPEC.num_index_heads, SPEC.head_dim)
    np.testing.assert_array_equal(answer.block_ids, sent[:, :, : SPEC.topk])
    assert numbers.phase == 2
    assert min(numbers.queue_seconds, numbers.plan_seconds, numbers.device_seconds, numbers.reply_seconds) >= 0
