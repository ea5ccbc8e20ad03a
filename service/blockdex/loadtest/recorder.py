"""What is counted and timed of a run's calls; mergeable, so that processes count for themselves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from blockdex.loadtest.histogram import Histogram
from blockdex.loadtest.schedule import Phase, Window
from blockdex.loadtest.steps import Operation

OK = ("OK", "")

TICK_SECONDS = 0.1
"""How finely it is kept when calls waited and when they were answered."""


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call that has ended.

    Attributes:
        phase: what it is part of.
        operation: what it was for.
        rpc: its RPC, as the server counts it.
        intended: moment at which it was meant to begin, in seconds of the monotonic clock; latency counts from here.
        sent: moment at which it was sent.
        ended: moment at which its answer was there.
        tokens: tokens that it appended, in one layer.
        queries: tokens that it selected for, in one layer.
        outcome: code and reason; `OK` where it succeeded.
    """

    phase: Phase
    operation: Operation
    rpc: str
    intended: float
    sent: float
    ended: float
    tokens: int
    queries: int
    outcome: tuple[str, str]


@dataclass(slots=True)
class Second:
    """One second of the window.

    Attributes:
        calls: calls that succeeded in it, whenever they began.
        tokens: tokens that they appended.
        queries: tokens that they selected for.
        errors: calls that failed in it, by code.
        latencies: of the calls that were meant to begin in it and succeeded.
    """

    calls: int = 0
    tokens: int = 0
    queries: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    latencies: Histogram = field(default_factory=Histogram)

    def merge(self, other: Second) -> None:
        """Counts everything that another one has counted."""
        self.calls += other.calls
        self.tokens += other.tokens
        self.queries += other.queries
        self.errors.update(other.errors)
        self.latencies.merge(other.latencies)


@dataclass(slots=True)
class Recorder:
    """Everything that is kept of the calls of a run.

    Attributes:
        latencies: by operation, of the calls inside the window that succeeded.
        outcomes: by operation and outcome, the calls inside the window.
        seconds: by second since measuring began.
        lateness: by how much calls inside the window were sent after the moment at which they were meant to be.
        sent: calls of all phases, by phase, RPC and code.
        unsent: arrivals that found no free client before the end.
        waiting: ticks since measuring began in which some call was waited for.
        answered: ticks in which some call of the load was answered with success.
    """

    latencies: dict[Operation, Histogram] = field(default_factory=dict)
    outcomes: Counter[tuple[Operation, str, str]] = field(default_factory=Counter)
    seconds: dict[int, Second] = field(default_factory=dict)
    lateness: Histogram = field(default_factory=Histogram)
    sent: Counter[tuple[Phase, str, str]] = field(default_factory=Counter)
    unsent: int = 0
    waiting: set[int] = field(default_factory=set)
    answered: set[int] = field(default_factory=set)

    def observe(self, call: CallRecord, window: Window) -> None:
        """Counts a call that has ended."""
        succeeded = call.outcome == OK
        self.sent[call.phase, call.rpc, call.outcome[0]] += 1
        self.wait(call.intended, call.ended, window)
        if call.phase == "measured":
            self.outcomes[(call.operation, *call.outcome)] += 1
            self.lateness.observe(call.sent - call.intended)
            if succeeded:
                latency = call.ended - call.intended
                self.latencies.setdefault(call.operation, Histogram()).observe(latency)
                self._second(call.intended, window).latencies.observe(latency)
        if call.phase in {"warm_up", "measured"} and window.measures(call.ended):
            second = self._second(call.ended, window)
            if succeeded:
                self.answered.add(_tick(call.ended, window))
                second.calls += 1
                second.tokens += call.tokens
                second.queries += call.queries
            else:
                second.errors[call.outcome[0]] += 1

    def wait(self, begin: float, end: float, window: Window) -> None:
        """Takes note that from one moment to another a client waited for the server, however its calls ended."""
        first, last = max(begin, window.measured_from), min(end, window.end)
        if first <= last:
            self.waiting.update(range(_tick(first, window), _tick(last, window) + 1))

    def merge(self, other: Recorder) -> None:
        """Counts everything that another one has counted."""
        for operation, latencies in other.latencies.items():
            self.latencies.setdefault(operation, Histogram()).merge(latencies)
        self.outcomes.update(other.outcomes)
        for number, second in other.seconds.items():
            self.seconds.setdefault(number, Second()).merge(second)
        self.lateness.merge(other.lateness)
        self.sent.update(other.sent)
        self.unsent += other.unsent
        self.waiting |= other.waiting
        self.answered |= other.answered

    def _second(self, moment: float, window: Window) -> Second:
        return self.seconds.setdefault(int(moment - window.measured_from), Second())


def _tick(moment: float, window: Window) -> int:
    return int((moment - window.measured_from) / TICK_SECONDS)
