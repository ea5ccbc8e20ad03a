"""What the demo prints."""

from __future__ import annotations

from math import log2

import numpy as np
from rich.console import Console
from rich.table import Table

from examples.transformers_engine.compare import flip_tolerance
from examples.transformers_engine.demo import Outcome
from examples.transformers_engine.requests import DRAFTS, Request


def print_report(outcome: Outcome, console: Console) -> None:
    """Prints the requests with their tokens, and what was counted over the run."""
    console.print(_requests(outcome))
    console.print(_figures(outcome))


def _requests(outcome: Outcome) -> Table:
    table = Table("request", "prompt", "new tokens", "equal")
    for number, request in enumerate(outcome.requests, start=1):
        expected, generated = outcome.expected[request.sequence], outcome.generated[request.sequence]
        equal = sum(ours == own for ours, own in zip(generated, expected, strict=True))
        table.add_row(_story(number, request), f"{len(request.prompt):,}", str(len(generated)), str(equal))
    return table


def _story(number: int, request: Request) -> str:
    if request.parent is not None:
        return f"{number}: forked from 1 at token {request.shared:,}"
    return f"{number}: {len(DRAFTS)} drafts rolled back" if request.drafted else f"{number}"


def _figures(outcome: Outcome) -> Table:
    tally, info = outcome.tally, outcome.info
    table = Table(show_header=False)
    table.add_row("selections compared", f"{tally.selections:,}")
    table.add_row("equal", f"{tally.selections - tally.flips:,}")
    table.add_row("flips within the bound", f"{tally.flips:,}")
    table.add_row("the bound, times |query| and |key|", f"2^{log2(flip_tolerance(info)):g}")
    table.add_row("new tokens after a flip", f"{sum(sum(outcome.excused(request)) for request in outcome.requests):,}")
    table.add_row("calls", f"{sum(map(len, tally.call_seconds.values())):,}")
    for phase, seconds in tally.call_seconds.items():
        median, slow = 1000 * np.percentile(seconds, [50, 99])
        table.add_row(f"{phase} call, p50 and p99", f"{median:.1f} ms, {slow:.1f} ms")
    table.add_row("pages used", f"{outcome.pages:,} of {info.cache.pages_total:,}, {info.cache.pages_shared:,} shared")
    table.add_row("server", f"{info.version} on {info.device}")
    for phase, (kernel, reason) in info.kernels.items():
        table.add_row(f"{phase} kernel", f"{kernel} ({reason})")
    return table
