"""What crosses between `blockdex loadtest` and its worker processes, pickled, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blockdex.client.endpoint import Endpoint
from blockdex.loadtest.histogram import Histogram
from blockdex.loadtest.recorder import Recorder
from blockdex.loadtest.sampling import Sample
from blockdex.loadtest.schedule import Spacing, Window
from blockdex.loadtest.shapes import Plan
from blockdex_kernels import IndexSpec


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one process against one server.

    Attributes:
        endpoint: the server.
        spec: its indexer.
        plan: of all clients of the run.
        process: number of this process; it has the clients whose numbers are equal to it modulo `processes`.
        processes: how many there are.
        run: drawn for the run, below 2^24: part of its sequence ids.
        fills: whether the clients' first calls are made, or only taken note of (a null server holds no keys).
        rate: arrivals a second, all processes together; None for a closed loop.
        spacing: of the arrivals.
        seed: of everything that is drawn.
        transport: of the clients.
        tenant: of the sequences.
        timeout: seconds that a call may take.
        check_share: share of the answers that are kept to be checked.
    """

    endpoint: Endpoint
    spec: IndexSpec
    plan: Plan
    process: int
    processes: int
    run: int
    fills: bool
    rate: float | None
    spacing: Spacing
    seed: int
    transport: Literal["unary", "stream"]
    tenant: str
    timeout: float
    check_share: float

    @property
    def clients(self) -> range:
        """Numbers of this process's clients."""
        return range(self.process, len(self.plan.shapes), self.processes)


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker: every client of the job is set up."""


@dataclass(frozen=True, slots=True)
class Go:
    """To the worker: run the job in this window."""

    window: Window


@dataclass(frozen=True, slots=True)
class Stop:
    """To the worker: end the job now, and tell what was measured."""


@dataclass(slots=True)
class Progress:
    """Worker: what happened since the last one, several times a second, so that silence means trouble.

    Attributes:
        latencies: of the calls that succeeded.
        errors: calls that failed.
        tokens: tokens appended.
        last_error: the message of the latest failure.
    """

    latencies: Histogram = field(default_factory=Histogram)
    errors: int = 0
    tokens: int = 0
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class Done:
    """Worker: the job has ended and its sequences are closed.

    Attributes:
        recorder: what was counted.
        samples: answers to be checked.
        answers: selections answered, of which the samples are some.
        cpu_share: share of one core that the process took from the begin of the window to its end.
        left_open: sequences that could not be closed.
    """

    recorder: Recorder
    samples: list[Sample]
    answers: int
    cpu_share: float
    left_open: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Worker: the clients could not be set up; the message is one line."""

    message: str


Command = Job | Go | Stop
Report = Ready | Progress | Done | Failed
