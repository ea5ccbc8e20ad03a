"""The loop: the core serves what it can by itself; what it leaves is decided and run here, in batches."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

import blockdex._native as native
from blockdex.cache import TABLE_ROW, IndexCache, PageCopy
from blockdex.contract.errors import InternalError, Reason
from blockdex.contract.messages import CacheOverview, Info, Limits
from blockdex.contract.stats import Stats
from blockdex.executor.factory import make_executor
from blockdex.executor.interface import DeviceHungError
from blockdex.faults import strikes
from blockdex.logs import log_fault
from blockdex.ring.events import Draining, NewEpoch, evictions
from blockdex.ring.regions import Offer, Region
from blockdex.ring.server import RingInbox
from blockdex.scheduler import THREAD
from blockdex.scheduler.core import Shared, add_counts, make_core
from blockdex.scheduler.large_request import LargeRequest
from blockdex.scheduler.launcher import Launcher
from blockdex.scheduler.regions import open_region, region_kinds
from blockdex.scheduler.sequences import SequenceKeeper, named_by
from blockdex_kernels import IndexSpec
from blockdex_kernels.dispatch import device_name
from blockdex_kernels.interface import Backend

logger = logging.getLogger(__name__)

SLICE_SECONDS = {"cpu": 0.02, "cuda": 0.001}
"""Time of one slice of a prefill: of shorter ones on a CPU, half goes into their beginnings and ends."""

_STOP_SECONDS = 30.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.01, 1.0
_LONG_LIFE_SECONDS = 10.0
_MOST_FAULTS = 20
"""In a row, none of them followed by a long life: with the pauses some 13 s. Then only a new process may help."""
_FOR_EVER = 1e10
# A prefill's slice takes about a millisecond, and the next one is on its way already; the last one's end is waited for.
_PREFILL_LOOK_SECONDS = 0.00005
# While something is on its way, the deadlines of prefills are looked after so often.
_LOOK_SECONDS = 0.001


class Engine:
    """Owns the cache and the kernels; one thread runs everything, so that no request needs a lock.

    The core takes whatever has queued up in the rings since the device was last free: there is no waiting window. It
    checks every request, enters it, runs steps of the common kind and answers them, and returns with what takes a
    decision: pages, forks, eviction, the life of sequences, and requests too large for a step.

    Args:
        backend: the kernels and their pages.
        limits: bounds on requests.
        inbox: where links come.
        lease_seconds: lease of a sequence that names none.
        max_lease_seconds: longest lease that one may name.
        max_tenant_sequences: most that a tenant may have open.
        decode_queries: a span of at most so many queries is decode, a longer one prefill.
        prefill_slice_seconds: time that one slice of a prefill may take, about; None: what suits the device.
        on_lost_device: called, on the engine's thread, when the device has failed for good.

    Attributes:
        device_is_lost: whether it has. Every batch fails from then on; only a new process gets at the device again.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        limits: Limits,
        inbox: RingInbox,
        socket: str = "",
        lease_seconds: float = 600.0,
        max_lease_seconds: float = math.inf,
        max_tenant_sequences: float = math.inf,
        decode_queries: int = 16,
        prefill_slice_seconds: float | None = None,
        on_lost_device: Callable[[], None] | None = None,
    ) -> None:
        self.limits = limits
        self._socket = socket
        self.device_is_lost = False
        self._on_lost_device = on_lost_device
        self._backend = backend
        self._executor = make_executor(backend, TABLE_ROW)
        self._lease_seconds, self._max_lease_seconds = lease_seconds, max_lease_seconds
        self._max_tenant_sequences = max_tenant_sequences
        self._decode_queries = decode_queries
        self._prefill_slice_seconds = prefill_slice_seconds or SLICE_SECONDS[backend.device.type]
        self._inbox = inbox
        self._stats = Stats()
        self._no_more = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._next_look = 0.0
        self._faults, self._born = 0, native.now()
        self._core = make_core(inbox, self._executor, limits, decode_queries)
        self._cache = self._new_cache()
        self._serve_cache()

    def _new_cache(self) -> IndexCache:
        return IndexCache(
            self.spec,
            len(self._backend.pages),
            default_lease_seconds=self._lease_seconds,
            max_lease_seconds=self._max_lease_seconds,
            max_tenant_sequences=self._max_tenant_sequences,
        )

    def _serve_cache(self) -> None:
        """Makes what works on a new cache."""
        self._stats.epoch_started = time.time()
        self._shared = Shared(self._core, self._executor, self._cache)
        self._sequences = SequenceKeeper(self._core, self._cache)
        self._launcher = Launcher(
            self._core,
            self._cache,
            self._executor,
            self._stats,
            decode_queries=self._decode_queries,
            prefill_slice_seconds=self._prefill_slice_seconds,
        )

    @property
    def spec(self) -> IndexSpec:
        """The indexer."""
        return self._backend.spec

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """As `Executor.warm_up`: before the first request, from any thread."""
        return self._executor.warm_up()

    def start(self) -> None:
        """Starts the loop; after the warm-up, which on a GPU captures the programs that run its steps."""
        self._shared.update()
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop after the batch that runs; what is still queued is not answered."""
        self._stopping.set()
        self._core.notice()
        if self._thread is not None:
            self._thread.join(timeout=_STOP_SECONDS)

    def drain(self) -> None:
        """Tells the clients of all links that the server is about to stop; it still takes what they ask."""
        self._inbox.do(lambda: self._inbox.tell(Draining()))

    def expect_no_more(self) -> None:
        """No frontend sends any more, and clients of links are refused: what waits for keys not queued yet is, too."""
        self._no_more = True
        self._core.notice()

    def unanswered(self) -> Future[int]:
        """How many requests it has taken and not answered; from any thread."""
        return self._inbox.ask(lambda: self._core.unanswered)

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
            socket=self._socket,
            region_kinds=region_kinds(self._executor) if self._socket else (),
        )

    def overview(self, max_cells: int) -> CacheOverview:
        """What pages and sequences are like, now; from any thread, also while a batch runs or hangs."""
        return self._cache.overview(max_cells)

    def open_region(self, offer: Offer) -> Region:
        """Opens memory that a client shares: see `blockdex.scheduler.regions.open_region`."""
        return open_region(self._executor, offer)

    def stats(self) -> Stats:
        """What was counted and timed since the start; from any thread."""
        snapshot = self._stats.snapshot()
        snapshot.links = dataclasses.replace(self._inbox.counts)
        add_counts(self._core, snapshot)
        return snapshot

    def _run(self) -> None:
        self._executor.use_device()
        while not self._stopping.is_set():
            self.turn()

    def turn(self, longest: float = _FOR_EVER) -> None:
        """One turn of the loop: what the core does, for so many seconds at most, and what it then leaves to decide.

        A batch that fails ends the epoch.

        Raises:
            Exception: what a batch failed of, after too many in a row.
        """
        began, idle = self._core.time_beside, not self._launcher.in_flight
        try:
            why = self._core.run(min(self._patience(), longest))
            if idle:
                began = self._core.time_beside
            self._step(why)
        except Exception as error:
            self._faults = 1 if native.now() - self._born > _LONG_LIFE_SECONDS else self._faults + 1
            self._stats.faults += 1
            log_fault(logger, "a batch failed: the cache is given up and starts anew", error, in_a_row=self._faults)
            self._check_device(error)
            self._start_anew()
            if self._faults >= _MOST_FAULTS:
                raise
            if self._faults > 1:
                # What fails at once would fail again without end, and fill the log with it.
                self._stopping.wait(min(_FIRST_PAUSE_SECONDS * 2**self._faults, _LONGEST_PAUSE_SECONDS))
            self._born = native.now()
        self._stats.busy_seconds += self._core.time_beside - began

    def _patience(self) -> float:
        """Seconds that the core may serve by itself before anything else is to be looked after."""
        launcher = self._launcher
        if launcher.waits_for_slices:
            return _PREFILL_LOOK_SECONDS
        return 0.0 if launcher.in_flight or launcher.prefills else _FOR_EVER

    def _step(self, why: int) -> None:
        launcher = self._launcher
        if why & native.NOTICED:
            self._inbox.look_round()
            if self._no_more:
                self._core.expect_no_more()
        if why & native.BROKEN:
            self._inbox.break_off()
        if why & native.LATE and self._core.in_flight:
            self._executor.check(self._core.launched)
        launcher.land()
        self._look_after_prefills()
        if why & native.FOR_PYTHON:
            self._decide()
        elif why & native.SET_CELLS:
            self._write_tables(np.frombuffer(self._core.take_set_cells(), np.int64))
        if launcher.in_flight and not launcher.prefills:
            time.sleep(0)  # Lets other threads run while the device does.
        launcher.begin_slice()

    def _look_after_prefills(self) -> None:
        now = native.now()
        if self._launcher.reads and now > self._next_look:
            self._next_look = now + _LOOK_SECONDS
            self._launcher.drop_gone()

    def _decide(self) -> None:
        """Runs what fits no step, then does what the core left: it has begun its own step before."""
        large: list[LargeRequest] = []
        others: list[tuple[Any, ...]] = []
        while (item := self._core.take()) is not None:
            if item[1] == "large":
                large.append(LargeRequest.of(item))
            else:
                others.append(item)
        self._cache.begin_batch(self._core.looked, named_by(others))
        # Those that get pages are counted with their step.
        begun = len(large) + sum(kind != "pages" for _, kind, *_ in others)
        if begun:
            self._stats.batches += 1
            self._stats.batch_requests.observe(begun)
        if large:
            self._launcher.begin(large)
        self._sequences.trim()
        copies = self._sequences.handle(others)
        self._take_over(copies)
        for event in evictions(self._cache.take_evicted()):
            self._inbox.tell(event)

    def _take_over(self, copies: list[PageCopy]) -> None:
        """Has the device and the core know what has changed in the cache."""
        set_cells = np.frombuffer(self._core.take_set_cells(), np.int64)
        self._write_tables(np.concatenate((self._cache.take_table_changes(), set_cells)))
        if len(fresh := self._cache.take_pages_to_clear()):
            self._executor.clear_pages(fresh)
        if copies:
            if strikes("copy"):
                raise RuntimeError("device: a copy failed on purpose")
            self._executor.copy_pages(*map(list, zip(*copies, strict=True)))
        self._shared.update()

    def _write_tables(self, changes: NDArray[np.int64]) -> None:
        if len(changes):
            self._executor.write_tables(self._cache.table_cells, changes)

    def _start_anew(self) -> None:
        """After a fault nobody knows what the pages hold: everything is refused, and a new epoch begins."""
        fault = InternalError("engine: a batch failed; every sequence is gone, a new epoch begins", Reason.INTERNAL)
        # Who is told of the fault and asks for the epoch at once is answered the new one.
        self._cache = self._new_cache()
        self._core.abandon(fault.code, fault.reason, fault.message)
        self._serve_cache()
        self._inbox.tell(NewEpoch(self._cache.epoch))

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
