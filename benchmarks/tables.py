"""Writes the measured part of docs/performance.md out of benchmarks/results, so that no figure there is typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT

PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "plots"
BEGIN, END = "<!-- made by benchmarks/tables.py out of benchmarks/results -->\n", "<!-- end -->\n"

Rows = list[dict[str, Any]]


def client_section(rows: Rows) -> Iterator[str]:
    """What benchmarks/client.py measured."""
    yield "## A call, beside a bare echo\n"
    yield "One AppendAndSelect in one layer, one new token of every sequence, by the Python client, and in the same run"
    yield "a bare gRPC echo of as many bytes each way. Milliseconds; the last column is p50 / (echo p50 + kernels).\n"
    yield "| sequences | tokens of each | transport | p50 | p99 | echo p50 | echo p99 | kernels | over the bare |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        names = ("p50_ms", "p99_ms", "echo_p50_ms", "echo_p99_ms", "kernel_ms", "over_echo_and_kernel")
        yield _row(row["sequences"], f"{row['tokens']:,}", row["transport"], *(f"{row[name]:.2f}" for name in names))


def cpu_kernels_section(rows: Rows) -> Iterator[str]:
    """What benchmarks/cpu_kernels.py measured."""
    yield "## The CPU kernels, beside a bare product\n"
    yield "A selection, and in the same run `matmul` + `amax` + `topk` over the same shapes: once over fp32 keys in one"
    yield "piece, once with bf16 keys to be upcast first. Medians in milliseconds; a ratio above 1 is faster.\n"
    yield "| sequences | queries of each | tokens of each | cache | ours | bare | ratio | bare, from bf16 | ratio |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        names = ("ours_ms", "bare_ms", "ratio", "bare_from_bf16_ms", "ratio_from_bf16")
        figures = (f"{row[name]:.2f}" for name in names)
        yield _row(row["sequences"], row["queries"], f"{row['tokens']:,}", row["key_dtype"], *figures)


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


SECTIONS: dict[str, Callable[[Rows], Iterator[str]]] = {
    "client": client_section,
    "cpu_kernels": cpu_kernels_section,
}


def measured() -> str:
    """The measured part of the page: a section for each result there is."""
    sections = [_section(name) for name in SECTIONS if (RESULTS / f"{name}.json").exists()]
    return "\n".join(sections or ["No result is committed yet.\n"])


def _section(name: str) -> str:
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    lines = list(SECTIONS[name](result["rows"]))
    if (RESULTS / f"{name}.png").exists():
        lines.append(f"\n![The same as a plot](plots/{name}.png)")
    machine = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    lines.append(
        f"\n`{result['command']}` on {machine['cpu']}, {machine['cores']} cores, {machine['system']}; {versions}; "
        f"commit `{result['commit']}`, {result['date']}. File: `benchmarks/results/{name}.json`."
    )
    return "\n".join(lines) + "\n"


def with_results(page: str) -> str:
    """The page with its measured part as the results are now."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{measured()}\n{END}{after}"


def link_plots() -> None:
    """Has the site find the plots, which stay where they are."""
    PLOTS.mkdir(exist_ok=True)
    for name in SECTIONS:
        link = PLOTS / f"{name}.png"
        if (RESULTS / link.name).exists() and not link.is_symlink():
            link.symlink_to(Path("..") / ".." / (RESULTS / link.name).relative_to(ROOT))


if __name__ == "__main__":
    link_plots()
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
