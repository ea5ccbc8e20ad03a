"""How long a call of a device channel takes: one a layer, all of them in one CUDA graph, the engine in its own process.

    python -m benchmarks.device_channel [--replays 300]

Beside it: the same appends and decodes in this process, in one graph. Run it with and without MPS.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import ring_messages as ring
from benchmarks.core_process import CoreProcess, RingPeer, core_process
from blockdex.contract.messages import OpenSequences
from blockdex.device_channel.channel import DeviceChannel
from blockdex.device_channel.connection import Connection
from blockdex_kernels import IndexSpec
from blockdex_kernels.dispatch import choose_backend
from blockdex_kernels.interface import Spans

ROWS, HISTORY, FILL = 8, 8192, 16
TENANT = "figures"
IDLE_SECONDS = 3.0


def columns(start: int, length: int) -> dict[str, torch.Tensor]:
    """Sequences 1 to `ROWS` at one position."""
    return {
        "sequences": torch.arange(1, ROWS + 1, device="cuda"),
        "starts": torch.full((ROWS,), start, dtype=torch.int64, device="cuda"),
        "lengths": torch.full((ROWS,), length, dtype=torch.int64, device="cuda"),
    }


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of what was run once before."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph


def fill(channel: DeviceChannel, spec: IndexSpec) -> None:
    """Appends a history to every layer, a few tokens a replay."""
    keys = torch.randn(ROWS, FILL, spec.head_dim, device="cuda").bfloat16()
    now = columns(0, FILL)

    def run() -> None:
        for layer in range(spec.num_layers):
            channel.append_keys(layer, **now, keys=keys, rollback=True)

    graph = capture(run)
    for start in range(0, HISTORY, FILL):
        keys.normal_()
        now["starts"].fill_(start)
        graph.replay()
    torch.cuda.synchronize()
    channel.check()


def check_answers(peer: RingPeer, layer: int, queries: torch.Tensor, block_ids: torch.Tensor) -> None:
    """The ids are those that a ring answers, bit by bit."""
    numbers = np.stack((np.arange(1, ROWS + 1), np.full(ROWS, HISTORY), np.ones(ROWS, np.int64)))
    spans = ring.Spans(numbers[0].astype("u8"), numbers[1], numbers[2], np.zeros(ROWS, "u8"))
    data = queries.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    asked = ring.Queries(ring.TensorData("bf16", data), 0, queries.shape[-2], "ascending", False, False)
    answer = peer.ask(ring.TokenRequest(TENANT, 0, layer, spans, None, asked))
    assert isinstance(answer, ring.TokenAnswer) and answer.block_ids is not None
    assert np.array_equal(answer.block_ids, block_ids.cpu().numpy().reshape(answer.block_ids.shape)), "answers differ"


def tell_stages(address: str) -> None:
    """Where the core's time for decodes went, on average."""
    asking = Connection(address, TENANT, lambda: None)
    stages = asking.ask({"ask": "stats"})["stage_seconds"]["decode"]
    means = {name: 1e6 * stage["total"] / max(sum(stage["counts"]), 1) for name, stage in stages.items()}
    print("in the core:", ", ".join(f"{name} {mean:.1f} us" for name, mean in means.items()), flush=True)
    asking.close()


def timed(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    """Milliseconds of each replay, until the host sees its end."""
    took = []
    for _ in range(replays):
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        took.append(1e3 * (time.perf_counter() - began))
    return sorted(took)


def told(name: str, took: list[float], calls: int) -> float:
    """Prints the figures of a row; its median."""
    p50, p99 = took[len(took) // 2], took[int(0.99 * len(took))]
    print(f"{name:44} p50 {p50:8.3f} ms  p99 {p99:8.3f} ms  {1e3 * p50 / calls:7.2f} us a call", flush=True)
    return p50


def in_process(spec: IndexSpec, replays: int) -> float:
    """The same kernels in one graph of this process."""
    blocks = HISTORY // spec.block_size + 1
    backend = choose_backend("cuda", spec, ROWS * blocks)
    tables = torch.arange(ROWS * blocks, dtype=torch.int32, device="cuda").view(ROWS, blocks)
    starts = torch.full((ROWS,), HISTORY, dtype=torch.int32, device="cuda")
    keys = torch.randn(ROWS, spec.head_dim, device="cuda").bfloat16()
    queries = torch.randn(ROWS, spec.num_index_heads, spec.head_dim, device="cuda").bfloat16()
    per_layer = []
    for layer in range(spec.num_layers):
        layers = torch.full((ROWS,), layer, dtype=torch.int32, device="cuda")
        host = torch.stack((layers, starts, torch.ones_like(starts))).cpu().numpy()
        per_layer.append(Spans(layers, starts, torch.ones_like(starts), tables, host))

    def run() -> None:
        for spans in per_layer:
            backend.append(keys, spans)
            backend.decode(queries, spans, order="ascending", return_scores=False)

    return told("kernels in this process, one graph", timed(capture(run), replays), spec.num_layers)


def cpu_seconds(core: CoreProcess) -> float:
    """Processor time of the core so far."""
    fields = Path(f"/proc/{core.process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Runs all rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--replays", type=int, default=300)
    parser.add_argument("--layers", type=int, default=57)
    arguments = parser.parse_args()
    fields = {"num_layers": arguments.layers}
    spec = IndexSpec(**fields)
    began = time.perf_counter()
    with core_process(json.dumps(fields), pages=ROWS * (HISTORY // spec.block_size + 2)) as core:
        print(f"core is up after {time.perf_counter() - began:.1f} s", flush=True)
        peer = RingPeer(core.address)
        peer.ask(OpenSequences(TENANT, 0, tuple(range(1, ROWS + 1)), (0,) * ROWS))
        channel = DeviceChannel(core.address, TENANT, spec, core.epoch, max_tokens=ROWS * FILL, max_rows=ROWS)
        began = time.perf_counter()
        fill(channel, spec)
        calls = spec.num_layers * HISTORY // FILL
        print(f"filled: {1e6 * (time.perf_counter() - began) / calls:.1f} us an append of {FILL} tokens", flush=True)
        keys = torch.randn(ROWS, 1, spec.head_dim, device="cuda").bfloat16()
        queries = torch.randn(ROWS, 1, spec.num_index_heads, spec.head_dim, device="cuda").bfloat16()
        now = columns(HISTORY, 1)
        ids = torch.empty(ROWS, 1, spec.num_index_heads, spec.topk, dtype=torch.int32, device="cuda")

        def run() -> None:
            for layer in range(spec.num_layers):
                channel.append_and_select(layer, **now, keys=keys, queries=queries, rollback=True, out=ids)

        graph = capture(run)
        timed(graph, 20)
        over = told("device channel, one graph", timed(graph, arguments.replays), spec.num_layers)
        channel.check()
        check_answers(peer, spec.num_layers - 1, queries, ids)
        tell_stages(core.address)
        before = cpu_seconds(core)
        time.sleep(IDLE_SECONDS)
        used = (cpu_seconds(core) - before) / IDLE_SECONDS
        (first,) = timed(graph, 1)
        print(f"idle for {IDLE_SECONDS:g} s: {100 * used:.1f} % of a core; first step then {first:.3f} ms", flush=True)
        channel.check()
        channel.close()
        told("the same on a closed channel", timed(graph, arguments.replays), spec.num_layers)
        peer.close()
    inside = in_process(spec, arguments.replays)
    print(f"a call more than its kernels: {1e3 * (over - inside) / spec.num_layers:.2f} us", flush=True)


if __name__ == "__main__":
    main()
