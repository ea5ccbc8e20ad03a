"""Block selection on the CPU beside a bare `matmul` + `amax` + `topk` over the same shapes, in one run.

The bare version has it easy: its keys lie in one piece, in fp32, of one layer, and it masks nothing. Ours finds bf16 or
fp8 pages scattered over a cache twice as large, of several layers, and answers to the letter of the selection's rules.
`bare` is the product as one writes it, queries times keys; `best order` the faster of that and keys times queries;
`from bf16` is `bare` with keys that have to be upcast first.

One round calls every version twice and times the second call, so that none pays for the memory that another one took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.environment import RESULTS, environment
from blockdex_kernels import IndexSpec
from blockdex_kernels.cpu import CpuBackend
from blockdex_kernels.interface import Spans
from blockdex_kernels.spec import KeyDtype

HEADS, LAYERS = 4, 4
TARGET = 0.6
_SECONDS_PER_CASE = 1.0


@dataclass(frozen=True)
class Case:
    """Sequences of equal length and the queries at the end of each."""

    sequences: int
    queries: int
    tokens: int
    key_dtype: KeyDtype = "bf16"

    def __str__(self) -> str:
        return f"{self.sequences} x {self.queries} at {self.tokens:,} {self.key_dtype}"


@dataclass(frozen=True)
class Row:
    """Medians of one case in milliseconds."""

    sequences: int
    queries: int
    tokens: int
    key_dtype: str
    rounds: int
    ours_ms: float
    bare_ms: float
    best_order_ms: float
    from_bf16_ms: float

    def ratios(self) -> dict[str, float]:
        """Our speed as a part of that of each bare version."""
        return {
            "bare": self.bare_ms / self.ours_ms,
            "best_order": self.best_order_ms / self.ours_ms,
            "from_bf16": self.from_bf16_ms / self.ours_ms,
        }


CASES = (
    *(Case(1, queries, tokens) for tokens in (8192, 65536, 131072) for queries in (1, 8)),
    Case(8, 1, 8192),
    Case(8, 1, 32768),
    Case(64, 1, 4096),
    Case(64, 1, 8192),
    Case(1, 512, 8192),
    Case(1, 512, 32768),
    Case(1, 1, 131072, "fp8_e4m3"),
    Case(8, 1, 8192, "fp8_e4m3"),
    Case(1, 512, 8192, "fp8_e4m3"),
)


def versions(case: Case) -> dict[str, Callable[[], object]]:
    """Ours and the bare ones, over the same random keys and queries."""
    generator = torch.Generator().manual_seed(0)
    spec = IndexSpec(num_layers=LAYERS, key_dtype=case.key_dtype, max_sequence_tokens=case.tokens)
    pages = case.sequences * spec.max_blocks
    backend = CpuBackend(spec, 2 * pages, reason="measured")
    keys = torch.randn(case.sequences, case.tokens, spec.head_dim, generator=generator).bfloat16()
    queries = torch.randn(case.sequences, case.queries, HEADS, spec.head_dim, generator=generator).bfloat16()
    page_table = torch.randperm(2 * pages, generator=generator)[:pages].view(case.sequences, -1).int()
    layers = torch.arange(case.sequences, dtype=torch.int32) % LAYERS
    every = torch.full_like(layers, case.tokens)
    last = torch.full_like(layers, case.queries)
    backend.append(keys.flatten(0, 1), Spans(layers, torch.zeros_like(layers), every, page_table))
    spans = Spans(layers, every - last, last, page_table)
    packed = queries.flatten(0, 1)
    phase = backend.decode if case.queries <= 16 else backend.prefill

    rows, wide_keys = queries.flatten(1, 2).float(), keys.float()

    def queries_by_keys(keys: torch.Tensor) -> object:
        scores = torch.matmul(rows, keys.mT)
        return scores.view(*scores.shape[:2], -1, spec.block_size).amax(dim=3).topk(spec.topk)

    def keys_by_queries(keys: torch.Tensor) -> object:
        scores = torch.matmul(keys, rows.mT)
        return scores.view(len(scores), -1, spec.block_size, scores.shape[2]).amax(dim=2).mT.topk(spec.topk)

    return {
        "ours": lambda: phase(packed, spans, order="ascending", return_scores=False),
        "queries by keys": lambda: queries_by_keys(wide_keys),
        "keys by queries": lambda: keys_by_queries(wide_keys),
        "queries by bf16 keys": lambda: queries_by_keys(keys.float()),
    }


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def medians(
    calls: dict[str, Callable[[], object]], least_rounds: int, least_seconds: float
) -> tuple[dict[str, float], int]:
    """Median milliseconds of each version, and the rounds that were run."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    rounds = 0
    while rounds < least_rounds or time.perf_counter() - began < least_seconds:
        for name, call in calls.items():
            call()
            seconds[name].append(timed(call))
        rounds += 1
    return {name: statistics.median(samples) * 1e3 for name, samples in seconds.items()}, rounds


def measure(case: Case, least_rounds: int) -> Row:
    """All versions of a case."""
    median, rounds = medians(versions(case), least_rounds, _SECONDS_PER_CASE)
    return Row(
        **asdict(case),
        rounds=rounds,
        ours_ms=median["ours"],
        bare_ms=median["queries by keys"],
        best_order_ms=min(median["queries by keys"], median["keys by queries"]),
        from_bf16_ms=median["queries by bf16 keys"],
    )


def show(rows: list[Row]) -> None:
    """The table on the screen."""
    table = Table(title="Block selection, 4 heads (ms, medians); in brackets our speed as a part of the bare version's")
    for heading in ("sequences", "queries", "tokens", "cache", "rounds", "ours", "bare", "best order", "from bf16"):
        table.add_column(heading, justify="right")
    for row in rows:
        parts = row.ratios()
        bare = zip((row.bare_ms, row.best_order_ms, row.from_bf16_ms), parts.values(), strict=True)
        table.add_row(
            *(str(field) for field in (row.sequences, row.queries, f"{row.tokens:,}", row.key_dtype, row.rounds)),
            f"{row.ours_ms:.3f}",
            *(f"{time_ms:.3f} ({part:.2f})" for time_ms, part in bare),
        )
    Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="rounds of each case, at least")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_kernels.json", help="file to write")
    arguments = parser.parse_args()
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(CASES))
        for case in CASES:
            progress.update(task, description=str(case))
            rows.append(measure(case, arguments.rounds))
            progress.advance(task)
    show(rows)
    facts = environment("numpy", "torch") | {"torch_threads": torch.get_num_threads(), "target_ratio": TARGET}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {**facts, "rows": [asdict(row) | {"ratios": row.ratios()} for row in rows]}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
