"""The plot of a result of the kernel benchmark; `python -m benchmarks.kernel_plots FILE` draws it again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.kernel_figures import PEER, Row, floor_us, ours
from benchmarks.kernel_shapes import DECODE_QUERIES

Panel = Callable[[Any], None]

_COLOURS = {"bf16": "#3d7ea6", "fp8_e4m3": "#e0a458", PEER: "#8a94a0"}
_BAR_WIDTH = 0.27
_FLOOR_REACH = 0.4
_HEADROOM = 1.35  # Above the bars, for the legend.


def plot(result: Row, path: Path) -> None:
    """Draws what was measured: decodes beside floor and peer, prefills beside the peer, scoring beside the roofline."""
    import matplotlib  # noqa: PLC0415 - takes a second to load, and only the end needs it

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    panels = _panels(result)
    if not panels:
        return
    figure, grid = pyplot.subplots(
        -(-len(panels) // 2),
        min(len(panels), 2),
        figsize=(17, 5.5 * -(-len(panels) // 2)),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend()
    machine = result["machine"]
    device = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
    figure.suptitle(f"Block selection on one {device}, {result['heads']} heads (commit {result['commit']})")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panels(result: Row) -> list[Panel]:
    decodes = {
        queries: [row for row in result.get("decode", []) if row["queries"] == queries] for queries in DECODE_QUERIES
    }
    panels: list[Panel] = [partial(_decode, rows, queries, result) for queries, rows in decodes.items() if rows]
    if rows := result.get("prefill", []):
        panels.append(partial(_prefill, rows, result))
    if rows := result.get("scoring", []):
        panels.append(partial(_scoring, rows, result))
    return panels


def _decode(rows: list[Row], queries: int, result: Row, axes: Any) -> None:
    places = range(len(rows))
    for version in rows[0]["us"]:
        times = [row["us"][version] for row in rows]
        axes.plot(places, times, "o", color=_COLOURS[version], label=_name(version, result), markersize=5)
    if "roofline" in result:
        for cache in ours(rows[0]):
            floors = [floor_us(row, cache, result) for row in rows]
            edges = ([place + side for place in places] for side in (-_FLOOR_REACH, _FLOOR_REACH))
            axes.hlines(floors, *edges, color=_COLOURS[cache], label=f"floor, {cache}: its keys read once")
    axes.set_yscale("log")
    axes.set_xticks(places, [f"{row['sequences']} x {row['tokens'] // 1000}k" for row in rows], rotation=90)
    axes.set_xlabel("sequences x mean tokens")
    axes.set_ylabel("us a call")
    axes.set_title(f"Decode, {queries} quer{'y' if queries == 1 else 'ies'} of each sequence")


def _prefill(rows: list[Row], result: Row, axes: Any) -> None:
    rows = sorted(rows, key=lambda row: max(row["us"].values()))
    _bars(rows, {version: [row["us"][version] for row in rows] for version in rows[0]["us"]}, result, axes)
    axes.set_yscale("log")
    axes.set_ylabel("us a call")
    axes.set_title("Prefill, scoring and top-k")


def _scoring(rows: list[Row], result: Row, axes: Any) -> None:
    rows = sorted(rows, key=lambda row: row["operations"])
    _bars(rows, {version: [row["tflops"][version] for row in rows] for version in rows[0]["us"]}, result, axes)
    for cache, rate in (("bf16", "bf16"), ("fp8_e4m3", "fp8")):
        if result.get("roofline", {}).get(rate):
            label = f"{rate} product, {result['roofline']['product']} cubed"
            axes.axhline(result["roofline"][rate] / 1e12, color=_COLOURS[cache], linestyle="--", label=label)
    axes.set_ylim(top=axes.get_ylim()[1] * _HEADROOM)
    axes.set_ylabel("useful TFLOP/s")
    axes.set_title("Scoring alone")


def _bars(rows: list[Row], heights: dict[str, list[float]], result: Row, axes: Any) -> None:
    """A group for each shape, a bar for each version."""
    for number, (version, values) in enumerate(heights.items()):
        places = [place + (number - (len(heights) - 1) / 2) * _BAR_WIDTH for place in range(len(rows))]
        axes.bar(places, values, _BAR_WIDTH, color=_COLOURS[version], label=_name(version, result))
    axes.set_xticks(range(len(rows)), [f"{row['queries']:,} at {row['tokens']:,}" for row in rows], rotation=90)
    axes.set_xlabel("queries at tokens")


def _name(version: str, result: Row) -> str:
    return str(result["peer"]) if version == PEER else f"blockdex, {version}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        plot(json.loads(Path(name).read_text(encoding="utf-8")), Path(name).with_suffix(".png"))
