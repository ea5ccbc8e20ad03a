"""An engine beside its server: one call, and a step of all layers, over each way to the server, in one run.

Starts `blockdex serve` with a socket. Each round appends and selects one new token of every sequence over unary calls,
a stream and the ring, one layer a call, so that whatever else the machine does strikes all ways alike. Beside them
stands what the kernels took, by the server's own metrics. Writes JSON and a plot to `benchmarks/results`.

python -m benchmarks.colocated --device cpu
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.client import HEAD_DIM, HEADS, kernel_seconds, percentile, process, timed
from benchmarks.environment import RESULTS, environment, slug
from blockdex import Client

WAYS: tuple[Literal["unary", "stream", "ring"], ...] = ("unary", "stream", "ring")
_START_SECONDS = 600.0  # On a GPU it compiles its kernels, where no cache holds them.
_WARM_UP = 0.2


@dataclass(frozen=True)
class Row:
    """One way: microseconds of a call, and milliseconds of a step of all layers."""

    transport: str
    call_p50_us: float
    call_p99_us: float
    step_p50_ms: float
    step_p99_ms: float


class Engine:
    """Sequences of one way, each layer of which grows by a token a step."""

    def __init__(self, client: Client, layers: int, sequences: int, tokens: int, first_id: int) -> None:
        random = np.random.default_rng(0)
        self.client = client
        self.ids = list(range(first_id, first_id + sequences))
        self._layers = layers
        self._lengths = [1] * sequences
        self._keys = random.standard_normal((sequences, HEAD_DIM)).astype(ml_dtypes.bfloat16)
        self._queries = random.standard_normal((sequences, HEADS, HEAD_DIM)).astype(ml_dtypes.bfloat16)
        client.open_sequences(self.ids)
        for layer in range(layers):
            prompt = random.standard_normal((sequences * tokens, HEAD_DIM)).astype(ml_dtypes.bfloat16)
            client.append_keys(layer, sequences=self.ids, lengths=[tokens] * sequences, keys=prompt)

    def call(self, layer: int) -> None:
        """One layer of a step."""
        self.client.append_and_select(
            layer, sequences=self.ids, lengths=self._lengths, keys=self._keys, queries=self._queries
        )

    def step(self) -> list[float]:
        """All layers; the microseconds of each call."""
        return [1e3 * timed(partial(self.call, layer)) for layer in range(self._layers)]


def run(options: argparse.Namespace) -> tuple[list[Row], float]:
    """The rows, and microseconds that the kernels of a call take."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        flags = (
            *("--device", options.device, "--num-layers", str(options.layers), "--cache-bytes", options.cache_bytes),
            *("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0", "--socket", f"{folder}/ring"),
            *("--log-format", "json", "--slow-request-seconds", "86400"),
        )
        command = (sys.executable, "-m", "blockdex", "serve", *flags)
        said = stack.enter_context(process(*command, ready=r'^\{.*"event": "serving".*\}$', seconds=_START_SECONDS))
        addresses = json.loads(said[0])
        engines = []
        for number, way in enumerate(WAYS):
            client = stack.enter_context(Client(addresses["grpc"], transport=way, timeout=120))
            engines.append(Engine(client, options.layers, options.sequences, options.tokens, 1 + 1000 * number))
        for _ in range(max(int(_WARM_UP * options.steps), 2)):
            for engine in engines:
                engine.step()
        kernels = kernel_seconds(addresses["http"])
        calls: list[list[list[float]]] = [[] for _ in engines]
        for _ in range(options.steps):
            for engine, steps in zip(engines, calls, strict=True):
                steps.append(engine.step())
        kernels = (kernel_seconds(addresses["http"]) - kernels) * 1e6 / (len(WAYS) * options.steps * options.layers)
    return [_row(way, steps) for way, steps in zip(WAYS, calls, strict=True)], kernels


def _row(way: str, steps: Sequence[list[float]]) -> Row:
    calls = [call for step in steps for call in step]
    whole = [sum(step) / 1e3 for step in steps]
    return Row(way, statistics.median(calls), percentile(calls, 99), statistics.median(whole), percentile(whole, 99))


def show(rows: Sequence[Row], kernels_us: float, title: str) -> None:
    """The table on the screen."""
    table = Table(title=title)
    for heading in ("", "call p50 us", "p99", "step p50 ms", "p99"):
        table.add_column(heading, justify="right")
    table.add_row("kernels alone, mean", f"{kernels_us:.0f}", "", "", "")
    for row in rows:
        numbers = (
            f"{row.call_p50_us:.0f}",
            f"{row.call_p99_us:.0f}",
            f"{row.step_p50_ms:.2f}",
            f"{row.step_p99_ms:.2f}",
        )
        table.add_row(row.transport, *numbers)
    Console().print(table)


def plot(rows: Sequence[Row], kernels_us: float, title: str, path: Path) -> None:
    """p50 of a call over each way, with what the kernels take of it, and p99 as a mark."""
    import matplotlib  # noqa: PLC0415 - takes a second to load, and only the end needs it

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    places = np.arange(len(rows))
    rest = [max(row.call_p50_us - kernels_us, 0) for row in rows]
    axes.bar(places, [kernels_us] * len(rows), label="kernels, mean", color="#3d7ea6")
    axes.bar(places, rest, bottom=kernels_us, label="the rest of the call, p50", color="#e0a458")
    axes.plot(places, [row.call_p99_us for row in rows], "k_", markersize=18, label="p99")
    axes.set_xticks(places, [row.transport for row in rows])
    axes.set_ylabel("us a call")
    axes.set_title(title, fontsize=10)
    axes.legend()
    figure.savefig(path, dpi=130)


def _facts(device: str) -> dict[str, Any]:
    """Where and with what this is measured; asked for once nothing is measured any more."""
    packages = ("blockdex", "grpcio", "protobuf", "numpy", "torch")
    if not device.startswith("cuda"):
        return environment(*packages)
    import torch  # noqa: PLC0415 - an engine on a CPU has no use for it

    return environment(*packages, "triton", device=torch.device(device))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="of the server: cpu or cuda")
    parser.add_argument("--layers", type=int, default=57)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="of each sequence at the beginning")
    parser.add_argument("--cache-bytes", default="4GiB")
    parser.add_argument("--steps", type=int, default=20, help="over each way")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and plot")
    options = parser.parse_args()
    rows, kernels_us = run(options)
    shape = f"{options.sequences} sequences at {options.tokens} tokens, {options.layers} layers"
    title = f"AppendAndSelect from the same host: {shape} ({len(os.sched_getaffinity(0))} cores)"
    show(rows, kernels_us, title)
    facts = _facts(options.device)
    asked = {name: value for name, value in vars(options).items() if name != "output"}
    result = {**facts, **asked, "kernels_us": kernels_us, "rows": [asdict(row) for row in rows]}
    options.output.mkdir(parents=True, exist_ok=True)
    device = facts["machine"]["gpu"]["name"] if "gpu" in facts["machine"] else "cpu"
    name = f"colocated-{slug(device)}"
    (options.output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(rows, kernels_us, title, options.output / f"{name}.png")


if __name__ == "__main__":
    main()
