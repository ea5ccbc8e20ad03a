"""The client of a cluster beside a single server's, in one run, and the balance of rendezvous hashing in numbers.

Starts one, two and four CPU servers. Each round makes one AppendAndSelect of one token of every sequence by `Client` on
the first server and one by `ClusterClient` over all of them; CPU time is this process's, all its threads. Servers share
the cores of this machine: wall clock over several says nothing where there are fewer cores. Balance needs no servers.
Writes JSON to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.client import process
from benchmarks.environment import RESULTS, environment
from blockdex import Client
from blockdex.cluster import ClusterClient, StaticDirectory
from blockdex.cluster.rendezvous import owners

MEMBERS = (1, 2, 4)
SIZES = (10, 100, 1000)
HEAD_DIM, HEADS = 128, 4
_FLAGS = ("--device", "cpu", "--num-layers", "1", "--cache-bytes", "64MiB")


@contextlib.contextmanager
def servers(count: int) -> Iterator[dict[str, str]]:
    """Their addresses by name."""
    with contextlib.ExitStack() as stack:
        command = (sys.executable, "-m", "blockdex", "serve", *_FLAGS, "--log-format", "json")
        ports = ("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0")
        found = [
            stack.enter_context(process(*command, *ports, ready=r'"event": "serving".*"grpc": "([^"]+)"'))
            for _ in range(count)
        ]
        yield {f"m{number}": match[1] for number, match in enumerate(found)}


def calls(sequences: int, rounds: int) -> Iterator[dict[str, object]]:
    """A row for each number of members."""
    ids = list(range(1, sequences + 1))
    lengths = [1] * sequences
    random = np.random.default_rng(0)
    keys = random.standard_normal((sequences, HEAD_DIM)).astype(np.float32)
    queries = random.standard_normal((sequences, HEADS, HEAD_DIM)).astype(np.float32)
    for count in MEMBERS:
        with (
            servers(count) as addresses,
            Client(addresses["m0"], tenant="one") as one,
            ClusterClient(StaticDirectory(addresses), tenant="all") as cluster,
        ):
            one.open_sequences(ids)
            cluster.open_sequences(ids)

            def took(client: Client | ClusterClient) -> tuple[float, float]:
                """Wall clock and CPU seconds of a call."""
                wall, cpu = time.perf_counter(), time.process_time()
                client.append_and_select(0, sequences=ids, lengths=lengths, keys=keys, queries=queries)
                return time.perf_counter() - wall, time.process_time() - cpu

            measured: dict[str, list[tuple[float, float]]] = {"client": [], "cluster": []}
            for round_ in range(rounds + 20):
                for name, client in (("client", one), ("cluster", cluster)):
                    seconds = took(client)
                    if round_ >= 20:
                        measured[name].append(seconds)
            row: dict[str, object] = {"members": count, "sequences": sequences}
            for name, values in measured.items():
                wall, cpu = zip(*values, strict=True)
                row[f"{name}_p50_us"] = statistics.median(wall) * 1e6
                row[f"{name}_cpu_us"] = statistics.median(cpu) * 1e6
            yield row


def balance(roots: int) -> Iterator[dict[str, object]]:
    """A row for each size of a cluster: shares, and what moves when a member joins."""
    numbers = np.arange(roots, dtype=np.uint64)
    for size in SIZES:
        names = [f"m{number}" for number in range(size + 1)]
        before = _owners(numbers, names[:-1])
        after = _owners(numbers, names)
        shares = np.bincount(before, minlength=size) * size / roots
        began = time.perf_counter()
        for root in range(200):
            owners("default", [root], names, [1.0] * len(names))
        yield {
            "members": size,
            "roots": roots,
            "least_share": float(shares.min()),
            "largest_share": float(shares.max()),
            "moved_times_n_plus_1": float((before != after).mean() * (size + 1)),
            "moved_elsewhere": int(np.count_nonzero(after[before != after] != size)),
            "one_root_us": (time.perf_counter() - began) / 200 * 1e6,
        }


def _owners(roots: np.ndarray, names: list[str]) -> np.ndarray:
    parts = [owners("default", part, names, [1.0] * len(names)) for part in np.array_split(roots, 100)]
    return np.concatenate(parts)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--roots", type=int, default=200_000)
    options = parser.parse_args()
    rows = [*calls(1, options.rounds), *calls(64, options.rounds)]
    result = {"environment": environment("grpcio", "numpy"), "calls": rows, "balance": list(balance(options.roots))}
    (RESULTS / "cluster.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for row in (*rows, *result["balance"]):
        print(row)


if __name__ == "__main__":
    main()
