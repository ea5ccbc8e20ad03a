"""The indexer's kernels on one device beside its roofline and a peer, in one run and under one protocol.

Runs the published shapes over caches of random keys, bf16 and fp8, and the peer over the same keys in bf16:

    python -m benchmarks.kernels --device cuda --peer vllm=UNPACKED_WHEEL

A replay is a CUDA graph of many calls, each with queries and pages of its own, so that together they touch several
times what the L2 cache holds; a call's time is the replay's divided by its calls, and the median is told. Versions take
turns, replay by replay. Parts that `--eager` names (by default those whose launches are planned on the host, prefill
and scoring) are timed as calls back to back instead, with the host's work wherever the device waits for it, for all
versions alike. Before a shape is timed, a sample of the answers is held against the reference, and every row of ours is
compared with the peer's.

Shows a table and writes `kernels-<device>.json` after every part; a run that is cut off keeps what it has. At the end
it draws a plot beside the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import kernel_figures, kernel_plots
from benchmarks.environment import RESULTS, environment, slug
from benchmarks.gpu_timing import Mode
from benchmarks.kernel_bench import Bench
from benchmarks.kernel_figures import PEER, Row
from benchmarks.kernel_inputs import LAYERS
from benchmarks.kernel_shapes import FULL, HEADS, QUICK
from benchmarks.kernel_versions import Blockdex, Version
from benchmarks.peers import Vllm
from blockdex_kernels.spec import KEY_DTYPE_BYTES

PARTS = ("roofline", "prefill", "scoring", "topk", "decode")
STAGES = {"scoring", "topk"}
EAGER = ["prefill", "scoring"]
"""What plans its launch on the host, with the spans before it, and is not captured in a graph."""
_WIDTH = 120  # Of a log.


def run(arguments: argparse.Namespace, console: Console) -> Path:
    """Measures part after part.

    Returns:
        The file with the result, which is written after every part.
    """
    device = torch.device(arguments.device)
    result: Row = environment("numpy", "torch", "triton", device=device)
    name = slug(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    path: Path = arguments.output / f"{'quick-' if arguments.quick else ''}kernels-{name}.json"
    workload = QUICK if arguments.quick else FULL
    ours = {cache: Blockdex(arguments.device, cache, workload.pages) for cache in arguments.caches}
    in_stages = all(version.has_stages for version in ours.values())
    parts = [part for part in PARTS if part in arguments.parts and (in_stages or part not in STAGES)]
    result |= {"kernels": {cache: version.backend.kernels for cache, version in ours.items()}, "peer": None}
    versions: dict[str, Version] = {**ours}
    if arguments.peer is not None:
        versions[PEER] = vllm = Vllm(arguments.peer, device, workload.pages)
        result["peer"] = f"vLLM {vllm.version}, Triton kernels, bf16"
    modes = {part: _mode(part, device, arguments.eager) for part in parts}
    result |= {"timing": modes, "replays": arguments.replays, "rotated_bytes": workload.rotated_bytes}
    result |= {"heads": HEADS, "layers": LAYERS, "pages": workload.pages, "rows": []}
    bench = Bench(workload, versions, device, modes, arguments.replays)
    bench.tune()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for part in parts:
            shapes = workload.decode if part == "decode" else workload.prefill
            if part == "roofline":
                result[part] = bench.roofline()
            else:
                result[part] = [getattr(bench, part)(shape) for shape in progress.track(shapes, description=part)]
            if not arguments.quick:
                result["rows"] = kernel_figures.figures(result)
            write(result, path)
            console.print(_told(part, result))
    return path


def write(result: Row, path: Path) -> None:
    """Writes a result as far as it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _mode(part: str, device: torch.device, eager: list[str]) -> Mode:
    if device.type == "cpu":
        return "host"
    return "eager" if part in eager else "graph"


def figures_table(result: Row) -> Table:
    """What all shapes come down to, beside the targets."""
    table = Table(box=box.SIMPLE_HEAD, title=f"peer: {result['peer']}")
    for heading in ("figure", "measured", "target", "part of it", "made of"):
        table.add_column(heading, justify="left" if heading in {"figure", "made of"} else "right")
    for row in result["rows"]:
        table.add_row(*kernel_figures.cells(row))
    return table


def _told(part: str, result: Row) -> str | Table:
    """A part as it is shown."""
    return _roofline_line(result[part]) if part == "roofline" else _shapes_table(part, result)


def _roofline_line(roof: Row) -> str:
    fp8 = f", fp8 {roof['fp8'] / 1e12:,.0f}" if roof["fp8"] else ""
    return (
        f"roofline: copy {roof['copy'] / 1e12:.2f} TB/s, read {roof['read'] / 1e12:.2f} ({roof['read_by']}), "
        f"product of {roof['product']} cubed: bf16 {roof['bf16'] / 1e12:,.0f} TFLOP/s{fp8}"
    )


def _shapes_table(part: str, result: Row) -> Table:
    """Microseconds of every version, then what ours mean beside the peer or the chip."""
    rows = result[part]
    ours = kernel_figures.ours(rows[0])
    meaning = kernel_figures.MEANINGS[part]
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{part}, us (medians of {result['replays']} replays, {result['timing'][part]})"
    )
    for heading in ("shape", "calls", *rows[0]["us"], meaning, "flips", "apart"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['sequences']} x {row['queries']:,} at {row['tokens']:,}",
            str(row["calls"]),
            *(f"{us:,.1f}" for us in row["us"].values()),
            "  ".join(kernel_figures.meaning(part, row, cache, result) for cache in ours),
            "  ".join(map(str, row.get("flips", {}).values())),
            str(row.get("rows_apart", "")),
        )
    return table


def _peer(words: str) -> Path:
    name, _, directory = words.partition("=")
    if name != PEER or not directory:
        raise argparse.ArgumentTypeError(f"must be {PEER}=DIRECTORY, got {words!r}")
    return Path(directory)


def _some_of(names: tuple[str, ...], words: str) -> list[str]:
    chosen = words.split(",") if words else []
    if unknown := sorted(set(chosen) - set(names)):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(names)}, got {unknown[0]!r}")
    return chosen


def main(words: list[str] | None = None) -> None:
    """Command line."""
    some_parts, some_caches = partial(_some_of, PARTS), partial(_some_of, tuple(KEY_DTYPE_BYTES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu, or a CUDA device as torch writes it")
    parser.add_argument("--peer", type=_peer, metavar="vllm=DIR", help="an unpacked vLLM wheel to run beside ours")
    parser.add_argument("--parts", type=some_parts, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--eager", type=some_parts, default=EAGER, help="parts timed without a CUDA graph")
    parser.add_argument("--caches", type=some_caches, default=list(KEY_DTYPE_BYTES), help="dtypes of our caches")
    parser.add_argument("--quick", action="store_true", help="few small shapes, to see that all runs; no figures")
    parser.add_argument("--replays", type=int, default=25, help="of each version and shape")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the plot")
    arguments = parser.parse_args(words)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    path = run(arguments, console)
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["rows"]:
        console.print(figures_table(result))
    kernel_plots.plot(result, path.with_suffix(".png"))
    console.print(f"written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
