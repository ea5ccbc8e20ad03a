"""The arguments of `blockdex loadtest`."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from blockdex.client.command_line import EndpointError, add_endpoint_flags, endpoint_of
from blockdex.flags import FlagParser
from blockdex.loadtest.comparison import read_result
from blockdex.loadtest.settings import SCENARIOS, Settings, Target
from blockdex.loadtest.slo import Objective
from blockdex.loadtest.sweep import Sweep

_MOST_CLIENTS = 4096
_TINY = 1e-6
_EPILOG = """
exit status: 0 done; 1 a wrong answer, no call that succeeded, or a server that does not answer, be it for --outage
seconds; 2 refused; 3 a missed objective; 4 no checked answer left a block out, so none was tested; 130 interrupted:
Ctrl-C ends the run early, with a report of what was measured. Of several, the first of 1, 130, 3, 4."""


class RefusedError(Exception):
    """Arguments that cannot be: one line that says why."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a load test is told, checked.

    Attributes:
        settings: what shapes the load.
        target: where it goes.
        objectives: what the result is held against.
        outage: most seconds without an answer.
        old: the result of an earlier run, to be compared with.
        sweep: the run is made once for each of its values; None where it is made once.
        output: the result is written to this path with `.json` and `.html` behind it.
    """

    settings: Settings
    target: Target
    objectives: tuple[Objective, ...]
    outage: float
    old: dict[str, Any] | None
    sweep: Sweep | None
    output: Path


def parse(words: Sequence[str]) -> Arguments:
    """The arguments that the words behind `blockdex loadtest` say.

    Raises:
        RefusedError: one of them is unknown or out of bounds.
        ObjectiveError: an objective cannot be read.
        ComparisonError: the earlier result cannot be read.
        SweepError: the values to sweep over cannot be read.
    """
    options = _parser().parse_args(words)
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    sweep = None if options.sweep is None else Sweep.parse(options.sweep)
    if sweep is not None and options.compare is not None:
        raise RefusedError("--compare: a sweep cannot be compared, only one run")
    for point in (settings,) if sweep is None else sweep.over(settings):
        _check(point)
    try:
        endpoint = endpoint_of(options)
    except EndpointError as error:
        raise RefusedError(str(error)) from error
    if not os.access(options.output.parent, os.W_OK):
        raise RefusedError(f"--output: {options.output.parent} is not a folder that can be written to")
    return Arguments(
        settings=settings,
        target=Target(endpoint, options.http_address, options.tenant),
        objectives=tuple(map(Objective.parse, options.slo)),
        outage=options.outage,
        old=None if options.compare is None else read_result(options.compare),
        sweep=sweep,
        output=options.output,
    )


def _check(settings: Settings) -> None:
    if not 1 <= settings.clients <= _MOST_CLIENTS:
        raise RefusedError(f"--clients must be 1 to {_MOST_CLIENTS}, got {settings.clients}")
    if settings.processes > settings.clients:
        raise RefusedError(f"--processes must be at most --clients, got {settings.processes} and {settings.clients}")
    if settings.scenario == "mixed" and settings.clients < 2:
        raise RefusedError("--clients must be at least 2 for mixed, got 1")


class _Parser(FlagParser):
    def error(self, message: str) -> NoReturn:
        raise RefusedError(message)


def _parser() -> argparse.ArgumentParser:
    scenarios = "\n".join(f"  {name:<14} {what}" for name, what in SCENARIOS.items())
    parser = _Parser(
        prog="blockdex loadtest",
        description="Load on a server through the Python client: its answers checked, its latency told.",
        epilog=f"scenarios:\n{scenarios}\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_target(parser.add_argument_group("where"))
    _add_load(parser.add_argument_group("load"))
    _add_shapes(parser.add_argument_group("shapes"))
    _add_outcome(parser.add_argument_group("outcome"))
    return parser


def _add_target(group: Any) -> None:
    http_address = os.environ.get("BLOCKDEX_HTTP_ADDRESS", "")
    add_endpoint_flags(group)
    account = "its HTTP, for its own account of the run; https://HOST:PORT with TLS"
    _add(group, "--http-address", http_address, str, "HOST:PORT", account)
    _add(group, "--tenant", "loadtest", str, "NAME", "whose sequences they are, so that nobody else's are touched")
    group.add_argument(
        "--transport", default="stream", choices=("stream", "unary"), help="of the clients; default: stream"
    )


def _add_load(group: Any) -> None:
    group.add_argument("--scenario", required=True, choices=SCENARIOS, help="what the clients do, see below")
    _add(group, "--clients", 8, _number(int), "N", "each has a connection, its own sequences and one call in flight")
    _add(group, "--processes", 1, _number(int, 1), "N", "that share the clients")
    open_loop = "calls a second, however slow the server; without it a client calls again once it is answered"
    _add(group, "--rate", None, _number(float, _TINY), "R", open_loop)
    group.add_argument(
        "--spacing", default="poisson", choices=("poisson", "fixed"), help="of the calls of --rate; default: poisson"
    )
    _add(group, "--warm-up", 3.0, _number(float, 0), "SECONDS", "before measuring")
    _add(group, "--duration", 30.0, _number(float, _TINY), "SECONDS", "of measuring")
    _add(group, "--timeout", 30.0, _number(float, _TINY), "SECONDS", "of a call")
    _add(group, "--seed", 0, _number(int, 0), "N", "of everything that is drawn")


def _add_shapes(group: Any) -> None:
    _add(group, "--layers", None, _number(int, 0), "N", "that a step goes to; 0 for all of the server's; default: 4")
    scaling = "most that published token counts are multiplied by; less where the server has less room"
    _add(group, "--scale", 1.0, _number(float, _TINY), "F", scaling)
    _add(group, "--draft-tokens", 0, _number(int, 0), "N", "that a decode appends beside the one that is certain")
    _add(group, "--chunk", 2048, _number(int, 1), "TOKENS", "most of a prefill's call")


def _add_outcome(group: Any) -> None:
    share = _number(float, 0, 1)
    _add(group, "--check-share", 0.01, share, "SHARE", "of the answers to hold against the reference; 0 for none")
    _add(group, "--ceiling", 2.0, _number(float, 0), "SECONDS", "for measuring the load test's own; 0 for not at all")
    group.add_argument(
        "--slo",
        default=[],
        action="append",
        metavar="TEXT",
        help="'p99<20ms', 'decode.p50<5ms', 'errors<0.1%%', 'rate>100/s'; may be given several times",
    )
    outage = "most for which nothing may be answered, though clients wait"
    _add(group, "--outage", 2.0, _number(float, 0), "SECONDS", outage)
    sweep = "one run for each of clients=1,2,4,8 or rate=100,200: PATH.csv and a page that sets them beside each other"
    _add(group, "--sweep", None, str, "TEXT", sweep)
    _add(group, "--compare", None, Path, "FILE", "the JSON of an earlier run")
    _add(group, "--output", Path("loadtest"), Path, "PATH", "writes PATH.json and PATH.html")


def _add(group: Any, flag: str, default: object, kind: Callable[[str], object], metavar: str, description: str) -> None:
    words = description if default in {None, ""} else f"{description}; default: {default}"
    group.add_argument(flag, default=default, type=kind, metavar=metavar, help=words)


def _number(kind: type[int] | type[float], least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not (math.isfinite(value) and least <= value <= most):
            bound = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    return read
