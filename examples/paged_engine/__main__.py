"""`python -m examples.paged_engine`: an engine with block tables of its own on a pool, checked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

import blockdex
from blockdex_kernels.reference import SelectionMismatchError
from examples.paged_engine.demo import EXERCISED, Run, Transport, agrees, build, run_on_pool, run_own
from examples.transformers_engine.server import ServerError, server_of

TRANSPORTS: tuple[Transport, ...] = ("unary", "stream", "ring")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo. 0: all tokens are equal and nothing was left untried. 1: not so, or server or client failed."""
    parser = argparse.ArgumentParser(prog="python -m examples.paged_engine", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where model and server run")
    parser.add_argument("--transport", choices=TRANSPORTS, help="this one alone")
    options = parser.parse_args(arguments)
    transports = [options.transport] if options.transport else TRANSPORTS
    own = run_own(options.device)
    try:
        with server_of(build(options.device), ["--device", options.device]) as address:
            runs = {transport: run_on_pool(options.device, address, transport) for transport in transports}
    except (SelectionMismatchError, ServerError, blockdex.BlockdexError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    Console().print(_report({"own": own, **runs}))
    return 0 if agrees(own, list(runs.values())) else 1


def _report(runs: dict[str, Run]) -> Table:
    expected = runs["own"].tokens
    table = Table("", *runs)
    table.add_row("tokens generated", *(f"{sum(map(len, run.tokens)):,}" for run in runs.values()))
    equal = [sum(new == own for new, own in zip(run.tokens, expected, strict=True)) for run in runs.values()]
    table.add_row("requests with equal tokens", *(f"{number} of {len(expected)}" for number in equal))
    compared = ("selections compared", "selections that leave blocks out", "blocks exchanged by rounding")
    for name in ("steps", *EXERCISED, *compared):
        table.add_row(name, *(f"{run.counts[name]:,}" for run in runs.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
