"""The loop: take what has queued up, begin a batch and a slice of prefill, answer what has ended meanwhile."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from blockdex.cache import TABLE_ROW, Cache
from blockdex.contract.errors import InternalError, Reason, ResourceExhaustedError
from blockdex.contract.messages import CacheOverview, Info, Limits
from blockdex.contract.stats import Stats
from blockdex.executor.dispatch import make_executor
from blockdex.executor.interface import DeviceHungError, Executor
from blockdex.scheduler import THREAD
from blockdex.scheduler.batch import Batch
from blockdex.scheduler.dispatch import Launcher
from blockdex.scheduler.request import Entry, Inbox, Outcome, given_up, shutting_down, too_late
from blockdex_kernels import IndexSpec
from blockdex_kernels.dispatch import device_name
from blockdex_kernels.interface import Backend

if TYPE_CHECKING:
    from blockdex.scheduler.fast_path import CoreInbox, ShortWay

logger = logging.getLogger(__name__)

Deliver = Callable[[Sequence[Outcome]], None]

SLICE_SECONDS = {"cpu": 0.02, "cuda": 0.001}
"""Time of one slice of a prefill: of shorter ones on a CPU, half goes into their beginnings and ends."""

_STOP_SECONDS = 30.0
_LONGEST_SLEEP_SECONDS = 3600.0
# A prefill's slice takes about a millisecond, and the next one is on its way already.
_PREFILL_LOOK_SECONDS = 0.0002
# While something runs nobody sleeps; what only time changes, a deadline, is looked after so often.
_LOOK_SECONDS = 0.001


class Engine:
    """Owns the cache and the kernels; one thread runs everything, so that no request needs a lock.

    A batch is whatever has queued up: there is no waiting window. On a GPU it is checked and staged while the one
    before runs, and the one before that is answered. Requests that conflict with the batch are held back for the next
    one; selections that wait for keys are tried again whenever something changed.

    Args:
        backend: the kernels and their pages.
        limits: bounds on requests; `max_queued_requests` is kept here.
        lease_seconds: lease of a sequence that names none.
        decode_queries: a span of at most so many queries is decode, a longer one prefill.
        prefill_slice_seconds: time that one slice of a prefill may take, about; None: what suits the device.
        inbox: where entries come from, but for those that its core serves; without one, from `submit`.
        on_lost_device: called, on the engine's thread, when the device has failed for good.

    Attributes:
        device_is_lost: whether it has. Every batch fails from then on; only a new process gets at the device again.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        limits: Limits,
        lease_seconds: float = 600.0,
        decode_queries: int = 16,
        prefill_slice_seconds: float | None = None,
        inbox: CoreInbox | None = None,
        on_lost_device: Callable[[], None] | None = None,
    ) -> None:
        self.limits = limits
        self.device_is_lost = False
        self._on_lost_device = on_lost_device
        self._backend = backend
        self._executor = make_executor(backend, TABLE_ROW)
        self._lease_seconds = lease_seconds
        self._decode_queries = decode_queries
        self._prefill_slice_seconds = prefill_slice_seconds or SLICE_SECONDS[backend.device.type]
        self._inbox: Inbox = queue.SimpleQueue() if inbox is None else inbox
        self._backlog: list[Entry] = []
        self._waiting: list[Entry] = []
        self._unanswered: set[Entry] = set()
        self._stats = Stats()
        self._no_more = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._deliver: Deliver | None = None
        self._next_look = 0.0
        self._has_changed = True
        self._short_way = None if inbox is None else _short_way(inbox, self._executor, limits, decode_queries)
        self._clock = time.monotonic if self._short_way is None else self._short_way.time_beside
        self._be_born()

    def _be_born(self) -> None:
        self._cache = Cache(self.spec, len(self._backend.pages), default_lease_seconds=self._lease_seconds)
        self._stats.epoch_started = time.time()
        self._launcher = Launcher(
            self._cache,
            self._executor,
            self._stats,
            decode_queries=self._decode_queries,
            prefill_slice_seconds=self._prefill_slice_seconds,
            short_way=self._short_way,
        )
        if self._short_way is not None:
            self._short_way.enter(self._cache)

    @property
    def spec(self) -> IndexSpec:
        """The indexer."""
        return self._backend.spec

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """As `Executor.warm_up`: before the first request, from any thread."""
        return self._executor.warm_up()

    def start(self, deliver: Deliver) -> None:
        """Starts the loop; `deliver` is called on its thread, once a batch, with the answers."""
        self._deliver = deliver
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop after the batch that runs; what is still queued is not answered."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join(timeout=_STOP_SECONDS)

    def submit(self, entry: Entry) -> None:
        """Queues an entry; from any thread.

        Raises:
            ResourceExhaustedError: `max_queued_requests` are unanswered already.
        """
        queued = self._inbox.qsize() + len(self._unanswered)
        if queued >= self.limits.max_queued_requests:
            raise ResourceExhaustedError(
                f"queue: at most {self.limits.max_queued_requests} requests may wait, {queued} do", Reason.OVERLOADED
            )
        self._inbox.put(entry)

    def expect_no_more(self) -> None:
        """No entry will come any more: selections whose keys are not queued already are refused, not kept waiting."""
        self._no_more = True
        self.notice()

    def notice(self) -> None:
        """Has the loop look round: an entry was cancelled."""
        self._inbox.put(None)

    def info(self) -> Info:
        """What the engine is, holds and can do, now; from any thread."""
        cache = self._cache
        return Info(
            spec=self.spec,
            limits=self.limits,
            cache=cache.usage(),
            epoch=cache.epoch,
            device=str(self._backend.device),
            device_name=device_name(self._backend.device),
            kernels=self._backend.kernels,
        )

    def overview(self, max_cells: int) -> CacheOverview:
        """What pages and sequences are like, now; from any thread, also while a batch runs or hangs."""
        return self._cache.overview(max_cells)

    def stats(self) -> Stats:
        """What was counted and timed since the start; from any thread."""
        self._stats.queued = self._inbox.qsize() + len(self._backlog)
        self._stats.waiting = len(self._waiting)
        snapshot = self._stats.snapshot()
        if self._short_way is not None:
            self._short_way.add_to(snapshot)
        return snapshot

    def _run(self) -> None:
        self._executor.use_device()
        while not self._stopping:
            began, idle = self._clock(), not self._launcher.in_flight
            try:
                news = self._take()
                if idle:
                    began = self._clock()
                self._step(time.monotonic(), news)
            except Exception as error:
                logger.exception("a batch failed: the cache is given up and starts anew")
                self._check_device(error)
                self._start_anew()
            self._stats.busy_seconds += self._clock() - began

    def _take(self) -> bool:
        """Moves what has queued up to the backlog; blocks while there is nothing to do at all.

        Returns:
            Whether there is any reason to form a batch.
        """
        idle = not self._launcher.in_flight and not self._launcher.prefills and not self._backlog
        # Only prefills are on their way: who decodes meanwhile is served at once, not when they are next looked after.
        block, news = idle or self._launcher.only_prefills, False
        if self._short_way is not None and self._has_changed:
            self._short_way.follow([*self._backlog, *self._waiting], self._launcher.reading())
            self._has_changed = False
        try:
            while True:
                entry = self._inbox.get(block=block, timeout=self._patience(idle) if block else None)
                block, news = False, True
                if entry is not None:
                    self._backlog.append(entry)
                    self._unanswered.add(entry)
        except queue.Empty:
            return news or idle

    def _patience(self, idle: bool) -> float | None:
        """Seconds until the first waiting selection is too late, of which a queue may not be able to wait them all."""
        if not idle:
            return _PREFILL_LOOK_SECONDS
        if not self._waiting:
            return None
        left = min(entry.deadline for entry in self._waiting) - time.monotonic()
        return min(max(left, 0.0), _LONGEST_SLEEP_SECONDS)

    def _step(self, now: float, news: bool) -> None:
        launcher = self._launcher
        if self._short_way is not None:
            self._short_way.check()
        was_full = not launcher.has_room
        landed = launcher.land()
        self._reply(landed)
        # Appends end without an answer, and make room all the same.
        ended = bool(landed) or was_full
        self._has_changed |= ended or launcher.reads
        if launcher.has_room and (news or self._looks_again(ended, now)):
            self._reply(self._begin_batch(now))
        elif not landed:
            time.sleep(0)  # Lets other threads run while the device does.
        launcher.begin_slice()

    def _looks_again(self, ended: bool, now: float) -> bool:
        """Whether what is left from before may get on now: because something ended, or a deadline has passed."""
        left = self._backlog or self._waiting or self._launcher.prefills
        return bool(left) and (ended or now > self._next_look)

    def _begin_batch(self, now: float) -> list[Outcome]:
        launcher = self._launcher
        self._has_changed = True
        outcomes: list[Outcome] = []
        self._cache.begin_batch()
        if launcher.reads:
            launcher.keep_alive()
            outcomes = launcher.drop_gone(now)
        self._next_look = now + _LOOK_SECONDS
        if not self._backlog and not self._waiting:
            return outcomes
        batch = self._form(now)
        formed = time.monotonic()
        for entry, _ in batch.outcomes:
            entry.finished = formed
        if self._short_way is not None:
            self._short_way.make_room(len(self._cache.table_cells))
            for entry, _ in batch.appends:
                self._short_way.learn(entry)
        return outcomes + batch.outcomes + launcher.begin(batch)

    def _form(self, now: float) -> Batch:
        """A batch of the backlog."""
        batch = Batch(self._cache, self._launcher.reading(), self._launcher.being_read())
        late: list[Outcome] = []
        held_back: list[Entry] = []
        admitted = 0
        for entry in self._backlog:
            if self._is_gone(entry, now, late):
                continue
            if batch.admit(entry):
                admitted += 1
            else:
                held_back.append(entry)
        self._backlog = held_back
        if self._waiting or batch.waiting:
            batch.waiting[:0] = [entry for entry in self._waiting if not self._is_gone(entry, now, late)]
            self._waiting = self._still_waiting(batch)
        for entry in batch.taken():
            entry.taken = now
        batch.outcomes += late
        if admitted:
            self._stats.batches += 1
            self._stats.batch_requests.observe(admitted)
        return batch

    def _still_waiting(self, batch: Batch) -> list[Entry]:
        """Selections whose keys this batch did not bring either; refused where no more requests will come."""
        if batch.changed:
            batch.try_waiting()
        if not self._no_more or self._backlog or not self._inbox.empty():
            return batch.waiting
        batch.outcomes += [(entry, shutting_down("the keys it waits for cannot come")) for entry in batch.waiting]
        return []

    def _is_gone(self, entry: Entry, now: float, late: list[Outcome]) -> bool:
        if entry.cancelled:
            self._stats.dropped["cancelled"] += 1
            late.append((entry, given_up(entry)))
            return True
        if entry.deadline <= now:
            self._stats.dropped["deadline"] += 1
            late.append((entry, too_late(entry)))
            return True
        return False

    def _reply(self, outcomes: Sequence[Outcome]) -> None:
        if not outcomes:
            return
        assert self._deliver is not None
        self._unanswered.difference_update(entry for entry, _ in outcomes)
        self._deliver(outcomes)
        now = time.monotonic()
        for entry, _ in outcomes:
            # One that no batch took up has no stages.
            if entry.taken:
                self._stats.answered(entry.phase, entry.stage_seconds(now))

    def _start_anew(self) -> None:
        """After a fault nobody knows what the pages hold: everything is refused, and a new epoch begins."""
        fault = InternalError("engine: a batch failed; every sequence is gone, a new epoch begins", Reason.INTERNAL)
        self._backlog, self._waiting = [], []
        if self._short_way is not None:
            self._short_way.abandon(fault)
        self._be_born()
        self._reply([(entry, fault) for entry in self._unanswered])

    def _check_device(self, fault: Exception) -> None:
        """After a fault: was it one batch, or is the device gone?"""
        if self.device_is_lost:
            return
        try:
            if isinstance(fault, DeviceHungError):
                raise fault  # Waiting for it would not end.
            self._backend.synchronize()
        except RuntimeError:
            logger.exception("the device has failed: no batch can run any more")
            self.device_is_lost = True
            if self._on_lost_device is not None:
                self._on_lost_device()


def _short_way(inbox: CoreInbox, executor: Executor, limits: Limits, longest: int) -> ShortWay:
    # It is compiled, which a server of one process does without, where there is no compiler.
    from blockdex.scheduler.fast_path import ShortWay  # noqa: PLC0415

    return ShortWay(inbox, executor, limits, longest)
