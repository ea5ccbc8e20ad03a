"""An engine beside its server: a call, and a step of all layers, over each way to the server, in one run.

    python -m benchmarks.colocated --device cuda --mps [--rows channel,prefill]

Starts `blockdex serve` with a socket, fills sequences, and asks for one more token of each, layer by layer. A row is
measured by a process of its own, which is ended after so many seconds; what it has told is written at once. With --mps
all rows run under MPS, which is started and ended here, and then those again without it for which that makes a
difference. On a CPU the rows of the ring run. Every answer is checked.

Shows a table, and writes `colocated-<device>.json` and a plot beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.colocated.report import plot, table
from benchmarks.colocated.rows import ROWS
from benchmarks.colocated.run import run
from benchmarks.environment import RESULTS, environment, slug

_WIDTH = 150  # Of a log.


def _some_rows(words: str) -> list[str]:
    chosen = words.split(",")
    if unknown := sorted(set(chosen) - set(ROWS)):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(ROWS)}, got {unknown[0]!r}")
    return [name for name in ROWS if name in chosen]


def facts(device: str) -> dict[str, Any]:
    """Where and with what this is measured. A GPU is not to be looked at by this process: MPS is not there yet."""
    packages = ("blockdex", "grpcio", "protobuf", "numpy", "torch")
    if not device.startswith("cuda"):
        return environment(*packages)
    import torch  # noqa: PLC0415 - an engine on a CPU has no use for it

    return environment(*packages, "triton", device=torch.device(device), apart=True)


_ASKED = {
    "device": "cpu",
    "layers": 57,
    "sequences": 8,
    "tokens": 8192,
    "steps": 40,
    "clients": 16,
    "fleet_layers": 2,
    "prompt": 84_480,
    "queries": 16_384,
    "idle_seconds": 10.0,
}
"""What can be set of `Settings`, and what it is if nothing is said."""


def parsed(words: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in _ASKED.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--cache-bytes", default="24GiB")
    parser.add_argument("--rows", type=_some_rows, default=list(ROWS), help=f"some of {','.join(ROWS)}")
    parser.add_argument("--mps", action="store_true", help="start and end MPS")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and plot")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measures, shows and writes."""
    arguments = parsed(words)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    result = facts(arguments.device) | {name: getattr(arguments, name) for name in (*_ASKED, "cache_bytes", "mps")}
    result |= {"rows": [], "parts": {}, "failed": {}}
    device = result["machine"]["gpu"]["name"] if "gpu" in result["machine"] else "cpu"
    path = arguments.output / f"colocated-{slug(device)}.json"
    try:
        run(arguments, result, path, console)
    finally:
        console.print(table(result))
        plot(result, path.with_suffix(".png"))
        console.print(f"written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
