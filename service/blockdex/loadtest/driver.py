"""One client of the load test: a connection of its own, a script, and one call in flight."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from blockdex.client import AsyncClient
from blockdex.contract.errors import BlockdexError
from blockdex.loadtest.crew import Crew
from blockdex.loadtest.recorder import OK, CallRecord
from blockdex.loadtest.schedule import Phase, Schedule
from blockdex.loadtest.scripts import Numbers, script_of
from blockdex.loadtest.steps import SequenceStep, Step, TokenStep

_CLOSE_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


class CallFailedError(Exception):
    """A call failed, so the script's idea of its sequences may be wrong."""


class Driver:
    """Runs the script of one client.

    Args:
        crew: what the clients of a process share.
        number: of the client.
    """

    def __init__(self, crew: Crew, number: int) -> None:
        job = crew.job
        self._crew = crew
        self.shape = job.plan.shapes[number]
        self._numbers = Numbers(job.run, number, job.seed)
        self._client = AsyncClient(
            job.endpoint.address,
            tenant=job.tenant,
            timeout=job.timeout,
            transport=job.transport,
            tls=job.endpoint.tls,
            token=job.endpoint.token,
        )
        self._script = script_of(self.shape, self._numbers, job.plan.bounds)
        self._open: set[int] = set()

    async def set_up(self) -> None:
        """Makes the script's first calls; ends early when the run is told to stop.

        Raises:
            CallFailedError: one of them failed.
        """
        for step in self._script.set_up():
            if not self._crew.job.fills:
                continue
            if self._crew.window.over():
                return
            await self._call(step, "set_up", None)

    async def run(self, schedule: Schedule) -> None:
        """Makes a call a turn until the schedule ends. After a failure the client starts over with new sequences."""
        while True:
            try:
                for step in self._script.steps():
                    moment = await schedule.turn()
                    if moment is None:
                        return
                    await self._call(step, self._crew.window.phase_of(moment), moment)
            except CallFailedError:
                if not await self._start_over():
                    return

    async def close(self) -> int:
        """Closes what is open and the connection; the number of sequences that stay open, the server being gone."""
        await self._close_sequences("clean_up")
        await self._client.close()
        return len(self._open)

    async def _start_over(self) -> bool:
        """Whether the client has new sequences before the run ends; it waits for the server all the time."""
        crew, began, pause = self._crew, time.monotonic(), _FIRST_PAUSE
        try:
            while not crew.window.over():
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                await self._close_sequences("set_up")
                self._script = script_of(self.shape, self._numbers, crew.job.plan.bounds)
                with contextlib.suppress(CallFailedError):
                    await self.set_up()
                    return True
        finally:
            crew.recorder.wait(began, time.monotonic(), crew.window)
        return False

    async def _close_sequences(self, phase: Phase) -> None:
        for sequence in list(self._open):
            try:
                await self._call(SequenceStep("close", sequence), phase, None)
            except CallFailedError:
                return

    async def _call(self, step: Step, phase: Phase, intended: float | None) -> None:
        tensors = self._crew.tensors(step) if isinstance(step, TokenStep) else {}
        failure: BlockdexError | None = None
        sent = time.monotonic()
        try:
            if isinstance(step, TokenStep):
                answer = await self._of_tokens(step, tensors)
            else:
                await self._of_sequence(step)
        except BlockdexError as error:
            failure = error
        ended = time.monotonic()
        record = CallRecord(
            phase=phase,
            operation=step.operation,
            rpc=self._crew.rpc_of(step),
            intended=sent if intended is None else intended,
            sent=sent,
            ended=ended,
            tokens=len(tensors.get("keys", ())),
            queries=len(tensors.get("queries", ())),
            outcome=OK if failure is None else (failure.code.name, str(failure.reason)),
        )
        self._crew.record(record, str(failure or ""))
        if failure is not None:
            raise CallFailedError(f"{step.rpc}: {failure}")
        if isinstance(step, TokenStep) and "queries" in tensors:
            self._crew.sampler.consider(step, answer)

    async def _of_sequence(self, step: SequenceStep) -> None:
        match step.operation:
            case "open":
                self._open.add(step.sequence)
                await self._client.open_sequence(step.sequence)
            case "fork":
                self._open.add(step.sequence)
                await self._client.fork_sequence(step.parent, step.sequence, step.length)
            case "truncate":
                await self._client.truncate_sequence(step.sequence, step.length)
            case "close":
                # Whatever epoch it is: a sequence of an earlier one is gone, and so closed.
                timeout = min(_CLOSE_SECONDS, self._crew.job.timeout)
                await self._client.close_sequence(step.sequence, epoch=0, timeout=timeout)
                self._open.discard(step.sequence)

    async def _of_tokens(self, step: TokenStep, tensors: dict[str, Any]) -> Any:
        calls: dict[str, Any] = {
            "AppendKeys": self._client.append_keys,
            "SelectBlocks": self._client.select_blocks,
            "AppendAndSelect": self._client.append_and_select,
        }
        return await calls[step.rpc](
            step.layer,
            sequences=[span.sequence.id for span in step.spans],
            starts=[span.run.start for span in step.spans],
            lengths=[span.run.length for span in step.spans],
            # Drafts that were rejected are written over, and a sequence that has grown enough starts over.
            **({} if step.rpc == "SelectBlocks" else {"rollback": True}),
            **tensors,
        )
