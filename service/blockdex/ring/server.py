"""The engine's end of the rings: requests of all frontends come in here, on the engine's own thread."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import blockdex._native as native
from blockdex.contract.errors import BlockdexError, InternalError, Reason, ResourceExhaustedError
from blockdex.contract.messages import Answer, Request
from blockdex.ring import codec
from blockdex.ring.handshake import Handles
from blockdex.ring.segment import RingError
from blockdex.scheduler.request import Entry, Outcome

if TYPE_CHECKING:
    from blockdex.scheduler.fast_path import ShortWay

_FOR_EVER = 1e10


class Line:
    """One frontend, as the engine's thread sees it: the requests that leave its core, and their answers.

    Args:
        handles: what both sides hold.
        check: refuses what no request can be, whatever the cache holds; as `checks.check_request` does.
        hang_up: ends the connection, from any thread; called where the frontend has written what cannot be.

    Attributes:
        native: what the core serves.
        gone: set, from any thread, when the frontend is.
        in_flight: entries that are not answered yet, by ticket.
    """

    def __init__(
        self, handles: Handles, check: Callable[[Request], None], hang_up: Callable[[RingError], None]
    ) -> None:
        self.handles = handles
        self.check = check
        self.hang_up = hang_up
        self.native = native.Line(handles.segment, handles.client_bell, handles.engine_bell, handles.tenant)
        self.gone = False
        self.in_flight: dict[int, Entry] = {}
        self._segment = handles.segment
        self._unwritten: deque[tuple[int, Answer | BlockdexError, Entry]] = deque()

    @property
    def filled(self) -> int:
        """Requests that are there and were not taken yet."""
        return max(self.native.filled, 0)

    def take(self) -> tuple[Entry, BlockdexError | None] | None:
        """The oldest request as an entry, and what refuses it; a cancellation is noted in its entry, and is none.

        Raises:
            RingError: it is not what the layout says.
        """
        if self.native.filled < 0:
            raise RingError(f"ring: more slots are said to be filled than the {self._segment.request_slots} there are")
        head, tenant = self.native.head(), self.handles.tenant
        ticket, request, received, deadline, refused = codec.read_request(self._segment, head, tenant)
        self.native.release()
        if request is None:
            if ticket in self.in_flight:
                self.in_flight[ticket].cancelled = True
            return None
        if ticket in self.in_flight:
            raise RingError(f"request: ticket {ticket} is in flight already")
        entry = Entry(request, deadline, Ticket(self, ticket), min(received, time.monotonic()))
        self.in_flight[ticket] = entry
        return entry, refused

    def answer(self, ticket: int, answer: Answer | BlockdexError) -> None:
        """Answers a request; the frontend sees it after `publish`, if it is still there."""
        entry = self.in_flight.pop(ticket, None)
        if entry is not None and not self.gone:
            self._unwritten.append((ticket, answer, entry))

    def forget_answers(self) -> None:
        """Drops what was not written: an answer holds its line, and so the memory of a link that nobody reads."""
        self._unwritten.clear()

    def publish(self) -> None:
        """Writes the answers that there is room for, and wakes the frontend."""
        if self.gone:
            return
        self._write()
        if self._unwritten:
            self.native.wait_for_room()
            self._write()
        self.native.crowded = bool(self._unwritten)
        self.native.publish()

    def _write(self) -> None:
        while self._unwritten:
            ticket, answer, entry = self._unwritten[0]
            numbers, columns = codec.columns_of(answer)
            size = codec.answer_bytes(columns)
            if size > self.native.longest:
                words = f"answer: {size} bytes, there is room for {self.native.longest}"
                numbers, columns = codec.columns_of(InternalError(words, Reason.INTERNAL))
                size = codec.answer_bytes(columns)
            place = self.native.claim(size)
            if place is None:
                return
            slot, *room = place
            stage_seconds = entry.stage_seconds(time.monotonic())
            codec.write_answer(
                self._segment, slot, ticket, numbers, columns, entry.phase, stage_seconds, (room[0], room[1])
            )
            self._unwritten.popleft()


class Ticket(NamedTuple):
    """Who asked: the frontend, and the number that it gave to its request."""

    line: Line
    number: int


class RingInbox:
    """What an engine takes its entries from and hands its answers to, where frontends are other processes.

    Its core takes the requests off the rings. `get` runs it, and returns what it leaves. `get`, `put`, `qsize` and
    `empty` are those of a queue. The engine's thread gets and delivers; others do the rest.

    Args:
        max_queued: entries that may be unanswered; more are refused as OVERLOADED.
        spin_seconds: after a request or an answer, how long to look for requests before sleeping.

    Attributes:
        nudge: eventfd that has the core look round.
        spin_seconds: the same.
    """

    def __init__(self, max_queued: int, spin_seconds: float) -> None:
        self.nudge = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.spin_seconds = spin_seconds
        self._max_queued = max_queued
        self._core: native.Core | None = None
        self._short_way: ShortWay | None = None
        self._lines: list[Line] = []
        self._arrivals: queue.SimpleQueue[Line] = queue.SimpleQueue()
        self._entries: deque[Entry] = deque()
        self._noticed = False

    def open_core(self, core: native.Core, short_way: ShortWay) -> None:
        """As `CoreInbox.open_core`; before the first line."""
        self._core, self._short_way = core, short_way

    def add(self, line: Line) -> None:
        """Takes requests of a frontend from now on."""
        self._arrivals.put(line)
        self.put(None)

    def drop(self, line: Line) -> None:
        """Takes no more requests of a frontend that is gone, and gives up those that it sent."""
        line.gone = True
        self.put(None)

    def put(self, item: Entry | None) -> None:
        """Has the engine look round; entries come from the rings alone."""
        assert item is None
        assert self._core is not None
        self._noticed = True
        self._core.notice()

    def qsize(self) -> int:
        """Entries, and requests in the rings, that the engine has not taken yet."""
        return len(self._entries) + sum(line.filled for line in self._lines if not line.gone)

    def empty(self) -> bool:
        """Whether there are none."""
        return not self.qsize()

    def get(self, block: bool = True, timeout: float | None = None) -> Entry | None:
        """The next entry that the core has left; None after `put`, and where the device should be asked after.

        Raises:
            queue.Empty: there is none, within `timeout` seconds where it may block.
        """
        late = False
        if not self._entries and not self._noticed:
            late = self._collect((_FOR_EVER if timeout is None else timeout) if block else 0.0)
        if self._entries:
            return self._entries.popleft()
        if self._noticed:
            self._noticed = False
            self._look_round()
            return None
        if late:
            return None
        raise queue.Empty

    def deliver(self, outcomes: Sequence[Outcome]) -> None:
        """Hands answers over, on the engine's thread."""
        assert self._core is not None
        for entry, outcome in outcomes:
            asker = _asker(entry)
            assert not isinstance(outcome, Exception) or isinstance(outcome, BlockdexError)
            asker.line.answer(asker.number, outcome)
        for line in self._lines:
            line.publish()
        self._core.touch()

    def _collect(self, seconds: float) -> bool:
        """Runs the core, takes what it leaves, writes what waited for room; whether to ask after the device."""
        assert self._core is not None
        why = self._core.run(seconds)
        late = bool(why & native.LATE)
        # Not for ever, even where there is always another one that is done with at once.
        for _ in range(self._max_queued):
            # Who goes leaves requests that nobody takes: first it is to be dropped.
            if not why & native.FOR_PYTHON or self._noticed:
                break
            for line in self._lines:
                if line.native.waits and not line.gone:
                    self._take(line)
            why = self._core.run(0.0)
            late |= bool(why & native.LATE)
        if self._entries:
            self._core.touch()
        for line in self._lines:
            line.publish()
        return late

    def _take(self, line: Line) -> None:
        """Takes one request that the core has left."""
        assert self._short_way is not None
        try:
            taken = line.take()
        except RingError as error:
            line.native.gone = True
            line.hang_up(error)
            self.drop(line)
            return
        if taken is None:
            return
        entry, unsupported = taken
        try:
            if unsupported is not None:
                raise unsupported
            line.check(entry.request)
            self._check_room()
        except BlockdexError as refused:
            line.answer(_asker(entry).number, refused)
            line.publish()
            return
        self._short_way.hold_up(entry)
        self._entries.append(entry)

    def _check_room(self) -> None:
        """Refuses the request that was taken last where it is one too many."""
        queued = sum(len(each.in_flight) for each in self._lines) - 1
        if queued >= self._max_queued:
            raise overloaded(self._max_queued, queued)

    def _look_round(self) -> None:
        """Frontends come and go."""
        assert self._core is not None
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._arrivals.get_nowait()
                self._lines.append(line)
                self._core.add(line.native)
        for line in [line for line in self._lines if line.gone]:
            self._lines.remove(line)
            self._core.drop(line.native)
            line.handles.close()
            line.forget_answers()
            for entry in line.in_flight.values():
                entry.cancelled = True


def overloaded(allowed: int, queued: int) -> ResourceExhaustedError:
    """What a request is refused with that would be one too many."""
    return ResourceExhaustedError(f"queue: at most {allowed} requests may wait, {queued} do", Reason.OVERLOADED)


def _asker(entry: Entry) -> Ticket:
    assert isinstance(entry.ticket, Ticket)
    return entry.ticket
