"""A program that measures how much memory the CPU kernels take beside their arguments; prints JSON, bytes by case.

It is a process of its own, to be run with `MALLOC_MMAP_THRESHOLD_=65536`, so that what is freed leaves the process and
does not hide what the next case takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from blockdex_kernels.cpu import CpuBackend
from blockdex_kernels.interface import Backend
from blockdex_kernels.spec import IndexSpec
from support.kernel_cases import spans_of

LONGEST = 1_048_576


def resident(field: str) -> int:
    """Bytes of this process in memory: `VmRSS` now, `VmHWM` at most since the peak was reset."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def growth(call: Callable[[], Any]) -> int:
    """How much more the process held during a call than before it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def filled(tokens: int, **fields: Any) -> CpuBackend:
    """A cache of one layer that one sequence fills, its pages written."""
    spec = IndexSpec(**({"num_layers": 1, "head_dim": 16, "max_sequence_tokens": tokens} | fields))
    backend = CpuBackend(spec, spec.max_blocks, reason="measured")
    backend.pages.view(torch.uint8).fill_(0x3C)
    return backend


def select(backend: Backend, num_queries: int) -> Callable[[], Any]:
    """Selects for the last queries of the sequence."""
    spec = backend.spec
    queries = torch.ones(num_queries, spec.num_index_heads, spec.head_dim)
    start = spec.max_sequence_tokens - num_queries
    spans = spans_of([0], [start], [num_queries], torch.arange(spec.max_blocks)[None])
    return lambda: backend.prefill(queries, spans, order="score", return_scores=True)


def select_many(backend: Backend, num_runs: int) -> Callable[[], Any]:
    """Selects one query each for many runs over the same pages, of lengths up to 4,096."""
    queries = torch.ones(num_runs, backend.spec.num_index_heads, backend.spec.head_dim)
    starts = [row % 4096 for row in range(num_runs)]
    table = torch.arange(32, dtype=torch.int32).expand(num_runs, -1)
    spans = spans_of([0] * num_runs, starts, [1] * num_runs, table)
    return lambda: backend.decode(queries, spans, order="score", return_scores=True)


def append(backend: Backend) -> Callable[[], Any]:
    """Appends the whole sequence in one call."""
    spec = backend.spec
    keys = torch.ones(spec.max_sequence_tokens, spec.head_dim, dtype=torch.bfloat16)
    spans = spans_of([0], [0], [len(keys)], torch.arange(spec.max_blocks)[None])
    return lambda: backend.append(keys, spans)


def main() -> None:
    """Measures every case, the answers included."""
    pages = 2**31 // IndexSpec().bytes_per_page
    cases = {"an empty cache of 2 GiB": growth(lambda: CpuBackend(IndexSpec(), pages, reason="measured"))}
    variants: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
        ("bf16", LONGEST, 200, {}),
        ("fp8, no local block", LONGEST, 12, {"key_dtype": "fp8_e4m3", "local_blocks": 0}),
        ("bf16, 128 elements, no local block", 16_384, 600, {"head_dim": 128, "local_blocks": 0}),
        ("fp8, 128 elements", 16_384, 600, {"head_dim": 128, "key_dtype": "fp8_e4m3"}),
    )
    for name, tokens, num_queries, fields in variants:
        backend = filled(tokens, **fields)
        cases[f"{name}: append of {tokens} tokens"] = growth(append(backend))
        cases[f"{name}: 1 query at {tokens} tokens"] = growth(select(backend, 1))
        cases[f"{name}: {num_queries} queries at {tokens} tokens"] = growth(select(backend, num_queries))
        cases[f"{name}: 3000 runs"] = growth(select_many(backend, 3000))
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
