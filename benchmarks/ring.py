"""The ring between two processes: a bare round trip, a server of several processes beside one of one, and an idle one.

Round trips are of numbers between two Python processes that sleep at once, or look for a while before they sleep.
Servers are asked in turn, one call each, so that whatever else the machine does strikes all alike. Writes JSON to
`benchmarks/results`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
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
from blockdex.ring.handshake import new_link
from blockdex.ring.segment import Segment, Sizes
from support.ring import Bell, Consumer, Producer

SPINS = (0.0, 0.0001, 0.01)
SEQUENCES, TOKENS = 8, 1024
SMALL = ("--num-layers=1", "--cache-bytes=64MiB", "--grpc-address=127.0.0.1:0", "--http-address=127.0.0.1:0")
SERVERS = {
    "single": ("--processes=single",),
    "split, sleeps at once": ("--processes=split", "--spin-seconds=0"),
    "split, spins 0.1 ms": ("--processes=split", "--spin-seconds=0.0001"),
}
_WAKE_SECONDS = 20.0
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class RoundTrip:
    """Microseconds there and back, where both sides look so long before they sleep."""

    spin_seconds: float
    p50_us: float
    p99_us: float


@dataclass(frozen=True)
class Row:
    """Milliseconds of an AppendAndSelect by one server; the ratio is to the server of one process, round by round."""

    server: str
    transport: str
    p50_ms: float
    p99_ms: float
    ratio_to_single: float


class Side:
    """One side of a ring, which waits for the other."""

    def __init__(self, segment: Segment, bells: tuple[int, int], own: str, spin_seconds: float) -> None:
        """`own`: `engine` or `client`; `bells`: its ends of its own pair, and of the other's."""
        other, inward, outward = ("client", "request", "answer") if own == "engine" else ("engine", "answer", "request")
        self._counters = segment.counters
        self._bell = Bell(segment, f"{own}_sleeps", bells[0])
        self._consumer = Consumer(segment, inward)
        self._producer = Producer(segment, outward, Bell(segment, f"{other}_sleeps", bells[1]))
        self._spin_seconds = spin_seconds

    def send(self, number: int) -> None:
        """Sends a number."""
        self._counters[self._producer.claim() // 8] = number
        self._producer.publish()

    def receive(self) -> int:
        """Waits for a number."""
        until = time.perf_counter() + self._spin_seconds
        while not self._consumer.filled:
            if time.perf_counter() < until:
                continue
            self._bell.lie_down()
            if not self._consumer.filled and not select.select([self._bell.fd], [], [], _WAKE_SECONDS)[0]:
                raise TimeoutError("ring: the other side is silent")
            self._bell.silence()
            self._bell.get_up()
        number = self._counters[self._consumer.take() // 8]
        self._consumer.release()
        return number


def echo(fd: int, own: int, other: int, count: int, spin_seconds: float) -> None:
    """The other process: sends every number back."""
    side = Side(Segment(fd), (own, other), "engine", spin_seconds)
    for _ in range(count):
        side.send(side.receive())


def round_trips(count: int, spin_seconds: float) -> RoundTrip:
    """Sends numbers to another process and back, one at a time."""
    engine, client = new_link(Sizes(64, 4096, 4096), epoch=1)
    files = (engine.segment.fd, engine.engine_bell, engine.client_bell)
    command = [sys.executable, "-m", "benchmarks.ring", "--echo", *map(str, files), str(count), str(spin_seconds)]
    with subprocess.Popen(command, pass_fds=files) as other:
        side = Side(client.segment, (client.client_bell, client.engine_bell), "client", spin_seconds)
        seconds = []
        for number in range(count):
            began = time.perf_counter()
            side.send(number)
            if side.receive() != number:
                raise ValueError("ring: another number came back")
            seconds.append(time.perf_counter() - began)
        if other.wait(_WAKE_SECONDS):
            raise RuntimeError(f"the other side ended with {other.returncode}")
    engine.close()
    client.close()
    microseconds = [1e6 * each for each in seconds[count // 10 :]]
    return RoundTrip(spin_seconds, statistics.median(microseconds), percentile(microseconds, 99))


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


def show(trips: list[RoundTrip], rows: list[Row], idle: dict[str, float]) -> None:
    """The tables on the screen."""
    console = Console()
    table = Table("spin (ms)", "p50 (us)", "p99 (us)", title="round trip of a number between two processes")
    for trip in trips:
        table.add_row(f"{1e3 * trip.spin_seconds:g}", f"{trip.p50_us:.1f}", f"{trip.p99_us:.1f}")
    console.print(table)
    table = Table("server", "", "p50 (ms)", "p99 (ms)", "to single", title=f"AppendAndSelect, {SEQUENCES} x {TOKENS}")
    for row in rows:
        table.add_row(row.server, row.transport, f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}", f"{row.ratio_to_single:.2f}")
    console.print(table)
    console.print({name: f"{100 * share:.2f} % of a core when idle" for name, share in idle.items()})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trips", type=int, default=20_000, help="round trips of each kind")
    parser.add_argument("--rounds", type=int, default=300, help="calls of each server and transport")
    parser.add_argument("--idle-seconds", type=float, default=20.0, help="how long idle servers are watched")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for ring.json")
    parser.add_argument("--echo", nargs=5, metavar="NUMBER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        *files, count, spin = arguments.echo
        memory, own, other = map(int, files)
        echo(memory, own, other, int(count), float(spin))
        return
    trips = [round_trips(arguments.trips, spin) for spin in SPINS]
    with servers() as addresses:
        rows = calls(addresses, arguments.rounds)
    idle = {
        name: idle_share(arguments.idle_seconds, *flags)
        for name, flags in SERVERS.items()
        if name != "split, sleeps at once"
    }
    show(trips, rows, idle)
    result = {
        **environment("blockdex", "grpcio", "numpy", "torch"),
        "round_trips": [asdict(trip) for trip in trips],
        "rounds": arguments.rounds,
        "rows": [asdict(row) for row in rows],
        "idle_share_of_a_core": idle,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "ring.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
