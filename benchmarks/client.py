"""Latency of the Python client beside a bare gRPC echo of the same bytes, in one run.

Starts `blockdex serve` and an echo server on free ports. Each round makes one AppendAndSelect (one new token of every
sequence, one layer) over unary calls, one over a stream, and one echo of as many bytes each way by either, so that
whatever else the machine does strikes all four alike. Writes JSON and a plot to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import grpc
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.environment import RESULTS, environment
from blockdex import Client
from blockdex.v1 import indexer_pb2 as pb

HEAD_DIM, HEADS, TOPK = 128, 4, 16
CASES = ((1, 1024), (1, 8192), (64, 1024), (64, 8192))
_START_SECONDS = 60.0
_ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class Row:
    """One case, one transport: milliseconds of a call, of an echo of the same bytes, and of the kernels inside."""

    sequences: int
    tokens: int
    transport: str
    request_bytes: int
    answer_bytes: int
    p50_ms: float
    p99_ms: float
    echo_p50_ms: float
    echo_p99_ms: float
    kernel_ms: float
    over_echo_and_kernel: float


@contextlib.contextmanager
def process(*command: str, ready: str, seconds: float = _START_SECONDS) -> Iterator[re.Match[str]]:
    """A process that says on its output, within `seconds`, what `ready` matches; terminated at the end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        try:
            deadline = time.monotonic() + seconds
            said: list[str] = []
            for line in running.stdout:
                said.append(line)
                if match := re.search(ready, line):
                    # What it says later is read on, or a full pipe would hold it up.
                    threading.Thread(target=list, args=(running.stdout,), daemon=True).start()
                    yield match
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{command[0]}: not ready after {seconds} s")
            else:
                raise RuntimeError(f"{' '.join(command)}: ended before it was ready\n{''.join(said)}")
        finally:
            running.terminate()
            try:
                running.wait(timeout=_ANSWER_SECONDS)
            except subprocess.TimeoutExpired:
                running.kill()


class EchoStream:
    """Sends a message over one bidirectional stream and waits for its answer."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream("/blockdex.benchmarks.Echo/Stream")
        self._answers = method(iter(self._outbox.get, None))

    def __call__(self, message: bytes) -> bytes:
        self._outbox.put(message)
        return bytes(next(self._answers))

    def close(self) -> None:
        """Ends the stream."""
        self._outbox.put(None)


class Fleet:
    """Sequences of equal length on the server, and one step of all of them, made again and again."""

    def __init__(self, client: Client, sequences: int, tokens: int, first_id: int) -> None:
        random = np.random.default_rng(0)
        self.ids = list(range(first_id, first_id + sequences))
        self._tokens = tokens
        self._lengths = [1] * sequences
        self.keys = random.standard_normal((sequences, HEAD_DIM)).astype(ml_dtypes.bfloat16)
        self.queries = random.standard_normal((sequences, HEADS, HEAD_DIM)).astype(ml_dtypes.bfloat16)
        for sequence in self.ids:
            client.open_sequence(sequence)
            prompt = random.standard_normal((tokens - 1, HEAD_DIM)).astype(ml_dtypes.bfloat16)
            client.append_keys(0, sequences=[sequence], lengths=[tokens - 1], starts=[0], keys=prompt)

    def step(self, client: Client) -> None:
        """Appends the last token of every sequence (again) and selects for it."""
        client.append_and_select(
            0,
            sequences=self.ids,
            lengths=self._lengths,
            starts=[self._tokens - 1] * len(self.ids),
            keys=self.keys,
            queries=self.queries,
            rollback=True,
        )

    def message_bytes(self) -> tuple[int, int]:
        """Serialized bytes of a step's request and of its answer."""
        spans = pb.Spans(sequence_ids=self.ids, starts=[self._tokens - 1] * len(self.ids), lengths=self._lengths)
        keys = pb.Tensor(dtype=pb.DTYPE_BF16, data=self.keys.tobytes())
        queries = pb.Tensor(dtype=pb.DTYPE_BF16, data=self.queries.tobytes())
        ids = pb.Tensor(dtype=pb.DTYPE_INT32, data=bytes(4 * len(self.ids) * HEADS * TOPK))
        request = pb.AppendAndSelectRequest(
            spans=spans, keys=keys, queries=queries, header=pb.RequestHeader(epoch=1), rollback=True
        )
        return request.ByteSize(), pb.AppendAndSelectResponse(block_ids=ids, epoch=1).ByteSize()


def kernel_seconds(http_address: str) -> float:
    """Seconds that the server's append and decode kernels took since it started, by its own metrics."""
    with urllib.request.urlopen(f"http://{http_address}/metrics", timeout=_ANSWER_SECONDS) as response:
        text = response.read().decode()
    phases = re.findall(r'^blockdex_device_seconds_total\{phase="(?:append|decode)"\} (\S+)', text, re.MULTILINE)
    if len(phases) != 2:
        raise RuntimeError("/metrics: blockdex_device_seconds_total of append and decode are missing")
    return sum(map(float, phases))


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def percentile(samples: list[float], percent: float) -> float:
    """A percentile by linear interpolation."""
    return float(np.percentile(samples, percent))


def measure(
    fleet: Fleet, clients: dict[str, Client], echoes: dict[str, Callable[[bytes], object]], http: str, rounds: int
) -> Iterator[Row | None]:
    """One case: yields None after each round, the rows at the end."""
    request_bytes, answer_bytes = fleet.message_bytes()
    message = answer_bytes.to_bytes(4, "little") + bytes(request_bytes - 4)
    warm_up = max(rounds // 10, 3)
    calls: dict[str, list[float]] = {name: [] for name in clients}
    bare: dict[str, list[float]] = {name: [] for name in clients}
    kernels_before = 0.0
    for number in range(warm_up + rounds):
        if number == warm_up:
            kernels_before = kernel_seconds(http)
        for name, client in clients.items():
            call = timed(partial(fleet.step, client))
            echo = timed(partial(echoes[name], message))
            if number >= warm_up:
                calls[name].append(call)
                bare[name].append(echo)
        yield None
    kernel_ms = (kernel_seconds(http) - kernels_before) * 1e3 / (rounds * len(clients))
    for name in clients:
        p50, echo_p50 = statistics.median(calls[name]), statistics.median(bare[name])
        yield Row(
            sequences=len(fleet.ids),
            tokens=fleet._tokens,
            transport=name,
            request_bytes=request_bytes,
            answer_bytes=answer_bytes,
            p50_ms=p50,
            p99_ms=percentile(calls[name], 99),
            echo_p50_ms=echo_p50,
            echo_p99_ms=percentile(bare[name], 99),
            kernel_ms=kernel_ms,
            over_echo_and_kernel=p50 / (echo_p50 + kernel_ms),
        )


def run(rounds: int) -> list[Row]:
    """Starts both servers and measures every case."""
    flags = (
        "--num-layers=1 --cache-bytes=256MiB --grpc-address=127.0.0.1:0 --http-address=127.0.0.1:0 --log-format=json"
    )
    serving = r'"grpc": "([^"]+)".*"http": "([^"]+)"'
    rows: list[Row] = []
    with (
        process(sys.executable, "-m", "blockdex", "serve", *flags.split(), ready=serving) as server,
        process(sys.executable, "-m", "benchmarks.echo", ready=r"^(\d+) \d+$") as echo,
        grpc.insecure_channel(f"127.0.0.1:{echo[1]}") as channel,
        Client(server[1], transport="unary") as unary,
        Client(server[1], transport="stream") as stream,
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        ) as progress,
    ):
        echo_unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/blockdex.benchmarks.Echo/Unary")
        echo_stream = EchoStream(channel)
        echoes: dict[str, Callable[[bytes], object]] = {"unary": echo_unary, "stream": echo_stream}
        for number, (sequences, tokens) in enumerate(CASES):
            fleet = Fleet(unary, sequences, tokens, first_id=1 + 1000 * number)
            total = rounds if sequences == 1 else max(rounds // 4, 20)
            task = progress.add_task(f"{sequences} x {tokens}", total=total + max(total // 10, 3))
            for row in measure(fleet, {"unary": unary, "stream": stream}, echoes, server[2], total):
                if row is None:
                    progress.advance(task)
                else:
                    rows.append(row)
            for sequence in fleet.ids:
                unary.close_sequence(sequence)
        echo_stream.close()
    return rows


def show(rows: list[Row]) -> None:
    """The table on the screen."""
    table = Table(title="AppendAndSelect of sequences x tokens, one layer (ms); ratio: p50 / (echo p50 + kernels)")
    for heading in ("case", "", "p50", "p99", "echo p50", "echo p99", "kernels", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = (row.p50_ms, row.p99_ms, row.echo_p50_ms, row.echo_p99_ms, row.kernel_ms)
        table.add_row(
            f"{row.sequences} x {row.tokens}",
            row.transport,
            *(f"{number:.2f}" for number in numbers),
            f"{row.over_echo_and_kernel:.2f}",
        )
    Console().print(table)


def plot(rows: list[Row], path: Path) -> None:
    """p50 of every case, split into echo, kernels and the rest, with p99 as a whisker."""
    import matplotlib  # noqa: PLC0415 - takes a second to load, and only the end needs it

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    groups = sorted({row.sequences for row in rows})
    figure, panels = pyplot.subplots(1, len(groups), figsize=(10, 4.5), layout="constrained")
    for axes, sequences in zip(panels, groups, strict=True):
        chosen = [row for row in rows if row.sequences == sequences]
        places = np.arange(len(chosen))
        echo = np.array([row.echo_p50_ms for row in chosen])
        kernel = np.array([row.kernel_ms for row in chosen])
        rest = np.maximum([row.p50_ms for row in chosen] - echo - kernel, 0)
        axes.bar(places, echo, label="bare echo, p50", color="#9aa5b1")
        axes.bar(places, kernel, bottom=echo, label="kernels, mean", color="#3d7ea6")
        axes.bar(places, rest, bottom=echo + kernel, label="the rest of the call, p50", color="#e0a458")
        axes.plot(places, [row.p99_ms for row in chosen], "k_", markersize=18, label="p99")
        axes.set_xticks(places, [f"{row.tokens} tokens\n{row.transport}" for row in chosen])
        axes.set_title(f"{sequences} sequence{'s' if sequences > 1 else ''}")
        axes.set_ylabel("ms a call")
    panels[0].legend()
    figure.suptitle("AppendAndSelect from the Python client beside a bare gRPC echo of the same bytes (CPU kernels)")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400, help="calls of each kind with one sequence (64: a quarter)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for client.json and client.png")
    arguments = parser.parse_args()
    rows = run(arguments.rounds)
    show(rows)
    arguments.output.mkdir(parents=True, exist_ok=True)
    facts = environment("blockdex", "grpcio", "protobuf", "numpy", "torch")
    result = {**facts, "rounds": arguments.rounds, "rows": [asdict(row) for row in rows]}
    (arguments.output / "client.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(rows, arguments.output / "client.png")
    print(f"written: {arguments.output / 'client.json'}, {arguments.output / 'client.png'}")


if __name__ == "__main__":
    main()
