"""A process of the load test: its share of the clients on one asyncio loop, told what to do over a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import selectors
import sys
import time
from multiprocessing.connection import Connection
from random import Random
from typing import Any

from blockdex.loadtest.driver import CallFailedError, Driver
from blockdex.loadtest.jobs import Command, Done, Failed, Go, Job, Progress, Ready, Report
from blockdex.loadtest.recorder import OK, CallRecord, Recorder
from blockdex.loadtest.sampling import Sampler
from blockdex.loadtest.schedule import ClosedLoop, OpenLoop, Schedule, Window, arrivals
from blockdex.loadtest.shapes import Shape
from blockdex.loadtest.steps import Step, TokenStep
from blockdex.loadtest.tensors import TensorPool

_HEARTBEAT_SECONDS = 0.25
_LONGEST_START = 5.0


class Crew:
    """What the clients of this process share while they do one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.window = Window(math.inf, math.inf, math.inf)
        self.recorder = Recorder()
        self.progress = Progress()
        self.sampler = Sampler(job.check_share, f"samples {job.seed} {job.process}")
        self._pool = TensorPool(
            heads=job.spec.num_index_heads, head_dim=job.spec.head_dim, longest=job.plan.longest, seed=job.seed
        )

    def tensors(self, step: TokenStep) -> dict[str, Any]:
        """The tensors of a call, by the names of the client's arguments."""
        runs = [span.run for span in step.spans]
        tensors = {}
        if step.rpc != "SelectBlocks":
            tensors["keys"] = self._pool.keys(step.layer, runs)
        if step.rpc != "AppendKeys":
            tensors["queries"] = self._pool.queries(step.layer, runs)
        return tensors

    def rpc_of(self, step: Step) -> str:
        """The RPC of a call, as the server counts it."""
        streamed = self.job.transport == "stream" and isinstance(step, TokenStep)
        return f"Stream/{step.rpc}" if streamed else step.rpc

    def record(self, call: CallRecord, error: str) -> None:
        """Counts a call that has ended, and tells of it with the next heartbeat."""
        self.recorder.observe(call, self.window)
        if call.outcome == OK:
            self.progress.latencies.observe(call.ended - call.intended)
            self.progress.tokens += call.tokens
        else:
            self.progress.errors += 1
            self.progress.last_error = error

    def schedules(self) -> dict[type[Shape], Schedule]:
        """A schedule for each kind of client, so that slow ones do not take the turns of others."""
        job = self.job
        shapes = [job.plan.shapes[client] for client in job.clients]
        schedules: dict[type[Shape], Schedule] = {}
        for kind in {type(shape) for shape in shapes}:
            if job.rate is None:
                schedules[kind] = ClosedLoop(self.window)
                continue
            rate = job.rate * sum(isinstance(shape, kind) for shape in shapes) / len(job.plan.shapes)
            numbers = Random(f"arrivals {job.seed} {job.process} {kind.__name__}")
            schedules[kind] = OpenLoop(self.window, arrivals(rate, job.spacing, self.window.begin, numbers))
        return schedules


class Worker:
    """Does the jobs that come over the pipe, one after another, until it ends."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._commands: asyncio.Queue[Command | None] = asyncio.Queue()

    async def run(self) -> None:
        """Until the other side is gone."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe.fileno(), self._receive)
        try:
            while (command := await self._commands.get()) is not None:
                if isinstance(command, Job):
                    self._send(await self._do(command))
        finally:
            loop.remove_reader(self._pipe.fileno())

    async def _do(self, job: Job) -> Done | Failed:
        crew = Crew(job)
        drivers = [Driver(crew, client) for client in job.clients]
        go = asyncio.Event()
        helpers = (asyncio.create_task(self._beat(crew)), asyncio.create_task(self._listen(crew.window, go)))
        cpu_share, failure = 0.0, ""
        try:
            await _set_up(crew, drivers)
            self._send(Ready())
            await go.wait()
            cpu_share = await _measure(crew, drivers)
        except CallFailedError as error:
            failure = str(error)
        finally:
            left_open = sum(await asyncio.gather(*(driver.close() for driver in drivers)))
            for helper in helpers:
                helper.cancel()
        if failure:
            return Failed(failure)
        return Done(crew.recorder, crew.sampler.samples, crew.sampler.answers, cpu_share, left_open)

    async def _beat(self, crew: Crew) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            self._send(crew.progress)
            crew.progress = Progress()

    async def _listen(self, window: Window, go: asyncio.Event) -> None:
        while True:
            command = await self._commands.get()
            if isinstance(command, Go):
                window.set(command.window)
            else:
                window.stop()
            go.set()
            if command is None:
                self._commands.put_nowait(None)
                return

    def _receive(self) -> None:
        try:
            self._commands.put_nowait(self._pipe.recv())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            self._commands.put_nowait(None)

    def _send(self, report: Report) -> None:
        # Where the other side is gone there is nobody to tell; the end of the pipe ends the job.
        with contextlib.suppress(OSError):
            self._pipe.send(report)


async def _set_up(crew: Crew, drivers: list[Driver]) -> None:
    """Sets every client up; where one fails, the others stop.

    Raises:
        CallFailedError: of the first one that failed.
    """

    async def one(driver: Driver) -> None:
        try:
            await driver.set_up()
        except CallFailedError:
            crew.window.stop()
            raise

    for outcome in await asyncio.gather(*map(one, drivers), return_exceptions=True):
        if outcome is not None:
            raise outcome


async def _measure(crew: Crew, drivers: list[Driver]) -> float:
    """Runs the clients through the window; the share of a core that it took."""
    # Nothing made so far has to be looked at again by the collector, whose pauses would count as latency.
    gc.collect()
    gc.freeze()
    await asyncio.sleep(max(0.0, min(crew.window.begin - time.monotonic(), _LONGEST_START)))
    began, cpu_began = time.monotonic(), time.process_time()
    schedules = crew.schedules()
    await asyncio.gather(*(driver.run(schedules[type(driver.shape)]) for driver in drivers))
    crew.recorder.unsent = sum(schedule.unsent() for schedule in schedules.values())
    gc.unfreeze()
    return (time.process_time() - cpu_began) / (time.monotonic() - began)


def main() -> None:
    """Works for the process that started this one, over the file descriptor that it names."""
    pipe = Connection(int(sys.argv[1]))
    # Unlike epoll, select waits to the microsecond, and calls begin when they are meant to.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(Worker(pipe).run())


if __name__ == "__main__":
    main()
