"""The engine's short way: a core in C that serves decodes by itself, kept in step with the cache and the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from blockdex._native import STEPS, Core
from blockdex.cache import Books, Cache
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import STAGES, Limits, TokenRequest
from blockdex.contract.stats import SECONDS_BUCKETS, SIZE_BUCKETS, Histogram, Stats
from blockdex.executor.interface import Executor, Replays
from blockdex.scheduler.request import Entry, Inbox, SequenceKey

_LOOK_SECONDS = 0.1


class CoreInbox(Inbox, Protocol):
    """An inbox whose `get` runs a core, and returns what the core leaves.

    Attributes:
        nudge: eventfd that other threads have it look round with.
        spin_seconds: after a request or an answer, how long to look for requests before sleeping.
    """

    nudge: int
    spin_seconds: float

    def open_core(self, core: Core, short_way: ShortWay) -> None:
        """Runs a core from now on, and tells its short way of every entry that leaves it."""
        ...


class ShortWay:
    """What the core may do: nothing for sequences that the engine's Python has something left to do for.

    Args:
        inbox: runs the core.
        executor: takes the core's steps to the device.
        limits: bounds on requests; what is beyond them is left, for its channel to refuse.
        longest: most tokens of a decode's span.
    """

    def __init__(self, inbox: CoreInbox, executor: Executor, limits: Limits, longest: int) -> None:
        spec = executor.backend.spec
        self._core = Core(
            layers=spec.num_layers,
            heads=spec.num_index_heads,
            head_dim=spec.head_dim,
            topk=spec.topk,
            block_size=spec.block_size,
            longest=longest,
            max_sequence_tokens=spec.max_sequence_tokens,
            max_spans=limits.max_spans,
            max_message_bytes=limits.max_message_bytes,
            nudge=inbox.nudge,
            spin_seconds=inbox.spin_seconds,
            seconds_bounds=SECONDS_BUCKETS,
            size_bounds=SIZE_BUCKETS,
        )
        self._executor = executor
        self._blocked: NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._is_blocked = False
        self._books: Books | None = None
        self._replays: Replays | None = None
        rooms = executor.step_buffers()
        assert len(rooms) == STEPS
        for number, room in enumerate(rooms):
            self._core.set_step(number, room.host, room.block_ids)
        if executor.replays is None:
            self._core.set_run_step(executor.run_step_buffer)
        inbox.open_core(self._core, self)

    @property
    def steps(self) -> int:
        """Steps that the core has begun so far."""
        return self._core.steps

    def time_beside(self) -> float:
        """A clock that stands still while its steps are on their way: who counts time by it counts none of theirs."""
        return self._core.time_beside

    def enter(self, cache: Cache) -> None:
        """Serves another cache from now on."""
        self._cache = cache
        self._core.set_epoch(cache.epoch)
        self.follow([], [])

    def follow(self, left: Iterable[Entry], reading: Iterable[tuple[SequenceKey, int]]) -> None:
        """Takes over what has changed beside the core.

        Args:
            left: entries that something is left to do for: their sequences are not the core's.
            reading: (sequence, layer) pairs that prefills read, to which nothing may be appended.
        """
        self._share()
        if self._is_blocked:
            self._blocked[:] = 0
            self._is_blocked = False
        for entry in left:
            self.hold_up(entry)
        self._block(sequence for sequence, _ in reading)

    def hold_up(self, entry: Entry) -> None:
        """Keeps the sequences of an entry that left the core off it, lest it is overtaken."""
        self._block(entry.sequences)

    def learn(self, entry: Entry) -> None:
        """Tells the core where the sequences are that an entry appended to: their next tokens may come to it."""
        request = entry.request
        if not isinstance(request, TokenRequest) or request.keys is None:
            return
        self._share()  # The columns may have grown for this very entry.
        slots = [self._cache.slot(*sequence) for sequence in entry.sequences]
        if None not in slots:
            self._core.learn(request.tenant, request.spans.sequence_ids, np.array(slots, np.int64))

    def make_room(self, cells: int) -> None:
        """Waits for the core's steps where page tables of so many cells have them captured anew.

        Raises:
            RuntimeError: as `check`: they do not end.
        """
        room = self._executor.table_capacity
        if room is None or cells <= room:
            return
        while not self._core.drain(_LOOK_SECONDS):
            self.check()

    def check(self) -> None:
        """Asks after a step that is on its way.

        Raises:
            RuntimeError: as `Executor.check`.
        """
        if self._core.in_flight:
            self._executor.check(self._core.launched)

    def abandon(self, fault: BlockdexError) -> None:
        """Answers what is on its way with a fault."""
        reason = str(fault.reason).encode()
        self._core.abandon(int(fault.code), len(reason), reason + fault.message.encode())

    def add_to(self, stats: Stats) -> None:
        """Adds what the core did to a snapshot of what was counted; from any thread."""
        stages, requests, tokens, steps, num_tokens, device_seconds, device_busy_seconds = self._core.counts()
        for stage, (counts, total) in zip(STAGES, stages, strict=True):
            stats.stage_seconds["decode"][stage].add(Histogram(SECONDS_BUCKETS, counts, total))
        for phase in ("append", "decode"):
            stats.launch_requests[phase].add(Histogram(SIZE_BUCKETS, *requests))
            stats.batch_tokens[phase].add(Histogram(SIZE_BUCKETS, *tokens))
            stats.tokens[phase] += num_tokens
        stats.batch_requests.add(Histogram(SIZE_BUCKETS, *requests))
        stats.batches += steps
        stats.device_seconds["decode"] += device_seconds
        stats.device_busy_seconds += device_busy_seconds
        stats.busy_seconds += device_busy_seconds

    def _block(self, sequences: Iterable[SequenceKey]) -> None:
        for sequence in sequences:
            slot = self._cache.slot(*sequence)
            if slot is not None:
                self._blocked[slot] = 1
                self._is_blocked = True

    def _share(self) -> None:
        """Columns and programs are replaced as they grow."""
        books = self._cache.books
        if self._books is None or any(new is not old for new, old in zip(books, self._books, strict=True)):
            self._books, self._is_blocked = books, False
            self._blocked = np.zeros(len(books.held), np.uint8)
            self._core.set_books(*books, self._blocked)
        replays = self._executor.replays
        if replays is not None and replays is not self._replays:
            self._replays = replays
            steps = [(*step[:-1], *step.programs) for step in replays.steps]
            self._core.set_replays(steps, replays.launch, replays.stream)
