"""A load test from the server's answer to GetInfo to the result."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import random
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from blockdex.client import Client, Info
from blockdex.client.endpoint import Endpoint
from blockdex.contract.errors import BlockdexError
from blockdex.loadtest import result as results
from blockdex.loadtest.checking import Checks, check
from blockdex.loadtest.environment import environment
from blockdex.loadtest.fleet import Begins, Ended, Event, Fleet, Measured, Measuring, null_server
from blockdex.loadtest.jobs import Done, Job
from blockdex.loadtest.metrics import MetricsError, Snapshot, difference, scrape
from blockdex.loadtest.null_server import info_message
from blockdex.loadtest.schedule import Window
from blockdex.loadtest.settings import Settings, Target
from blockdex.loadtest.shapes import make_plan
from blockdex.loadtest.tensors import TensorPool

_REQUESTS = "blockdex_requests_total"
_CEILING_WARM_UP = 0.2
_RUN_NUMBERS = 2**24
_ANSWER_SECONDS = 5.0


class InterruptedEarlyError(Exception):
    """The run was told to stop before anything was measured."""


class Screen(Protocol):
    """Where a run is seen, and where it is interrupted."""

    interrupted: bool

    def phase(self, words: str) -> None:
        """What is done from now on."""
        ...

    def see(self, event: Event) -> None:
        """Something has happened."""
        ...


@dataclass(slots=True)
class Measurement:
    """What a fleet did in one window.

    Attributes:
        done: what each process has counted.
        seconds: length of the measured part.
        before: the server's metrics at its beginning, where they are asked for and were there.
        after: the server's metrics at its end.
        info: the server's answer to GetInfo at its end.
    """

    done: list[Done] = field(default_factory=list)
    seconds: float = 0.0
    before: Snapshot | None = None
    after: Snapshot | None = None
    info: Info | None = None


class LoadTest:
    """One load test of one server.

    Args:
        settings: what shapes the load.
        target: where it goes.
        screen: where it is seen.

    Raises:
        BlockdexError: the server does not answer.
        ShapeError: it has no room for the scenario.
        MetricsError: its metrics are asked for and do not answer.
    """

    def __init__(self, settings: Settings, target: Target, screen: Screen) -> None:
        self.settings = settings
        self._target = target
        self._screen = screen
        self._run_number = random.SystemRandom().randrange(_RUN_NUMBERS)
        screen.phase(f"asking {target.endpoint.address} what it is")
        self._info = _ask(target, min(settings.timeout, _ANSWER_SECONDS))
        self.plan = make_plan(
            self._info,
            settings.scenario,
            clients=settings.clients,
            scale=settings.scale,
            seed=settings.seed,
            layers=settings.layers,
            draft_tokens=settings.draft_tokens,
            chunk=settings.chunk,
        )
        self._first_snapshot = scrape(target) if target.http_address else None

    def run(self) -> dict[str, Any]:
        """Measures the load test's own ceiling, then the server; closes every sequence, and checks a sample of answers.

        Returns:
            The result, as `docs/loadtest.md` describes it, without objectives and comparison.

        Raises:
            FleetError: a process of the load test could not do its part.
            InterruptedEarlyError: it was told to stop before anything was measured.
        """
        settings, target = self.settings, self._target
        with Fleet(settings.processes) as fleet:
            own = self._measure_ceiling(fleet) if settings.ceiling else None
            self._screen.phase("setting up")
            jobs = self._jobs([target.endpoint] * settings.processes, fills=True)
            measured = self._measure(fleet, jobs, settings.warm_up, settings.duration, target)
        if measured.seconds <= 0:
            raise InterruptedEarlyError
        self._screen.phase("checking answers")
        return self._result(measured, own, self._check(measured.done))

    def _measure_ceiling(self, fleet: Fleet) -> Measurement:
        """The same clients against servers that compute nothing, one for each process, so that none is shared."""
        self._screen.phase("measuring the load test's own ceiling")
        info = info_message(self._target.endpoint)
        with contextlib.ExitStack() as stack:
            addresses = [stack.enter_context(null_server(info)) for _ in range(self.settings.processes)]
            jobs = self._jobs(list(map(Endpoint, addresses)), fills=False)
            return self._measure(fleet, jobs, _CEILING_WARM_UP, self.settings.ceiling, None)

    def _jobs(self, endpoints: list[Endpoint], *, fills: bool) -> list[Job]:
        settings = self.settings
        return [
            Job(
                endpoint=endpoint,
                spec=self._info.spec,
                plan=self.plan,
                process=process,
                processes=settings.processes,
                run=self._run_number,
                fills=fills,
                rate=settings.rate if fills else None,
                spacing=settings.spacing,
                seed=settings.seed,
                transport=settings.transport,
                tenant=self._target.tenant,
                timeout=settings.timeout,
                check_share=settings.check_share if fills else 0.0,
            )
            for process, endpoint in enumerate(endpoints)
        ]

    def _measure(
        self, fleet: Fleet, jobs: list[Job], warm_up: float, duration: float, target: Target | None
    ) -> Measurement:
        """Has the jobs done; asks the target, if there is one, for its own account at both ends of the window."""
        measured = Measurement()
        window: Window | None = None
        for event in fleet.run(jobs, warm_up, duration, lambda: self._screen.interrupted):
            match event:
                case Begins():
                    window = dataclasses.replace(event.window)
                case Measuring():
                    measured.before = _scrape(target)
                case Measured() if window is not None:
                    window.stop()
                    measured.seconds = window.end - window.measured_from
                    measured.after = _scrape(target)
                    measured.info = _ask_again(target)
                case Ended():
                    measured.done = event.done
            self._screen.see(event)
        return measured

    def _check(self, done: list[Done]) -> Checks:
        samples = [sample for part in done for sample in part.samples]
        # Those that a minute is not enough for are to be any of them, not those of the last process.
        random.Random(self.settings.seed).shuffle(samples)
        spec = self._info.spec
        pool = TensorPool(
            heads=spec.num_index_heads, head_dim=spec.head_dim, longest=self.plan.longest, seed=self.settings.seed
        )
        return check(samples, sum(part.answers for part in done), spec, pool)

    def _result(self, measured: Measurement, own: Measurement | None, checks: Checks) -> dict[str, Any]:
        recorder = results.merged([part.recorder for part in measured.done])
        measurements = results.measurements(recorder, measured.seconds)
        rate = measurements["throughput"]["calls_per_second"]
        return {
            "format": results.FORMAT,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": asdict(self.settings),
            "target": self._target.told(),
            "environment": environment(),
            "server": {**results.server_facts(self._info, measured.info), **self._metrics(measured)},
            "shapes": results.shape_facts(self.plan),
            "window": {
                "seconds": measured.seconds,
                "warm_up_seconds": self.settings.warm_up,
                "interrupted": self._screen.interrupted,
            },
            **measurements,
            "sent": results.sent(recorder),
            "left_open": sum(part.left_open for part in measured.done),
            "cpu_shares": [part.cpu_share for part in measured.done],
            "ceiling": None if own is None else results.ceiling(own.done, own.seconds, rate),
            "checks": asdict(checks),
        }

    def _metrics(self, measured: Measurement) -> dict[str, Any]:
        """The server's own account of the window, and of the requests of the whole run."""
        if self._first_snapshot is None or measured.before is None or measured.after is None:
            return {"metrics": None, "requests": None}
        last = _scrape(self._target)
        requests = None
        if last is not None:
            counters = difference(self._first_snapshot, last)["counters"]
            requests = {name: rise for name, rise in counters.items() if name.startswith(_REQUESTS)}
        return {"metrics": difference(measured.before, measured.after), "requests": requests}


def _ask(target: Target, timeout: float) -> Info:
    at = target.endpoint
    with Client(at.address, tenant=target.tenant, timeout=timeout, tls=at.tls, token=at.token) as client:
        return client.info()


# A server that is gone in the middle of a run is part of the result, not the end of it.
def _ask_again(target: Target | None) -> Info | None:
    with contextlib.suppress(BlockdexError):
        return None if target is None else _ask(target, _ANSWER_SECONDS)
    return None


def _scrape(target: Target | None) -> Snapshot | None:
    with contextlib.suppress(MetricsError):
        return scrape(target) if target is not None and target.http_address else None
    return None
