"""The whole forward of vLLM's indexer layers with our kernels and with vLLM's own, on the same batches, on one GPU.

    python integrations/vllm/benchmarks/forward.py OUT.json

Needs vLLM 0.33 (its Python files are enough), this plugin, and this repository on the path. Both ways go through vLLM's
`MiniMaxM3Indexer`, its metadata builders and its forward context. Only how index keys come into the cache is ours, and
the model's configuration object. The most frequent batches are compared: rows that differ are held against float64.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from vllm.config import CacheConfig, DeviceConfig, SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.forward_context import set_forward_context
from vllm.models.minimax_m3.common import indexer
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from benchmarks.gpu_timing import time_calls
from benchmarks.kernel_shapes import Shape, decode_shapes, prefill_shapes
from blockdex_vllm import plugin
from blockdex_vllm.verification import Verifier

BLOCK, HEADS, DIM, TOPK = 128, 4, 128, 16
LAYERS = 8
"""Layers of one replay: what one leaves in the L2 cache, the next one's keys push out."""
DEVICE = torch.device("cuda")


class Side:
    """One of the two: layers over caches that both share, and their builder."""

    def __init__(self, name: str, select_impl: Callable[..., Any], config: VllmConfig, caches: torch.Tensor) -> None:
        self.config = config
        fp8 = caches.dtype == torch.float8_e4m3fn
        buffer = torch.zeros(16384, HEADS, TOPK, dtype=torch.int32, device=DEVICE)
        indexer.select_indexer_impl_cls = select_impl
        config.compilation_config.static_forward_context.clear()
        with set_current_vllm_config(config):
            self.layers = [
                indexer.MiniMaxM3Indexer(
                    num_kv_heads=HEADS,
                    scale=DIM**-0.5,
                    topk_blocks=TOPK,
                    sparse_block_size=BLOCK,
                    num_index_heads=HEADS,
                    index_head_dim=DIM,
                    prefix=f"model.layers.{layer}.{name}",
                    local_blocks=1,
                    indexer_kv_dtype="fp8" if fp8 else "bf16",
                    topk_indices_buffer=buffer,
                )
                for layer in range(LAYERS)
            ]
            names = [layer.index_cache.prefix for layer in self.layers]
            spec = MLAAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=DIM, dtype=caches.dtype)
            builder = self.layers[0].impl.indexer_backend_cls.get_builder_cls()
            self.builder = builder(spec, names, config, DEVICE)
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.index_cache.bind_kv_cache(cache[:, None])
        self.buffer = buffer

    def step(self, common: CommonAttentionMetadata, queries: torch.Tensor) -> Callable[[], None]:
        """Builds the metadata of a batch and returns the forwards of all layers."""
        metadata = self.builder.build(0, common)
        by_name = {layer.index_cache.prefix: metadata for layer in self.layers}

        def forward() -> None:
            with set_forward_context(by_name, self.config, num_tokens=len(queries)):
                for layer in self.layers:
                    layer(queries)

        forward.metadata = metadata  # type: ignore[attr-defined]
        return forward


def config_of(max_model_len: int) -> VllmConfig:
    """VLLM's configuration. The model's part stands in: a real one inspects the model's class in another process."""
    sparse = {
        "sparse_num_index_heads": HEADS,
        "sparse_index_dim": DIM,
        "sparse_block_size": BLOCK,
        "sparse_topk_blocks": TOPK,
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_score_type": "max",
        "sparse_attention_freq": [1] * LAYERS,
    }
    text = SimpleNamespace(sparse_attention_config=sparse, num_hidden_layers=LAYERS)
    scheduler = SchedulerConfig(
        max_num_batched_tokens=16384, max_num_seqs=256, max_model_len=max_model_len, is_encoder_decoder=False
    )
    config = VllmConfig(
        cache_config=CacheConfig(block_size=BLOCK), scheduler_config=scheduler, device_config=DeviceConfig("cuda")
    )
    config.model_config = SimpleNamespace(hf_config=text, hf_text_config=text, max_model_len=max_model_len)
    return config


def common_of(shape: Shape, num_pages: int, seed: int) -> CommonAttentionMetadata:
    """A batch of one call, its pages all over the cache."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(num_pages, generator=generator)
    width = -(-max(shape.lengths) // BLOCK)
    table = torch.zeros(len(shape.lengths), width, dtype=torch.int32)
    taken = 0
    for row, length in enumerate(shape.lengths):
        blocks = -(-length // BLOCK)
        table[row, :blocks] = pages[taken : taken + blocks]
        taken += blocks
    ends = torch.arange(len(shape.lengths) + 1, dtype=torch.int32) * shape.queries
    seq_lens = torch.tensor(shape.lengths, dtype=torch.int32)
    tokens = int(ends[-1])
    return CommonAttentionMetadata(
        query_start_loc=ends.to(DEVICE),
        query_start_loc_cpu=ends,
        seq_lens=seq_lens.to(DEVICE),
        num_reqs=len(shape.lengths),
        num_actual_tokens=tokens,
        max_query_len=shape.queries,
        max_seq_len=max(shape.lengths),
        block_table_tensor=table.to(DEVICE),
        slot_mapping=torch.full((tokens,), -1, dtype=torch.int64, device=DEVICE),
        seq_lens_cpu_upper_bound=seq_lens,
    )


def queries_of(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, HEADS * DIM, dtype=torch.bfloat16, device=DEVICE).to(dtype)


def check(sides: dict[str, Side], shape: Shape, num_pages: int, dtype: torch.dtype) -> dict[str, int]:
    """Runs ours beside vLLM's kernels over the first layer, and judges rows that differ."""
    common, queries = common_of(shape, num_pages, 1), queries_of(len(shape.lengths) * shape.queries, dtype)
    ours = sides["blockdex"]
    ours.step(common, queries)()
    vllm = sides["vllm"]
    vllm.step(common, queries)()
    tokens = len(queries)
    apart = (ours.buffer[:tokens].sort(2).values != vllm.buffer[:tokens].sort(2).values).any(2)
    verifier, impl = Verifier(1.0), ours.layers[-1].impl
    metadata = ours.builder.build(0, common)
    if tokens <= 512 and max(shape.lengths) <= 60_000:  # The judge's reference is slow.
        verifier.check(ours.buffer[:tokens], queries.view(-1, HEADS, DIM), impl._backend, metadata)
    return {"rows": tokens * HEADS, "rows_apart": int(apart.sum()), "wrong": verifier.wrong}


def timed(sides: dict[str, Side], shape: Shape, num_pages: int, dtype: torch.dtype) -> dict[str, Any]:
    """Microseconds of one layer's forward: graphs of a step replayed in turn."""
    common, queries = common_of(shape, num_pages, 2), queries_of(len(shape.lengths) * shape.queries, dtype)
    calls = {name: [side.step(common, queries)] for name, side in sides.items()}
    times = time_calls(calls, "graph", 12 if shape.queries > 5000 else 20)
    return {name: round(timing.median_us / LAYERS, 2) for name, timing in times.items()}


def host_us(sides: dict[str, Side], shape: Shape, num_pages: int, dtype: torch.dtype) -> dict[str, float]:
    """Processor time of one layer's eager forward, nothing waited for: medians of turns, small batches."""
    common, queries = common_of(shape, num_pages, 3), queries_of(len(shape.lengths) * shape.queries, dtype)
    steps = {name: side.step(common, queries) for name, side in sides.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(60):
        for name, step in steps.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            if turn >= 10:
                samples[name].append((time.perf_counter() - began) * 1e6 / LAYERS)
    for name, step in steps.items():  # What it goes into, for people.
        with cProfile.Profile() as profile:
            step()
        torch.cuda.synchronize()
        print(f"host of {name}", flush=True)
        pstats.Stats(profile).sort_stats("tottime").print_stats(8)
    return {name: round(statistics.median(values), 1) for name, values in samples.items()}


def replayed(side: Side, num_pages: int, dtype: torch.dtype) -> str:
    """A decode captured for 64 requests, replayed for 64 and for 3 of them with other numbers: equal to eager."""
    lengths = tuple(3000 + 37 * number for number in range(64))
    shape = Shape(1, 3000, 1, lengths)
    common, queries = common_of(shape, num_pages, 4), queries_of(64, dtype)
    common.max_seq_len = 16384
    common.block_table_tensor = torch.nn.functional.pad(common.block_table_tensor, (0, 128))[:, :128].contiguous()
    step = side.step(common, queries)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for live, grown in ((64, 500), (3, 1200)):
        common.seq_lens[:] = 0
        common.seq_lens[:live] = torch.tensor(lengths[:live], device=DEVICE, dtype=torch.int32) + grown
        ends = torch.arange(65, dtype=torch.int32).clamp(max=live)
        common.query_start_loc.copy_(ends)
        common.query_start_loc_cpu = ends
        common._num_computed_tokens_cache = None
        common.block_table_tensor.copy_(common.block_table_tensor.roll(1, 0))
        metadata = side.builder.build(0, common)
        side.buffer.fill_(-9)
        graph.replay()
        answers = side.buffer[:64].clone()
        side.buffer.fill_(-9)
        by_name = {layer.index_cache.prefix: metadata for layer in side.layers}
        with set_forward_context(by_name, side.config, num_tokens=64):
            side.layers[-1](queries)
        if not torch.equal(answers, side.buffer[:64]) or not (answers[live:] == -1).all():
            return f"wrong for {live} of 64"
    return "equal to eager for 64 and for 3 of 64 requests"


def weighted(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    total = sum(row["weight"] for row in rows)
    means = {name: sum(row["weight"] * row["us"][name] for row in rows) / total for name in ("blockdex", "vllm")}
    return {name: round(mean, 1) for name, mean in means.items()} | {
        "times": round(means["vllm"] / means["blockdex"], 3)
    }


def main(out: Path, budget_s: float) -> None:
    """Measures what fits into the time, the most often asked for first, and writes after every part."""
    began = time.monotonic()
    torch.manual_seed(0)
    config = config_of(262144)
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cuda"))):
        parallel_state.init_distributed_environment(1, 0, f"file:///tmp/meeting-{time.time_ns()}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1, backend="gloo")
    theirs = indexer.select_indexer_impl_cls
    plugin.register()
    ours = indexer.select_indexer_impl_cls
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "vllm": "0.33.0"},
        "layers_a_replay": LAYERS,
        "parts": {},
    }
    plan = [
        ("prefill", torch.bfloat16, prefill_shapes()),
        ("prefill fp8", torch.float8_e4m3fn, prefill_shapes()),
        ("decode 1 query", torch.bfloat16, decode_shapes(1)),
        ("decode 1 query fp8", torch.float8_e4m3fn, decode_shapes(1)),
    ]
    for name, dtype, shapes in plan:
        num_pages = max(shape.blocks for shape in shapes)
        caches = torch.empty(LAYERS, num_pages, BLOCK, DIM, dtype=dtype, device=DEVICE)
        for cache in caches:
            for part in cache.split(20_000):
                part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device=DEVICE).to(dtype))
        sides = {key: Side(key, choose, config, caches) for key, choose in (("vllm", theirs), ("blockdex", ours))}
        kinds = {key: type(side.layers[0].impl).__name__ for key, side in sides.items()}
        rows: list[dict[str, Any]] = []
        part_of: dict[str, Any] = {"impls": kinds, "shapes": rows}
        result["parts"][name] = part_of
        small = min(shapes, key=lambda shape: shape.blocks)
        part_of["host_us"] = host_us(sides, small, num_pages, dtype)
        if "decode" in name:
            part_of["graph"] = replayed(sides["blockdex"], num_pages, dtype)
        for shape in sorted(shapes, key=lambda shape: -shape.weight):
            if time.monotonic() - began > budget_s:
                part_of["left_out"] = len(shapes) - len(rows)
                break
            row: dict[str, Any] = {"sequences": len(shape.lengths), "queries": shape.queries, "tokens": shape.tokens}
            row |= {"weight": shape.weight, "us": timed(sides, shape, num_pages, dtype)}
            if len(rows) < 6:
                row |= check(sides, shape, num_pages, dtype)
            rows.append(row)
        part_of["weighted"] = weighted(rows) if rows else None
        print(name, part_of["weighted"], part_of["host_us"], part_of.get("graph"), f"{time.monotonic() - began:.0f} s")
        out.write_text(json.dumps(result, indent=1) + "\n")
        del caches, sides
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 600.0)
