"""A server of several processes beside one of one, and idle ones.

Servers are asked in turn, one call each, so that whatever else the machine does strikes all alike. Writes JSON to
`benchmarks/results`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.client import Fleet, percentile, process, timed
from benchmarks.environment import RESULTS, environment
from blockdex import Client

SEQUENCES, TOKENS = 8, 1024
SMALL = ("--num-layers=1", "--cache-bytes=64MiB", "--grpc-address=127.0.0.1:0", "--http-address=127.0.0.1:0")
SERVERS = {
    "single": ("--processes=single",),
    "split, sleeps at once": ("--processes=split", "--spin-seconds=0"),
    "split, spins 0.1 ms": ("--processes=split", "--spin-seconds=0.0001"),
}
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Row:
    """Milliseconds of an AppendAndSelect by one server; the ratio is to the server of one process, round by round."""

    server: str
    transport: str
    p50_ms: float
    p99_ms: float
    ratio_to_single: float


@contextlib.contextmanager
def servers() -> Iterator[dict[str, tuple[str, str]]]:
    """All kinds of servers; each one's gRPC and HTTP address, by name."""
    flags = (*SMALL, "--log-format=json")
    ready = r'"grpc": "([^"]+)".*"http": "([^"]+)"'
    with contextlib.ExitStack() as stack:
        yield {
            name: (match[1], match[2])
            for name, more in SERVERS.items()
            for match in [
                stack.enter_context(process(sys.executable, "-m", "blockdex", "serve", *flags, *more, ready=ready))
            ]
        }


def calls(addresses: dict[str, tuple[str, str]], rounds: int) -> list[Row]:
    """AppendAndSelect of a few sequences by every server, unary and over a stream, in turn."""
    samples: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        steps: dict[tuple[str, str], Callable[[], object]] = {}
        for transport in ("unary", "stream"):
            for name, (grpc_address, _) in addresses.items():
                client = stack.enter_context(Client(grpc_address, transport=transport))
                fleet = Fleet(client, SEQUENCES, TOKENS, first_id=1 if transport == "unary" else 1001)
                steps[name, transport] = partial(fleet.step, client)
                samples[name, transport] = []
        for number in track(range(rounds + rounds // 10), "calls"):
            for key, step in steps.items():
                milliseconds = timed(step)
                if number >= rounds // 10:
                    samples[key].append(milliseconds)
    return [
        Row(
            server=name,
            transport=transport,
            p50_ms=statistics.median(taken),
            p99_ms=percentile(taken, 99),
            ratio_to_single=statistics.median(
                own / single for own, single in zip(taken, samples["single", transport], strict=True)
            ),
        )
        for (name, transport), taken in samples.items()
    ]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and the children that run."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS + sum(cpu_seconds(int(child)) for child in children)


def idle_share(seconds: float, *flags: str) -> float:
    """Share of a core that a server takes to which nobody talks."""
    with subprocess.Popen(
        [sys.executable, "-m", "blockdex", "serve", *SMALL, *flags],
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stderr is not None
        if " serving " not in server.stderr.readline():
            raise RuntimeError("the server did not start")
        time.sleep(2)
        before = cpu_seconds(server.pid)
        time.sleep(seconds)
        share = (cpu_seconds(server.pid) - before) / seconds
        server.terminate()
    return share


def show(rows: list[Row], idle: dict[str, float]) -> None:
    """The table on the screen."""
    console = Console()
    table = Table("server", "", "p50 (ms)", "p99 (ms)", "to single", title=f"AppendAndSelect, {SEQUENCES} x {TOKENS}")
    for row in rows:
        table.add_row(row.server, row.transport, f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}", f"{row.ratio_to_single:.2f}")
    console.print(table)
    console.print({name: f"{100 * share:.2f} % of a core when idle" for name, share in idle.items()})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="calls of each server and transport")
    parser.add_argument("--idle-seconds", type=float, default=20.0, help="how long idle servers are watched")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for ring.json")
    arguments = parser.parse_args()
    with servers() as addresses:
        rows = calls(addresses, arguments.rounds)
    idle = {
        name: idle_share(arguments.idle_seconds, *flags)
        for name, flags in SERVERS.items()
        if name != "split, sleeps at once"
    }
    show(rows, idle)
    result = {
        **environment("blockdex", "grpcio", "numpy", "torch"),
        "rounds": arguments.rounds,
        "rows": [asdict(row) for row in rows],
        "idle_share_of_a_core": idle,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "ring.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
