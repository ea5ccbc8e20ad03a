"""A step of all layers over a device channel, in one CUDA graph; beside it its kernels in a graph of this process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.colocated.decode import Decode
from benchmarks.colocated.settings import FIRST_ID, TENANT, Settings
from blockdex import Client
from blockdex.device_channel.channel import DeviceChannel
from blockdex_kernels import IndexSpec
from blockdex_kernels.dispatch import choose_backend
from blockdex_kernels.interface import Spans

_SECONDS = 3.0
"""For which steps of a kind are measured at most."""
_STAGES = ("queue", "plan", "device", "reply")


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of what was run once before."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph


def on_device(array: NDArray[Any], device: str) -> torch.Tensor:
    """A tensor of what numpy holds, bfloat16 too."""
    if array.dtype == np.int32:
        return torch.from_numpy(array).to(device)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)


def columns(settings: Settings) -> dict[str, Any]:
    """The sequences at their next position."""
    ids = torch.arange(FIRST_ID, FIRST_ID + settings.sequences, device=settings.engine_device)
    return {"sequences": ids, "starts": torch.full_like(ids, settings.tokens), "lengths": torch.ones_like(ids)}


def milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of a replay, until the host sees its end."""
    began = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def summary(graph: torch.cuda.CUDAGraph, settings: Settings) -> dict[str, float]:
    """What a row tells of the replays of a graph; a call is a part of its step."""
    end, took = time.monotonic() + _SECONDS, list[float]()
    while len(took) < 5 or (len(took) < 15 * settings.steps and time.monotonic() < end):
        took.append(milliseconds(graph))
    steps = took[len(took) // 10 :]
    p50, p99 = np.percentile(steps, (50, 99))
    return {"call_p50_us": 1e3 * p50 / settings.layers, "step_p50_ms": float(p50), "step_p99_ms": float(p99)}


class Step:
    """All layers of a step over a channel, captured."""

    def __init__(self, channel: DeviceChannel, decode: Decode, settings: Settings) -> None:
        device = settings.engine_device
        keys, queries = (on_device(each, device)[:, :, None] for each in (decode.keys, decode.queries))
        self._expected = on_device(decode.block_ids, device)[:, :, None]
        self._ids = torch.zeros_like(self._expected)
        self._channel = channel
        now = columns(settings)

        def call(layer: int) -> None:
            channel.append_and_select(
                layer, **now, keys=keys[layer], queries=queries[layer], rollback=True, out=self._ids[layer]
            )

        def run() -> None:
            for layer in range(settings.layers):
                call(layer)

        self.one_call, self.graph = capture(partial(call, 0)), capture(run)

    def check(self) -> None:
        """Every answer of one more replay is that of a plain selection."""
        self._ids.fill_(-2)
        self.graph.replay()
        torch.cuda.synchronize()
        self._channel.check()
        if not torch.equal(self._ids, self._expected):
            raise AssertionError("block ids differ from a plain selection's")


def kernels_alone(spec: IndexSpec, settings: Settings) -> dict[str, float]:
    """The same kernels in one graph of this process."""
    rows, history = settings.sequences, settings.tokens
    blocks = history // spec.block_size + 1
    backend = choose_backend("cuda", spec, rows * blocks)
    tables = torch.arange(rows * blocks, dtype=torch.int32, device="cuda").view(rows, blocks)
    starts = torch.full((rows,), history, dtype=torch.int32, device="cuda")
    keys = torch.randn(rows, spec.head_dim, device="cuda").bfloat16()
    queries = torch.randn(rows, spec.num_index_heads, spec.head_dim, device="cuda").bfloat16()
    per_layer = []
    for layer in range(spec.num_layers):
        layers = torch.full((rows,), layer, dtype=torch.int32, device="cuda")
        host = torch.stack((layers, starts, torch.ones_like(starts))).cpu().numpy()
        per_layer.append(Spans(layers, starts, torch.ones_like(starts), tables, host))

    def run() -> None:
        for spans in per_layer:
            backend.append(keys, spans)
            backend.decode(queries, spans, order="ascending", return_scores=False)

    return summary(capture(run), settings)


def stages_us(client: Client, run: Callable[[], None]) -> dict[str, float]:
    """Mean microseconds that the core's requests spend in each stage while something runs."""
    before = client.stats().phases["decode"]
    run()
    after = client.stats().phases["decode"]
    count = max(after.requests - before.requests, 1)
    return {name: 1e6 * (after.stage_seconds[name] - before.stage_seconds[name]) / count for name in _STAGES}


def cpu_seconds(process: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle(step: Step, settings: Settings) -> dict[str, float]:
    """What a channel costs that nobody uses, and how long the first call takes then."""
    time.sleep(1)
    before = cpu_seconds(settings.core)
    time.sleep(settings.idle_seconds)
    used = (cpu_seconds(settings.core) - before) / settings.idle_seconds
    return {"idle_percent": 100 * used, "first_call_ms": milliseconds(step.one_call)}


def main() -> None:
    """Prints the numbers; where the engine has a GPU of its own, of the channel alone."""
    settings = Settings.of_command_line()
    torch.cuda.set_device(settings.engine_device)
    with Client(settings.grpc, transport="ring", tenant=TENANT, timeout=20) as client:
        spec = client.info().spec
        decode = Decode.read(Path(settings.folder) / f"{FIRST_ID}.bin", spec, settings.sequences)
        channel = client.device_channel(device=settings.engine_device, max_tokens=settings.sequences)
        step = Step(channel, decode, settings)
        step.check()
        numbers: dict[str, object] = {}

        def run() -> None:
            numbers["channel"] = summary(step.graph, settings)

        numbers["stages_us"] = stages_us(client, run)
        step.check()
        if torch.device(settings.engine_device).index == 0:
            numbers |= idle(step, settings)
            step.check()
            channel.close()
            numbers["closed"] = summary(step.graph, settings)
            numbers["alone"] = kernels_alone(spec, settings)
        channel.close()
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
