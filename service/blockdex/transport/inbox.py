"""The engine's end of the rings: requests of all front doors come in here, on the engine's own thread."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from blockdex.engine.entry import Entry, Outcome
from blockdex.errors import BlockdexError, InternalError, Reason, ResourceExhaustedError
from blockdex.messages import Answer
from blockdex.transport import codec
from blockdex.transport.arena import Tape
from blockdex.transport.handover import Handles
from blockdex.transport.layout import AT
from blockdex.transport.ring import Bell, Consumer, Producer
from blockdex.transport.segment import RingError


class Line:
    """One front door, as the engine's thread sees it.

    Args:
        handles: what both sides hold.
        hang_up: ends the connection, from any thread; called where the front door has written what cannot be.

    Attributes:
        gone: set, from any thread, when the front door is.
        in_flight: entries that are not answered yet, by ticket.
    """

    def __init__(self, handles: Handles, hang_up: Callable[[RingError], None]) -> None:
        self.handles = handles
        self.hang_up = hang_up
        self.gone = False
        self.in_flight: dict[int, Entry] = {}
        self._segment = segment = handles.segment
        self._requests = Consumer(segment, "request")
        self._answers = Producer(segment, "answer", Bell(segment, "door_sleeps", handles.door_bell))
        self._tape = Tape(segment.answer_arena_bytes)
        self._unwritten: deque[tuple[int, Answer | BlockdexError, Entry]] = deque()
        self._room_bell = Bell(segment, "engine_waits_for_room", handles.engine_bell)
        self.bell = Bell(segment, "engine_sleeps", handles.engine_bell)

    @property
    def filled(self) -> int:
        """Requests that are there and were not taken yet."""
        return self._requests.filled

    def take(self) -> list[Entry]:
        """Requests that have come, each as an entry; cancellations are noted in the entries that they are of.

        Raises:
            RingError: they are not what the layout says.
        """
        entries: list[Entry] = []
        for _ in range(self._requests.check()):
            ticket, request, received, deadline = codec.read_request(self._segment, self._requests.take())
            if request is None:
                if ticket in self.in_flight:
                    self.in_flight[ticket].cancelled = True
                continue
            if ticket in self.in_flight:
                raise RingError(f"request: ticket {ticket} is in flight already")
            entry = Entry(request, deadline, Ticket(self, ticket), received)
            self.in_flight[ticket] = entry
            entries.append(entry)
        self._requests.release()
        return entries

    def answer(self, ticket: int, answer: Answer | BlockdexError) -> None:
        """Answers a request; the front door sees it after `publish`."""
        if (entry := self.in_flight.pop(ticket, None)) is not None:
            self._unwritten.append((ticket, answer, entry))

    def publish(self) -> None:
        """Writes the answers that there is room for, and wakes the front door."""
        if self.gone or not self._unwritten:
            return
        written = self._write()
        if self._unwritten:
            self._room_bell.lie_down()
            written |= self._write()
        if written:
            self._answers.publish()

    def _write(self) -> bool:
        written = False
        while self._unwritten and not self._answers.full:
            ticket, answer, entry = self._unwritten[0]
            numbers, columns = codec.columns_of(answer)
            size = codec.answer_bytes(columns)
            if size > self._tape.longest:
                words = f"answer: {size} bytes, there is room for {self._tape.longest}"
                numbers, columns = codec.columns_of(InternalError(words, Reason.INTERNAL))
                size = codec.answer_bytes(columns)
            place = self._tape.take(size, self._segment.counters[AT["answer_bytes_freed"] // 8]) if size else (0, 0)
            if place is None:
                break
            slot = self._answers.claim()
            stage_seconds = entry.stage_seconds(time.monotonic())
            codec.write_answer(self._segment, slot, ticket, numbers, columns, entry.phase, stage_seconds, place)
            self._unwritten.popleft()
            written = True
        return written


class Ticket(NamedTuple):
    """Who asked: the front door, and the number that it gave to its request."""

    line: Line
    number: int


class RingInbox:
    """What an engine takes its entries from and hands its answers to, where front doors are other processes.

    `get`, `put`, `qsize` and `empty` are those of a queue. The engine's thread gets and delivers; others do the rest.

    Args:
        max_queued: entries that may be unanswered; more are refused as OVERLOADED.
        spin_seconds: after a request or an answer, how long to look for requests before sleeping.
    """

    def __init__(self, max_queued: int, spin_seconds: float) -> None:
        self._max_queued = max_queued
        self._spin_seconds = spin_seconds
        self._lines: list[Line] = []
        self._arrivals: queue.SimpleQueue[Line] = queue.SimpleQueue()
        self._entries: deque[Entry] = deque()
        self._noticed = False
        self._nudge = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = select.poll()
        self._poller.register(self._nudge, select.POLLIN)
        self._active = 0.0

    def add(self, line: Line) -> None:
        """Takes requests of a front door from now on."""
        self._arrivals.put(line)
        self.put(None)

    def drop(self, line: Line) -> None:
        """Takes no more requests of a front door that is gone, and gives up those that it sent."""
        line.gone = True
        self.put(None)

    def put(self, item: Entry | None) -> None:
        """Has the engine look round; entries come from the rings alone."""
        assert item is None
        self._noticed = True
        os.eventfd_write(self._nudge, 1)

    def qsize(self) -> int:
        """Entries, and requests in the rings, that the engine has not taken yet."""
        return len(self._entries) + sum(line.filled for line in self._lines if not line.gone)

    def empty(self) -> bool:
        """Whether there are none."""
        return not self.qsize()

    def get(self, block: bool = True, timeout: float | None = None) -> Entry | None:
        """The next entry; None after `put`.

        Raises:
            queue.Empty: there is none, within `timeout` seconds where it may block.
        """
        if not self._entries and not self._noticed:
            self._collect()
            if block and not self._entries and not self._noticed:
                self._wait(timeout)
                self._collect()
        if self._entries:
            return self._entries.popleft()
        if self._noticed:
            self._noticed = False
            self._look_round()
            return None
        raise queue.Empty

    def deliver(self, outcomes: Sequence[Outcome]) -> None:
        """Hands answers over, on the engine's thread."""
        for entry, outcome in outcomes:
            asker = _asker(entry)
            assert not isinstance(outcome, Exception) or isinstance(outcome, BlockdexError)
            asker.line.answer(asker.number, outcome)
        for line in self._lines:
            line.publish()
        self._active = time.monotonic()

    def _collect(self) -> None:
        """Takes what has come over every ring."""
        for line in self._lines:
            if line.gone:
                continue
            try:
                entries = line.take()
            except RingError as error:
                self._lose(line, error)
                continue
            queued = sum(len(each.in_flight) for each in self._lines) - len(entries)
            for entry in entries:
                queued += 1
                if queued > self._max_queued:
                    line.answer(_asker(entry).number, overloaded(self._max_queued, queued - 1))
                else:
                    self._entries.append(entry)
            line.publish()
            if entries:
                self._active = time.monotonic()

    def _lose(self, line: Line, error: RingError) -> None:
        line.hang_up(error)
        self.drop(line)

    def _look_round(self) -> None:
        """Front doors come and go."""
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._arrivals.get_nowait()
                self._lines.append(line)
                self._poller.register(line.handles.engine_bell, select.POLLIN)
        for line in [line for line in self._lines if line.gone]:
            self._lines.remove(line)
            self._poller.unregister(line.handles.engine_bell)
            line.handles.close()
            for entry in line.in_flight.values():
                entry.cancelled = True

    def _wait(self, timeout: float | None) -> None:
        """Until something has come, or has been noticed; sleeps once nothing came for a while."""
        while time.monotonic() < self._active + self._spin_seconds:
            if self._noticed or any(line.filled for line in self._lines):
                return
        for line in self._lines:
            line.bell.lie_down()
        if not self._noticed and not any(line.filled for line in self._lines):
            for fd, _ in self._poller.poll(None if timeout is None else math.ceil(1000 * timeout)):
                os.eventfd_read(fd)
        for line in self._lines:
            line.bell.get_up()


def overloaded(allowed: int, queued: int) -> ResourceExhaustedError:
    """What a request is refused with that would be one too many."""
    return ResourceExhaustedError(f"queue: at most {allowed} requests may wait, {queued} do", Reason.OVERLOADED)


def _asker(entry: Entry) -> Ticket:
    assert isinstance(entry.ticket, Ticket)
    return entry.ticket
