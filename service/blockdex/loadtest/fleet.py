"""The processes of the load test, as the one that started them sees them. Every wait has a bound."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from blockdex.loadtest.jobs import Done, Failed, Go, Job, Progress, Ready, Report, Stop
from blockdex.loadtest.schedule import Window

_TICK_SECONDS = 0.1
_START_LEAD = 0.1
_START_SECONDS = 60.0
_END_SECONDS = 15.0
_SILENCE_SECONDS = 60.0


class FleetError(Exception):
    """A process of the load test could not do its part: one line that says why."""


@dataclass(frozen=True, slots=True)
class Begins:
    """Every client is set up; the run begins in this window."""

    window: Window


@dataclass(frozen=True, slots=True)
class Measuring:
    """The warm-up is over."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The window is over, or the run was told to stop; calls in flight are waited for, and sequences closed."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Some time has passed."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Every process has ended its job."""

    done: list[Done]


Event = Begins | Measuring | Measured | Progress | Tick | Ended


class Fleet:
    """Worker processes; a context manager that ends them.

    Args:
        processes: how many.
    """

    def __init__(self, processes: int) -> None:
        self._stack = contextlib.ExitStack()
        self._pipes: list[Connection] = []
        with contextlib.ExitStack() as stack:
            for _ in range(processes):
                self._pipes.append(stack.enter_context(_worker()))
            self._stack = stack.pop_all()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(
        self, jobs: Sequence[Job], warm_up: float, duration: float, interrupted: Callable[[], bool]
    ) -> Iterator[Event]:
        """Has every process do its job, all in one window, and yields what happens; the last is `Ended`.

        Args:
            jobs: one for each process.
            warm_up: seconds before the window's measured part.
            duration: seconds that are measured.
            interrupted: whether the run is to end now; asked several times a second.

        Raises:
            FleetError: a process has ended, says nothing, or could not set its clients up.
        """
        return _Run(self._pipes, jobs).events(warm_up, warm_up + duration, interrupted)


class _Run:
    """One job of every process, from its beginning to its end."""

    def __init__(self, pipes: Sequence[Connection], jobs: Sequence[Job]) -> None:
        self._pipes = {pipe: number for number, pipe in enumerate(pipes)}
        self._heard = dict.fromkeys(pipes, time.monotonic())
        self._done: dict[int, Done] = {}
        self._ready = 0
        self._stopped = False
        for pipe, job in zip(pipes, jobs, strict=True):
            pipe.send(job)

    def events(self, measured_from: float, end: float, interrupted: Callable[[], bool]) -> Iterator[Event]:
        """What happens, as it happens; both moments in seconds after the begin."""
        due: list[tuple[float, Event]] = []
        while self._heard:
            soon = due[0][0] - time.monotonic() if due else _TICK_SECONDS
            yield from self._hear(min(max(soon, 0.0), _TICK_SECONDS))
            if self._ready == len(self._pipes) and not self._stopped:
                self._ready = 0
                begin = time.monotonic() + _START_LEAD
                due = [(begin + measured_from, Measuring()), (begin + end, Measured())]
                window = Window(begin, begin + measured_from, begin + end)
                self._tell(Go(window))
                yield Begins(window)
            if interrupted() and not self._stopped:
                self._stopped = True
                self._tell(Stop())
            while due and (self._stopped or time.monotonic() >= due[0][0]):
                yield due.pop(0)[1]
            yield Tick()
        yield Ended([self._done[number] for number in sorted(self._done)])

    def _hear(self, seconds: float) -> Iterator[Event]:
        for pipe in wait(list(self._heard), seconds):
            assert isinstance(pipe, Connection)
            number = self._pipes[pipe]
            try:
                report: Report = pipe.recv()
            except (EOFError, OSError):
                raise FleetError(f"process {number} of the load test ended by itself") from None
            self._heard[pipe] = time.monotonic()
            match report:
                case Progress():
                    yield report
                case Ready():
                    self._ready += 1
                case Done():
                    self._done[number] = report
                    del self._heard[pipe]
                case Failed():
                    raise FleetError(report.message)
        for pipe, heard in self._heard.items():
            if time.monotonic() - heard > _SILENCE_SECONDS:
                number = self._pipes[pipe]
                raise FleetError(f"process {number} of the load test said nothing for {_SILENCE_SECONDS:.0f} s")

    def _tell(self, command: Go | Stop) -> None:
        for pipe in self._heard:
            with contextlib.suppress(OSError):
                pipe.send(command)


@contextlib.contextmanager
def _worker() -> Iterator[Connection]:
    """A worker process that ends with the block: it closes its sequences when its pipe ends."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "blockdex.loadtest.worker", str(theirs.fileno())]
        # A session of its own: Ctrl-C is for the process that was started by hand, which tells the others.
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
    pipe = Connection(ours.detach())
    try:
        yield pipe
    finally:
        pipe.close()
        _end(process)


@contextlib.contextmanager
def null_server(info: bytes) -> Iterator[str]:
    """The address of a null server in a process of its own, which ends with the block.

    Args:
        info: what it answers for GetInfo, as another server did.

    Raises:
        FleetError: it did not start.
    """
    command = [sys.executable, "-m", "blockdex.loadtest.null_server", info.hex()]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            readable, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
            port = process.stdout.readline().strip() if readable else ""
            if not port:
                raise FleetError("the null server, which measures the load test's own ceiling, did not start")
            yield f"127.0.0.1:{port}"
        finally:
            process.stdin.close()
            _end(process)


def _end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Waits for the end of a process that has been told; one that does not end is killed."""
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
