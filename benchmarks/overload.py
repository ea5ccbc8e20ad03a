"""What a server does when three times as much is asked for as it can do.

    python -m benchmarks.overload [--seconds 10] [--output FILE]

Open-loop: requests are sent when they are due, by a Poisson process, whatever became of those before, and a latency
counts from then on. Each is a decode of one sequence of 16,384 tokens, from processes that send nothing else and try
nothing again. First they ask as much as is answered, eight at a time each: the peak. Then they ask for four fifths of
that, the sustainable rate; for three times the sustainable rate; and for the sustainable rate again.

Generators and server share the machine's processors, in all phases alike: the peak is what the server answers beside
these very processes. The kernels have one thread, so that they leave the others theirs.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import RESULTS, environment
from benchmarks.served import served
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc

GENERATORS = 2
HEADS, HEAD_DIM, TOKENS, APPEND = 4, 128, 16_384, 2048
SEQUENCES = 8
IN_FLIGHT = 8
SUSTAINABLE, OVERLOAD = 0.8, 3.0
MAX_QUEUE_SECONDS = 0.05
_STREAMS = 4
_START_SECONDS = 2.0
_LAST_SECONDS = 5.0
"""How long the last answers may take."""
_WINDOW_SECONDS = 0.2
_ITEM = 2
_OK, _REFUSED = 0, 1

Outcomes = NDArray[np.float64]
"""float64 `[N, 3]`: `time.monotonic` at which each request was due, its latency in seconds, and 0 if it went well."""


@dataclass(frozen=True)
class Phase:
    """What became of the requests of a phase.

    Attributes:
        asked_per_second: requests that were due.
        answered_per_second: those that were answered.
        refused_share: of all.
        p50_ms, p99_ms: of those that were answered.
        refusal_p99_ms: of those that were not.
    """

    asked_per_second: float
    answered_per_second: float
    refused_share: float
    p50_ms: float
    p99_ms: float
    refusal_p99_ms: float

    @classmethod
    def of(cls, outcomes: Outcomes, seconds: float) -> Phase:
        """Sums up what was due in so many seconds."""
        good = outcomes[:, 2] == _OK
        p50, p99 = 1e3 * np.quantile(outcomes[good, 1], (0.5, 0.99))
        refusal = 1e3 * np.quantile(outcomes[~good, 1], 0.99) if not good.all() else 0.0
        share = float(1 - good.mean())
        return cls(len(good) / seconds, good.sum() / seconds, share, float(p50), float(p99), float(refusal))


class Generator:
    """Streams of one process, on its asyncio loop."""

    def __init__(self, address: str, number: int) -> None:
        self._address = address
        self._sequences = [1 + number * SEQUENCES + each for each in range(SEQUENCES)]
        self._random = random.Random(number)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[bool]] = {}
        self._calls: list[tuple[Any, asyncio.Lock]] = []

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Opens the sequences, with their keys, and the streams."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub: Any = pb_grpc.IndexerServiceStub(channel)
            opening = [pb.NewSequence(sequence_id=sequence) for sequence in self._sequences]
            await stub.OpenSequences(pb.OpenSequencesRequest(sequences=opening))
            keys = pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(_ITEM * APPEND * HEAD_DIM))
            for sequence, start in itertools.product(self._sequences, range(0, TOKENS, APPEND)):
                spans = pb.Spans(sequence_ids=[sequence], starts=[start], lengths=[APPEND])
                await stub.AppendKeys(pb.AppendKeysRequest(spans=spans, keys=keys))
            self._calls = [(stub.Stream(), asyncio.Lock()) for _ in range(_STREAMS)]
            reading = [asyncio.create_task(self._read(call)) for call, _ in self._calls]
            try:
                yield
            finally:
                for task in reading:
                    task.cancel()

    async def _read(self, call: Any) -> None:
        async for response in call:
            if response.request_id:
                self._waiting.pop(response.request_id).set_result(not response.HasField("error"))

    async def ask(self, due: float) -> tuple[float, float, int]:
        """Asks for a selection, and says what became of it."""
        number = next(self._numbers)
        spans = pb.Spans(sequence_ids=[self._random.choice(self._sequences)], starts=[TOKENS - 1], lengths=[1])
        queries = pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(_ITEM * HEADS * HEAD_DIM))
        request = pb.StreamRequest(
            request_id=number, select_blocks=pb.SelectBlocksRequest(spans=spans, queries=queries)
        )
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        call, is_written = self._calls[number % _STREAMS]
        async with is_written:
            await call.write(request)
        good = await answer
        return due, time.monotonic() - due, _OK if good else _REFUSED

    async def closed_loop(self, began: float, seconds: float) -> list[tuple[float, float, int]]:
        """Asks again as soon as it is answered, `IN_FLIGHT` times at once."""
        outcomes = []

        async def again() -> None:
            while (now := time.monotonic()) < began + seconds:
                outcomes.append(await self.ask(now))

        await asyncio.sleep(began - time.monotonic())
        await asyncio.gather(*(again() for _ in range(IN_FLIGHT)))
        return outcomes

    async def open_loop(self, began: float, phases: list[tuple[float, float]]) -> list[tuple[float, float, int]]:
        """Asks when it is due, at so many requests a second for so many seconds, phase by phase."""
        asked, due, ends = [], began, began
        for rate, seconds in phases:
            ends += seconds
            while (due := due + self._random.expovariate(rate)) < ends:
                if (wait := due - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                asked.append(asyncio.create_task(self.ask(due)))
            due = ends
        async with asyncio.timeout(_LAST_SECONDS):
            return await asyncio.gather(*asked)


async def generate(address: str, number: int) -> None:
    """A generator's process: does what it reads on stdin, a line each, and writes what became of it."""
    generator = Generator(address, number)
    async with generator.connected():
        print("null", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            kind, began, argument = json.loads(line)
            outcomes = await getattr(generator, kind)(began, argument)
            print(json.dumps(outcomes), flush=True)


class Generators:
    """All generators' processes."""

    def __init__(self, address: str) -> None:
        command = (sys.executable, "-m", "benchmarks.overload", "--generate", address, "--number")
        self._processes = [
            subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for number in range(GENERATORS)
        ]
        list(self._said())

    def close(self) -> None:
        """Ends them."""
        for process in self._processes:
            process.kill()
            process.wait()

    def run(self, kind: str, argument: Any) -> tuple[float, Outcomes]:
        """Has all of them do something at once; when that began, and what became of the requests."""
        began = time.monotonic() + 0.5
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([kind, began, argument]) + "\n")
            process.stdin.flush()
        return began, np.array([outcome for outcomes in self._said() for outcome in outcomes])

    def _said(self) -> Iterator[Any]:
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "a generator ended by itself"
            yield json.loads(line)


def recovery_seconds(outcomes: Outcomes, ended: float, p99: float) -> float:
    """How long after the overload the last window was in which one was refused, or half took longer than `p99`."""
    last = 0.0
    for window in range(int((outcomes[:, 0].max() - ended) / _WINDOW_SECONDS)):
        begins = ended + window * _WINDOW_SECONDS
        own = outcomes[(outcomes[:, 0] >= begins) & (outcomes[:, 0] < begins + _WINDOW_SECONDS)]
        if len(own) and (own[:, 2].any() or np.median(own[:, 1]) > p99):
            last = (window + 1) * _WINDOW_SECONDS
    return last


def drill(address: str, seconds: float) -> dict[str, Any]:
    """All phases, one after the other, and what they come to."""
    generators = Generators(address)
    try:
        generators.run("closed_loop", _START_SECONDS)
        _, outcomes = generators.run("closed_loop", seconds)
        peak = len(outcomes) / seconds
        rate = SUSTAINABLE * peak
        each = [(times * rate / GENERATORS, seconds) for times in (1.0, OVERLOAD, 1.0)]
        began, outcomes = generators.run("open_loop", each)
    finally:
        generators.close()
    number = ((outcomes[:, 0] - began) // seconds).astype(int)
    before, during, after = (Phase.of(outcomes[number == phase], seconds) for phase in range(3))
    last = outcomes[number == 2]
    return {
        "peak_per_second": peak,
        "before": asdict(before),
        "during": asdict(during),
        "after": asdict(after),
        "goodput_of_peak": during.answered_per_second / peak,
        "p99_times": during.p99_ms / before.p99_ms,
        "recovery_seconds": recovery_seconds(last, began + 2 * seconds, before.p99_ms / 1e3),
    }


def main() -> None:
    """Runs the drill, prints its figures and writes them where they are wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase")
    parser.add_argument("--output", type=Path, help=f"such as {RESULTS.name}/overload.json")
    parser.add_argument("--generate", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate:
        asyncio.run(generate(arguments.generate, arguments.number))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with served("cpu", 1, "256MiB", 1, f"--max-queue-seconds={MAX_QUEUE_SECONDS}") as server:
        figures = drill(server.grpc, arguments.seconds)
    text = json.dumps(environment("grpcio") | {"max_queue_seconds": MAX_QUEUE_SECONDS} | figures, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
