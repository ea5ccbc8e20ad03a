"""What a run has measured, as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.figures import cells

Numbers = dict[str, Any]


def table(result: Numbers) -> Table:
    """All figures."""
    made = Table(box=box.SIMPLE_HEAD)
    for heading in ("figure", "measured", "target", "met", "made of"):
        made.add_column(heading, justify="right" if heading in {"measured", "target"} else "left")
    for row in result["rows"]:
        made.add_row(*cells(row))
    return made


def plot(result: Numbers, path: Path) -> None:
    """Medians of calls over each way, and their targets as marks; nothing where no calls were measured."""
    import matplotlib  # noqa: PLC0415 - takes a second to load, and only the end needs it

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    ending = ": a call, p50"
    rows = [row for row in result["rows"] if ending in row["name"]]
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
    bars = axes.barh(
        [row["name"].replace(ending, "") for row in rows], [row["measured"] for row in rows], color="#3d7ea6"
    )
    axes.bar_label(bars, fmt="%.0f", padding=3)
    for place, row in enumerate(rows):
        if row["target"] is not None:
            axes.plot(row["target"], place, "k|", markersize=16)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("us a call, p50; a mark is a target")
    axes.set_title(
        f"{result['sequences']} sequences at {result['tokens']:,} tokens (commit {result['commit']})", fontsize=10
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
