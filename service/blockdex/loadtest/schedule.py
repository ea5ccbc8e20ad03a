"""When calls are meant to begin: at a rate that the server cannot slow down, or as soon as the last one ended."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Spacing = Literal["poisson", "fixed"]

Phase = Literal["set_up", "warm_up", "measured", "after", "clean_up"]
"""When a call was meant to begin: making ready, before the window, inside it, after it, or giving sequences up."""

_NAP = 0.1


@dataclass(slots=True)
class Window:
    """A run on the machine's monotonic clock, in seconds.

    Attributes:
        begin: when the warm-up begins.
        measured_from: when it ends, and measuring begins.
        end: when the last call is meant to begin; a run that is stopped ends earlier.
    """

    begin: float
    measured_from: float
    end: float

    def set(self, other: Window) -> None:
        """Takes over the moments of another one, unless this one was stopped."""
        if not self.over():
            self.begin, self.measured_from, self.end = other.begin, other.measured_from, other.end

    def stop(self) -> None:
        """Ends it now."""
        self.end = min(self.end, time.monotonic())

    def over(self) -> bool:
        """Whether its end has passed."""
        return time.monotonic() >= self.end

    def measures(self, moment: float) -> bool:
        """Whether the moment lies in what is measured."""
        return self.measured_from <= moment < self.end

    def phase_of(self, moment: float) -> Phase:
        """What a call is part of that is meant to begin then."""
        if moment < self.measured_from:
            return "warm_up"
        return "measured" if moment < self.end else "after"


def arrivals(rate: float, spacing: Spacing, begin: float, random_numbers: random.Random) -> Iterator[float]:
    """Moments, without end, at which calls are meant to begin.

    Args:
        rate: arrivals a second.
        spacing: `poisson` (independent callers) or `fixed` (equal distances, from a random phase).
        begin: the moment before the first of them.
        random_numbers: where the distances, or the phase, come from.
    """
    if spacing == "fixed":
        first = begin + random_numbers.random() / rate
        return (first + number / rate for number in itertools.count())
    distances = (random_numbers.expovariate(rate) for _ in itertools.count())
    return (begin + distance for distance in itertools.accumulate(distances))


class Schedule(Protocol):
    """Gives the clients of a process their turns."""

    async def turn(self) -> float | None:
        """Waits until the caller may begin its next call; the moment at which that was meant to be, None at the end."""
        ...

    def unsent(self) -> int:
        """After the end: arrivals whose moment came and for which no client was free."""
        ...


class ClosedLoop:
    """Every client begins its next call when its last one has ended."""

    def __init__(self, window: Window) -> None:
        self._window = window

    async def turn(self) -> float | None:
        """Now."""
        return None if self._window.over() else time.monotonic()

    def unsent(self) -> int:
        """None: nothing arrives by itself."""
        return 0


class OpenLoop:
    """Calls arrive whatever the server does; one that finds every client busy waits for the first to come free.

    What a call is measured from is the moment of its arrival, so a server that stalls is seen by all the calls that
    arrived meanwhile, not only by those that were in flight (coordinated omission).
    """

    def __init__(self, window: Window, moments: Iterator[float]) -> None:
        self._window = window
        self._moments = moments

    async def turn(self) -> float | None:
        """The next arrival, once its moment has come."""
        if self._window.over():
            return None
        moment = next(self._moments)
        while (now := time.monotonic()) < moment:
            if self._window.over():
                return None
            await asyncio.sleep(min(moment - now, max(self._window.end - now, 0.0), _NAP))
        return moment

    def unsent(self) -> int:
        """Arrivals before the end that nobody took."""
        return sum(1 for _ in itertools.takewhile(lambda moment: moment < self._window.end, self._moments))
