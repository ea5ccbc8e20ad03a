"""Writes the measured part of docs/performance.md out of benchmarks/results, so that no figure there is typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import figures, kernel_figures
from benchmarks.environment import RESULTS, ROOT

PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "plots"
BEGIN, END = "<!-- made by benchmarks/tables.py out of benchmarks/results -->\n", "<!-- end -->\n"

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """How the results of one benchmark are told.

    Attributes:
        heading: of the section.
        about: what was measured, one paragraph.
        columns: of the table.
        cells: a row of the result as a row of the table.
    """

    heading: str
    about: str
    columns: tuple[str, ...]
    cells: Callable[[Row], Iterator[str]]


def _client_cells(row: Row) -> Iterator[str]:
    yield from (str(row["sequences"]), f"{row['tokens']:,}", row["transport"])
    for name in ("p50_ms", "p99_ms", "echo_p50_ms", "echo_p99_ms", "kernel_ms", "over_echo_and_kernel"):
        yield f"{row[name]:.2f}"


def _ring_cells(row: Row) -> Iterator[str]:
    yield from (row["server"], row["transport"])
    for name in ("p50_ms", "p99_ms", "ratio_to_single"):
        yield f"{row[name]:.2f}"


def _cpu_kernels_cells(row: Row) -> Iterator[str]:
    yield from (str(row["sequences"]), str(row["queries"]), f"{row['tokens']:,}", row["key_dtype"])
    yield f"{row['ours_ms']:.2f}"
    for version in ("bare", "best_order", "from_bf16"):
        yield f"{row[f'{version}_ms']:.2f} ({row['ratios'][version]:.2f})"


def _fp8_agreement_cells(row: Row) -> Iterator[str]:
    yield from (row["structure"], f"{row['tokens']:,}", row["scoring"])
    for share in ("kept", "kept_with_local"):
        yield f"{row[share]:.1%} ({row[f'{share}_least']:.0%})"
    yield f"{row['kept_of_best']:.2%}"
    yield f"{row['unchanged']:.0%}"
    yield f"{row['lost']:.2%} ({row['lost_most']:.1%})"


SECTIONS = {
    "kernels": Section(
        "The GPU kernels, beside the chip and a peer",
        "Means over the published shapes, each as often as production asked for it, 4 heads, and in the same run\n"
        "what the chip can do at best and the peer's Triton kernels over the same keys in bf16. Medians of calls that\n"
        "find nothing in the L2 cache, in CUDA graphs or, where the file says `eager`, back to back with the host's\n"
        "work; for the peer alike. Our keys lie in pages of several layers, the peer's in one piece.",
        ("figure", "measured", "target", "part of the target", "made of"),
        lambda row: iter(kernel_figures.cells(row)),
    ),
    "fp8_agreement": Section(
        "What an fp8 cache selects, beside bf16",
        "How many of the 16 blocks that a bf16 cache selects an fp8_e4m3 cache selects too, by the CPU kernels:\n"
        "`upcast` rounds keys only, `native` keys and queries, and `native, rough sums` adds noise within the worst\n"
        "error of a sum that was seen on a GPU's tensor cores, 2^-9.5 |query| max |key|. Queries are those of the\n"
        "last 128 tokens, 4 heads, in two sequences; in brackets the worst selection. One block is forced, so 15\n"
        "places are open. The score lost is bf16's, of a place on average, as a part of what lies between the best\n"
        "block and the last one selected. `isotropic`: independent normal numbers. `language-like`: passages on\n"
        "topics that come back, phrases and words in them, four channels 10 to 30 times as large as the others,\n"
        "rotary position embedding on half of the dimensions; each query is drawn to one key from anywhere before\n"
        "and a recent one. `random model`: what the indexer of the MiniMax-M3 code in transformers makes of this\n"
        "documentation, with random weights. No trained model's keys were there to try. The file says in full how\n"
        "they are made.",
        (
            *("keys", "tokens", "scoring", "kept of 15", "kept of 16", "of the best 4"),
            *("selections unchanged", "score lost"),
        ),
        _fp8_agreement_cells,
    ),
    "client": Section(
        "A call, beside a bare echo",
        "One AppendAndSelect in one layer, one new token of every sequence, by the Python client, and in the same run\n"
        "a bare gRPC echo of as many bytes each way. Milliseconds; the last column is p50 / (echo p50 + kernels).",
        ("sequences", "tokens of each", "transport", "p50", "p99", "echo p50", "echo p99", "kernels", "over the bare"),
        _client_cells,
    ),
    "service": Section(
        "A server of several processes, beside bare echoes",
        "One `blockdex serve` of several processes, asked by Python clients and, as load, by processes that send\n"
        "bytes made beforehand over one stream each; in the same run bare gRPC echoes of as many bytes each way, and\n"
        "the kernels alone, called from the host. A decode step is AppendAndSelect of one token of each sequence, 4\n"
        "heads, bf16. The step in the core is that of a real engine on its own thread without a server, the layers\n"
        "walked round. Targets are for one H200 with 16 cores; a CPU runs smaller shapes and has none.",
        ("figure", "measured", "target", "met", "made of"),
        lambda row: iter(figures.cells(row)),
    ),
    "colocated": Section(
        "An engine on the server's host, over each transport",
        "AppendAndSelect of one token of each of 8 sequences of 8,192 tokens by an engine beside its server, 4 heads,\n"
        "bf16, one layer a call: over each way to the server, by several clients at once, and prefills from shared\n"
        "memory. Every answer is checked. Without (MPS) a GPU that two processes use changes between them by time\n"
        "slices. Targets are for one H200 with 16 cores; a CPU has none.",
        ("figure", "measured", "target", "met", "made of"),
        lambda row: iter(figures.cells(row)),
    ),
    "ring": Section(
        "Several processes, beside one",
        "One AppendAndSelect of 8 sequences of 1,024 tokens in one layer, by servers of one process and of several,\n"
        "one call to each in turn. Milliseconds; the last column is the median of the ratios, round by round.",
        ("server", "transport", "p50", "p99", "to one process"),
        _ring_cells,
    ),
    "cpu_kernels": Section(
        "The CPU kernels, beside a bare product",
        "A selection, and in the same run `matmul` + `amax` + `topk` over the same shapes, keys in one fp32 piece:\n"
        "queries times keys, the faster of that and keys times queries, and the faster with bf16 keys to be upcast\n"
        "first. Medians in milliseconds, and in brackets our speed as a part of theirs.",
        (
            *("sequences", "queries of each", "tokens of each", "cache", "ours"),
            *("bare", "bare, best order", "bare, from bf16"),
        ),
        _cpu_kernels_cells,
    ),
}
"""By the name of the file, in which a machine may follow: `client.json`, `client-16-cores.json`."""


def results(name: str, ending: str = "json") -> list[Path]:
    """The files with the results of one benchmark."""
    return sorted([*RESULTS.glob(f"{name}.{ending}"), *RESULTS.glob(f"{name}-*.{ending}")])


def measured() -> str:
    """The measured part of the page: a section for each benchmark of which there is a result."""
    return "\n".join(_told(name) for name in SECTIONS if results(name)) or "No result is committed yet.\n"


def _told(name: str) -> str:
    section = SECTIONS[name]
    parts = [f"## {section.heading}\n\n{section.about}\n"]
    parts += [_table(section, path) for path in results(name)]
    return "\n".join(parts)


def _table(section: Section, path: Path) -> str:
    result = json.loads(path.read_text(encoding="utf-8"))
    machine = result["machine"]
    lines = [f"**{_device(machine)}**\n", _line(section.columns)]
    lines.append(_line("---" for _ in section.columns))
    lines += [_line(section.cells(row)) for row in result["rows"]]
    if path.with_suffix(".png").exists():
        lines.append(f"\n![The same as a plot](plots/{path.stem}.png)")
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    lines.append(
        f"\n`benchmarks/results/{path.name}`: `{result['command']}` at commit `{result['commit']}`, {result['date']}; "
        f"{machine['system']}; {versions}."
    )
    return "\n".join(lines) + "\n"


def _device(machine: Row) -> str:
    """What was measured: the GPU where there is one."""
    if gpu := machine.get("gpu"):
        return f"{gpu['name']}, driver {gpu['driver']}"
    return f"{machine['cpu']}, {machine['cores']} cores"


def _line(cells: Iterator[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def with_results(page: str) -> str:
    """The page with its measured part as the results are now."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{measured()}\n{END}{after}"


def link_plots() -> None:
    """Has the site find the plots, which stay where they are."""
    PLOTS.mkdir(exist_ok=True)
    for link in PLOTS.iterdir():
        link.unlink()
    for name in SECTIONS:
        for plot in results(name, "png"):
            (PLOTS / plot.name).symlink_to(Path("..") / ".." / plot.relative_to(ROOT))


if __name__ == "__main__":
    link_plots()
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
