"""A served blockdex beside a bare gRPC echo, part by part, in one run.

    python -m benchmarks.service --device cuda

`step` drives a real engine on its own thread, without a server; all other parts ask one `blockdex serve` of several
processes. Its clients are the Python client, and, as load, processes of their own that send bytes made beforehand over
one stream each. Where several frontends share the port, a caller connects again until the frontend that it is meant
for has accepted it (`benchmarks.doors`): clients are spread evenly, and the client that decodes and the one that
prefills are at different ones. Targets are for one H200 with 16 cores; a CPU runs smaller shapes and has none.

Shows a table and writes `service-<device>.json` after every part, and at the end a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import service_plot
from benchmarks.environment import RESULTS, environment, slug
from benchmarks.figures import cells
from benchmarks.service_parts import Bench

PARTS = ("step", "calls", "clients", "decode", "prefill", "memory", "idle")
"""In the order in which they run: memory after what grows it, idle when nobody is connected any more."""
BESIDE_KERNELS = {"calls", "prefill"}
"""Parts that are compared with the kernels alone, which `step` measures."""
_WIDTH = 140  # Of a log.


def run(arguments: argparse.Namespace, console: Console) -> Path:
    """Measures part after part.

    Returns:
        The file with the result, which is written after every part.
    """
    result = facts(arguments.device)
    device = result["machine"]["gpu"]["name"] if "gpu" in result["machine"] else "cpu"
    path: Path = arguments.output / f"service-{slug(device)}.json"
    with Bench(arguments.device, arguments.seconds, arguments.idle_seconds) as bench:
        result |= {"seconds": arguments.seconds, "scale": asdict(bench.scale), "rows": [], "parts": {}}
        # Nothing draws while something is measured: a thread of this process would take turns with it.
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            task = progress.add_task("", total=len(arguments.rows))
            if "step" not in arguments.rows and BESIDE_KERNELS.intersection(arguments.rows):
                bench.step()
            for part in arguments.rows:
                progress.update(task, description=part, refresh=True)
                figures, numbers = getattr(bench, part)()
                result["kernels"] = bench.kernels
                result["parts"][part] = numbers
                result["rows"] += [figure.row() for figure in figures]
                write(result, path)
                progress.advance(task)
            progress.update(task, description="done", refresh=True)
    return path


def facts(device: str) -> dict[str, Any]:
    """Where and with what this is measured."""
    packages = ("blockdex", "grpcio", "protobuf", "numpy", "torch")
    if not device.startswith("cuda"):
        return environment(*packages)
    # The processes that call load this module too, and have no use for torch.
    import torch  # noqa: PLC0415

    return environment(*packages, "triton", device=torch.device(device))


def write(result: dict[str, Any], path: Path) -> None:
    """Writes a result as far as it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> Table:
    """All figures."""
    made = Table(box=box.SIMPLE_HEAD)
    for heading in ("figure", "measured", "target", "met", "made of"):
        made.add_column(heading, justify="right" if heading in {"measured", "target"} else "left")
    for row in result["rows"]:
        made.add_row(*cells(row))
    return made


def _some_parts(words: str) -> list[str]:
    chosen = words.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(PARTS)}, got {unknown[0]!r}")
    return [part for part in PARTS if part in chosen]


def main(words: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or a CUDA device as torch writes it")
    parser.add_argument("--rows", type=_some_parts, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=5.0, help="for which each kind of call is measured")
    parser.add_argument("--idle-seconds", type=float, default=10.0, help="for which the idle server is watched")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the plot")
    arguments = parser.parse_args(words)
    # As the server does, before torch is loaded: `step` runs its kernels here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    path = run(arguments, console)
    result = json.loads(path.read_text(encoding="utf-8"))
    console.print(table(result))
    service_plot.plot(result, path.with_suffix(".png"))
    console.print(f"written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
