"""What the clients of one process of the load test share."""

from __future__ import annotations

import math
from random import Random
from typing import Any

from blockdex.loadtest.jobs import Job, Progress
from blockdex.loadtest.recorder import OK, CallRecord, Recorder
from blockdex.loadtest.sampling import Sampler
from blockdex.loadtest.schedule import ClosedLoop, OpenLoop, Schedule, Window, arrivals
from blockdex.loadtest.shapes import Shape
from blockdex.loadtest.steps import Step, TokenStep
from blockdex.loadtest.tensors import TensorPool


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
        return f"Stream/{step.rpc}" if self.job.transport == "stream" else step.rpc

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
