"""Puts so many inputs through every door, as `cd tests && python -m fuzz [--each 100000] [--seed 1] [--json FILE]`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.environment import environment
from blockdex.contract.errors import Code
from fuzz import guided, live, ring, wire

_WIRE_SECONDS = 60


def main() -> int:
    """Runs them; 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=100_000, help="inputs of every door")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600.0, help="longest that the live server is asked")
    parser.add_argument(
        "--admission-seconds", type=int, default=480, help="that the core is asked under coverage guidance"
    )
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="blockdex-fuzz-") as folder:
        count = wire.fuzz(Path(folder), _WIRE_SECONDS, options.seed)
        reached = wire.lines_reached(Path(folder))
        admitted, reached_edges, edges = guided.fuzz(Path(folder), options.admission_seconds, options.seed)
    slots = ring.run(options.each, options.seed)
    report = live.run(options.each, options.seed, options.seconds)
    doors = {name: {"inputs": door.inputs, "outcomes": dict(door.outcomes)} for name, door in report.doors.items()}
    result = {
        "environment": environment("blockdex", "grpcio"),
        "seed": options.seed,
        "inputs": count + admitted + slots.written + sum(door.inputs for door in report.doors.values()),
        "doors": {
            "wire": {"inputs": count, "lines_reached_percent": reached},
            "admission": {"inputs": admitted, "edges_reached": reached_edges, "edges": edges},
            "ring": {
                "inputs": slots.written,
                "links_broken": slots.broken,
                "outcomes": {Code(code).name if code else "OK": count for code, count in slots.outcomes.items()},
                "answers_explained_beside": slots.compared,
            },
            **doors,
        },
        "private_bytes_after_a_fifth_and_at_the_end": report.memory,
        "answers_checked_beside": report.answers,
        "wrong": report.wrong,
        "seconds": round(time.monotonic() - began),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
