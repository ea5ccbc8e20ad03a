"""How many of the blocks that a bf16 cache selects an fp8_e4m3 cache selects too, on keys of several structures.

The CPU kernels score every block three times: bf16, fp8 `upcast` (keys rounded) and fp8 `native` (keys and queries
rounded, sums exact to 2^-16). Tensor cores sum less exactly, so `native, rough sums` adds to every native score noise
spread evenly within the worst that was measured on one, 2^-9.5 |query| max |key|. The queries are those of the last
block, which is forced, so 15 of 16 places are open.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.environment import RESULTS, environment
from benchmarks.structured_keys import HEADS, QUERIES, STRUCTURES
from blockdex_kernels import IndexSpec
from blockdex_kernels.dispatch import choose_backend
from blockdex_kernels.interface import Fp8Scoring, Spans
from blockdex_kernels.spec import KeyDtype

TOKENS = (8_192, 32_768, 131_072)
SEQUENCES = 2
TOPK = IndexSpec().topk
OPEN_PLACES = TOPK - IndexSpec().local_blocks
BEST = 4
ROUGHNESS = 2.0**-9.5
"""Worst error of a sum on an H200's tensor cores, as a part of |query| max |key|; see docs/kernels.md."""

_COLOURS = {"upcast": "#8a94a0", "native": "#3d7ea6", "native, rough sums": "#e0a458"}
_BAR_WIDTH = 0.27


@dataclass(frozen=True)
class Row:
    """One structure, length and way of scoring; shares are of blocks that bf16 selects.

    Attributes:
        selections: how many were compared.
        kept, kept_least: share of the open places, on average and in the worst selection.
        kept_with_local, kept_with_local_least: the same of all places, the forced block among them.
        kept_of_best: share of the best four open places, on average.
        unchanged: share of selections with the same blocks.
        lost, lost_most: bf16 score that a place loses on average, as a part of that between the best and the last block
            that bf16 selects for an open place; in the mean and in the worst selection.
    """

    structure: str
    tokens: int
    scoring: str
    selections: int
    kept: float
    kept_least: float
    kept_with_local: float
    kept_with_local_least: float
    kept_of_best: float
    unchanged: float
    lost: float
    lost_most: float


def block_scores(
    keys: torch.Tensor, queries: torch.Tensor, key_dtype: KeyDtype, fp8_scoring: Fp8Scoring = "native"
) -> torch.Tensor:
    """fp32 `[T, H, B - 1]`: what a cache of whole blocks scores for the last queries, without the forced last block."""
    blocks = len(keys) // IndexSpec().block_size
    spec = IndexSpec(num_layers=1, topk=blocks, scale=1.0, key_dtype=key_dtype, max_sequence_tokens=len(keys))
    backend = choose_backend("cpu", spec, blocks, fp8_scoring=fp8_scoring)
    layer, every, last = (torch.tensor([number], dtype=torch.int32) for number in (0, len(keys), len(queries)))
    page_table = torch.arange(blocks, dtype=torch.int32)[None]
    backend.append(keys, Spans(layer, layer, every, page_table))
    selection = backend.prefill(
        queries, Spans(layer, every - last, last, page_table), order="ascending", return_scores=True
    )
    assert selection.scores is not None
    return selection.scores[..., :-1]


def best(scores: torch.Tensor) -> torch.Tensor:
    """int64 `[T, H, 15]`: the blocks for the open places, equal scores by rising id."""
    return scores.sort(dim=2, descending=True, stable=True).indices[..., :OPEN_PLACES]


def compare(exact: torch.Tensor, rounded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two scorings of the same blocks, float `[T, H, B]`.

    Returns:
        bool `[T, H, 15]`, for each of the exact scores' best whether it is among the rounded scores' best; and float
        `[T, H]`, the exact score that a place loses on average, as a part of that between the first and last of these.
    """
    theirs, ours = best(exact), best(rounded)
    kept = (theirs[..., :, None] == ours[..., None, :]).any(dim=3)
    top, chosen = exact.gather(2, theirs), exact.gather(2, ours)
    return kept, (top.mean(dim=2) - chosen.mean(dim=2)) / (top[..., 0] - top[..., -1])


def scorings(keys: torch.Tensor, queries: torch.Tensor, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The ways to score an fp8 cache, with their `block_scores`."""
    yield "upcast", block_scores(keys, queries, "fp8_e4m3", "upcast")
    native = block_scores(keys, queries, "fp8_e4m3")
    yield "native", native
    bound = ROUGHNESS * queries.float().norm(dim=2, keepdim=True) * keys.float().norm(dim=1).max()
    noise = 2 * torch.rand(native.shape, generator=torch.Generator().manual_seed(seed)) - 1
    yield "native, rough sums", native + bound * noise


def measure(structure: str, tokens: int, sequences: int) -> list[Row]:
    """A row for each way of scoring."""
    compared: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for sequence in range(sequences):
        keys, queries = STRUCTURES[structure].make(tokens, sequence)
        exact = block_scores(keys, queries, "bf16")
        for scoring, rounded in scorings(keys, queries, sequence):
            compared.setdefault(scoring, []).append(compare(exact, rounded))
    return [
        _row(structure, tokens, scoring, *map(torch.cat, zip(*pairs, strict=True)))
        for scoring, pairs in compared.items()
    ]


def _row(structure: str, tokens: int, scoring: str, kept: torch.Tensor, lost: torch.Tensor) -> Row:
    forced = TOPK - OPEN_PLACES
    blocks = kept.sum(dim=2).double()
    return Row(
        structure,
        tokens,
        scoring,
        selections=blocks.numel(),
        kept=float(blocks.mean()) / OPEN_PLACES,
        kept_least=float(blocks.min()) / OPEN_PLACES,
        kept_with_local=(float(blocks.mean()) + forced) / TOPK,
        kept_with_local_least=(float(blocks.min()) + forced) / TOPK,
        kept_of_best=float(kept[..., :BEST].double().mean()),
        unchanged=float(kept.all(dim=2).double().mean()),
        lost=float(lost.mean()),
        lost_most=float(lost.max()),
    )


def show(rows: list[Row]) -> None:
    """The table on the screen."""
    table = Table(title="bf16's blocks in an fp8_e4m3 cache, in brackets the worst selection")
    for heading in ("structure", "tokens", "scoring", "kept of 15", "of the best 4", "unchanged", "score lost"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            *(row.structure, f"{row.tokens:,}", row.scoring),
            f"{row.kept:.1%} ({row.kept_least:.0%})",
            f"{row.kept_of_best:.2%}",
            f"{row.unchanged:.0%}",
            f"{row.lost:.2%} ({row.lost_most:.1%})",
        )
    Console().print(table)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draws the share kept: bars for the mean, a mark for the worst selection."""
    import matplotlib  # noqa: PLC0415 - takes a second to load, and only the end needs it

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    structures = list(dict.fromkeys(row.structure for row in rows))
    figure, panels = pyplot.subplots(
        1, len(structures), figsize=(5 * len(structures), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, structure in zip(panels[0], structures, strict=True):
        _panel([row for row in rows if row.structure == structure], axes)
        axes.set_title(structure)
    panels[0, 0].set_ylabel("share of bf16's 15 open places kept")
    panels[0, 0].set_ylim(0, 1)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_COLOURS) + 1)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(rows: list[Row], axes: Any) -> None:
    lengths = sorted({row.tokens for row in rows})
    for number, (scoring, colour) in enumerate(_COLOURS.items()):
        group = [row for row in rows if row.scoring == scoring]
        places = [lengths.index(row.tokens) + (number - 1) * _BAR_WIDTH for row in group]
        axes.bar(places, [row.kept for row in group], _BAR_WIDTH, color=colour, label=scoring)
        worst = "worst selection" if number == len(_COLOURS) - 1 else None
        axes.plot(places, [row.kept_least for row in group], "k_", markersize=12, label=worst)
    axes.set_xticks(range(len(lengths)), [f"{tokens:,}" for tokens in lengths])
    axes.set_xlabel("tokens")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="lengths, multiples of 128 from 4,096 on")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="sequences of each length")
    parser.add_argument("--output", type=Path, default=RESULTS / "fp8_agreement.json", help="file to write")
    given = parser.parse_args(arguments)
    cases = [
        (name, tokens)
        for name, structure in STRUCTURES.items()
        for tokens in given.tokens
        if structure.longest is None or tokens <= structure.longest
    ]
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(cases))
        for structure, tokens in cases:
            progress.update(task, description=f"{structure}, {tokens:,} tokens")
            rows += measure(structure, tokens, given.sequences)
            progress.advance(task)
    show(rows)
    facts = environment("numpy", "torch", "transformers") | {
        "heads": HEADS,
        "queries": QUERIES,
        "sequences": given.sequences,
        "structures": {name: structure.about for name, structure in STRUCTURES.items()},
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    result = {**facts, "rows": [asdict(row) for row in rows]}
    given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    title = f"Blocks that an fp8_e4m3 cache keeps, CPU kernels (commit {facts['commit']})"
    plot(rows, title, given.output.with_suffix(".png"))
    print(f"written: {given.output}")


if __name__ == "__main__":
    main()
