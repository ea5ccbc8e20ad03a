"""A process of the load test: its share of the clients on one asyncio loop, told what to do over a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import selectors
import sys
import time
from multiprocessing.connection import Connection

from blockdex.loadtest.crew import Crew
from blockdex.loadtest.driver import CallFailedError, Driver
from blockdex.loadtest.jobs import Command, Done, Failed, Go, Job, Progress, Ready, Report
from blockdex.loadtest.schedule import Window

_HEARTBEAT_SECONDS = 0.25
_LONGEST_START = 5.0


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
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as executor:
        executor.run(Worker(pipe).run())


if __name__ == "__main__":
    main()
