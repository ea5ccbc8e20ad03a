"""A core without an engine: its books are arrays of the test, its device ends a step when it is told to."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockdex import _native as native
from blockdex.contract.errors import Code
from blockdex.contract.messages import TokenAnswer, TokenRequest
from blockdex.ring.handshake import Handles, new_link
from blockdex.ring.segment import Sizes
from blockdex_kernels import IndexSpec
from support.foreign_frontend import ForeignFrontend
from support.running_engine import TENANT, tokens, values

SPEC = IndexSpec(num_layers=3, num_index_heads=2, head_dim=8, block_size=8, topk=4, max_sequence_tokens=36)
LONGEST = 4
ALL = [(native.MAX_RUNS, 2, 1000), (128, LONGEST, 1000)]
"""Programs for more than any request of these tests."""
EPOCH = 77
LENGTH, HELD = 20, 4
"""Tokens of every layer of every sequence, and pages, of which the last one is empty."""

SECONDS_BOUNDS, SIZE_BOUNDS = (0.001, 10.0), (1.0, 2.0, 64.0)
SIZES = Sizes(slots=64, request_bytes=1 << 20, answer_bytes=1 << 20)


class Seen(NamedTuple):
    """A step as the device finds it in its room.

    Attributes:
        room: number of the step's memory.
        columns: int32 `[4, R]`.
        keys: bfloat16, as uint16 `[T, D]`.
        queries: likewise `[T, H, D]`.
    """

    room: int
    columns: NDArray[np.int32]
    keys: NDArray[np.uint16]
    queries: NDArray[np.uint16]


class Device:
    """Answers every query vector with its own first elements, so that an answer shows whose it is.

    Attributes:
        rooms: memory of the steps, and where their block ids appear.
        begun: steps that were launched and have not ended.
        error: what the next launch returns, or what `run_step_buffer` raises.
    """

    def __init__(self, spec: IndexSpec) -> None:
        heads, head_dim, tokens = spec.num_index_heads, spec.head_dim, native.MAX_TOKENS
        self.spec = spec
        size = 16 * native.MAX_RUNS + 2 * tokens * head_dim * (1 + heads)
        self.rooms = [
            (np.full(size, 0xA5, np.uint8), np.zeros(tokens * heads * spec.topk, np.int32)) for _ in range(native.STEPS)
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
        used = int(seen.columns[2].sum())
        ids[:used] = seen.queries[:used, :, : spec.topk]
        self.rooms[seen.room][1][: ids.size] = ids.reshape(-1)
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
        keys_at = 16 * max(runs, 4)
        queries_at = keys_at + 2 * num_tokens * spec.head_dim
        end = queries_at + 2 * num_tokens * spec.num_index_heads * spec.head_dim
        columns = host[: 16 * runs].view(np.int32).reshape(4, runs).copy()
        keys = host[keys_at:queries_at].view(np.uint16).reshape(num_tokens, spec.head_dim).copy()
        shape = (num_tokens, spec.num_index_heads, spec.head_dim)
        self.begun.append(Seen(room, columns, keys, host[queries_at:end].view(np.uint16).reshape(shape).copy()))


class BareLane:
    """A core, the books that it reads and writes, its device and its doors.

    Args:
        spec: of the indexer.
        sequences: how many there are: 1 to so many of the tenant, in columns from 0 on.
        replays: the device's programs (runs, length, width); None: it runs steps at once, in Python.
        spin_seconds, max_spans, max_message_bytes: see `Core`.
    """

    def __init__(
        self,
        spec: IndexSpec = SPEC,
        *,
        sequences: int = 16,
        replays: Sequence[tuple[int, int, int]] | None = None,
        spin_seconds: float = 0.0,
        max_spans: int = native.MAX_RUNS,
        max_message_bytes: int = 1 << 30,
    ) -> None:
        self.spec, self.device = spec, Device(spec)
        self.nudge = os.eventfd(0, os.EFD_NONBLOCK)
        self.core = native.Core(
            layers=spec.num_layers,
            heads=spec.num_index_heads,
            head_dim=spec.head_dim,
            topk=spec.topk,
            block_size=spec.block_size,
            longest=LONGEST,
            max_sequence_tokens=spec.max_sequence_tokens,
            max_spans=max_spans,
            max_message_bytes=max_message_bytes,
            nudge=self.nudge,
            spin_seconds=spin_seconds,
            seconds_bounds=SECONDS_BOUNDS,
            size_bounds=SIZE_BOUNDS,
        )
        # Behind them is a layer more, for which all would be right.
        self.lengths = np.full((spec.num_layers + 1, sequences), LENGTH, np.int64)[:-1]
        self.revisions = np.zeros((spec.num_layers + 1, sequences), np.uint64)[:-1]
        self.held = np.full(sequences, HELD, np.int64)
        self.forked = np.zeros(sequences, np.int64)
        self.last_calls = np.zeros(sequences, np.float64)
        self.first_rows = np.arange(100, 100 + sequences, dtype=np.int32)
        self.generations = np.zeros(sequences, np.uint32)
        self.blocked = np.zeros(sequences, np.uint8)
        self.core.set_epoch(EPOCH)
        self.share_books()
        self.learn()
        for number, (host, ids) in enumerate(self.device.rooms):
            self.core.set_step(number, host, ids)
        if replays is None:
            self.core.set_run_step(self.device.run_step_buffer)
        else:
            self.core.set_replays(*self.device.replays(replays))
        self.doors: list[ForeignFrontend] = []
        self.engine_sides: list[Handles] = []
        self.lines: list[native.Line] = []

    def share_books(self) -> None:
        """Hands the core its books."""
        self.core.set_books(
            self.lengths,
            self.revisions,
            self.held,
            self.forked,
            self.last_calls,
            self.first_rows,
            self.generations,
            self.blocked,
        )

    def learn(self, tenant: str = TENANT) -> None:
        """Tells the core of all sequences."""
        count = len(self.held)
        self.core.learn(tenant, np.arange(1, count + 1, dtype=np.uint64), np.arange(count))

    def open_client(self, sizes: Sizes = SIZES) -> ForeignFrontend:
        """One more frontend."""
        engine, client = new_link(sizes, epoch=1)
        door = ForeignFrontend(client)
        line = native.Line(engine.segment, engine.client_bell, engine.engine_bell)
        self.engine_sides.append(engine)
        self.core.add(line)
        self.doors.append(door)
        self.lines.append(line)
        return door

    def both(self, layer: int, *rows: tuple[int, ...], **options: Any) -> TokenRequest:
        """Appends to rows (sequence, start, length[, revision]) and selects for them."""
        length = sum(row[2] for row in rows)
        random = np.random.default_rng([layer, *(abs(number) for row in rows for number in row)])
        keys = values(random, length, self.spec.head_dim)
        queries = values(random, length, self.spec.num_index_heads, self.spec.head_dim)
        return tokens(layer, rows, keys=keys, queries=queries, **options)

    def look(self) -> int:
        """Has the core look round once; answers why it returned, but for a device that takes its time."""
        return self.core.run(0.0) & ~native.LATE

    def abandon(self) -> None:
        """Gives up what is on its way."""
        self.core.abandon(int(Code.INTERNAL), len(b"INTERNAL"), b"INTERNALa fault")

    def close(self) -> None:
        """Gives the files back."""
        for door in self.doors:
            door.close()
        for engine in self.engine_sides:
            engine.close()
        os.close(self.nudge)

    @property
    def counted(self) -> dict[str, Any]:
        """What the core counted, by name."""
        names = ("stages", "requests", "tokens", "steps", "num_tokens", "device_seconds", "device_busy_seconds")
        return dict(zip(names, self.core.counts(), strict=True))


@contextmanager
def bare_core(spec: IndexSpec = SPEC, **options: Any) -> Iterator[BareLane]:
    """A core without an engine."""
    made = BareLane(spec, **options)
    try:
        yield made
    finally:
        made.close()


def usual(bare: BareLane) -> TokenRequest:
    """Goes on with one sequence, and writes the end of another one anew."""
    return bare.both(1, (1, LENGTH, 1, 5), (2, LENGTH - 2, 3))


def check_answer(door: ForeignFrontend, ticket: int, request: TokenRequest) -> None:
    """Checks that an answer is that of this request: its queries, as the device sends them back."""
    numbers, answer = door.told[ticket]
    assert isinstance(answer, TokenAnswer) and answer.block_ids is not None and answer.scores is None
    assert request.queries is not None
    sent = np.frombuffer(request.queries.tensor.data, np.uint16).reshape(-1, SPEC.num_index_heads, SPEC.head_dim)
    np.testing.assert_array_equal(answer.block_ids, sent[:, :, : SPEC.topk])
    assert (answer.epoch, numbers.phase) == (EPOCH, 2)
    assert min(numbers.queue_seconds, numbers.plan_seconds, numbers.device_seconds, numbers.reply_seconds) >= 0
