"""What wakes callers at their deadlines where gRPC cannot."""

from __future__ import annotations

import math
import threading
import time
from typing import Protocol


class Watched(Protocol):
    """Somebody waits in it until its `deadline`, or nobody and that is infinity."""

    deadline: float

    def end_if_late(self, now: float) -> None:
        """Ends the waiting where the deadline has passed."""
        ...


class Alarm:
    """A thread that sleeps until the next deadline of all that it watches.

    Calls mostly come with one and the same timeout, so that a new deadline is seldom before the next one: beginning and
    ending a call wakes nobody and takes no lock.
    """

    def __init__(self) -> None:
        self._watched: set[Watched] = set()
        self._changed = threading.Condition()
        self._earlier = False
        self._closed = False
        self._next = math.inf
        self._thread: threading.Thread | None = None

    def watch(self, watched: Watched) -> None:
        """Watches one more."""
        with self._changed:
            self._watched.add(watched)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="blockdex-alarm", daemon=True)
                self._thread.start()

    def forget(self, watched: Watched) -> None:
        """Watches it no more."""
        with self._changed:
            self._watched.discard(watched)

    def expect(self, deadline: float) -> None:
        """One that is watched has a deadline now."""
        if deadline < self._next:
            with self._changed:
                self._earlier = True
                self._changed.notify()

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while not self._closed:
            # Whoever gets a deadline from here on says so, since it may not be seen below.
            self._next = math.inf
            with self._changed:
                self._earlier = False
                watched = list(self._watched)
            now = time.monotonic()
            for each in watched:
                each.end_if_late(now)
            self._next = min((each.deadline for each in watched), default=math.inf)
            with self._changed:
                if not (self._earlier or self._closed):
                    self._changed.wait(_seconds_until(self._next))


def _seconds_until(deadline: float) -> float | None:
    return None if deadline == math.inf else max(deadline - time.monotonic(), 0)
