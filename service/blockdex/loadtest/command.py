"""`blockdex loadtest`: arguments in, result files and an exit status out."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blockdex.contract.errors import BlockdexError
from blockdex.loadtest.arguments import Arguments, RefusedError, parse
from blockdex.loadtest.checking import reference_is_there
from blockdex.loadtest.comparison import ComparisonError, compare
from blockdex.loadtest.fleet import FleetError
from blockdex.loadtest.metrics import MetricsError
from blockdex.loadtest.report import report
from blockdex.loadtest.run import InterruptedEarlyError, LoadTest, Screen
from blockdex.loadtest.settings import Settings
from blockdex.loadtest.shapes import ShapeError
from blockdex.loadtest.slo import ObjectiveError
from blockdex.loadtest.sweep import Sweep, SweepError, table
from blockdex.loadtest.sweep_report import sweep_report
from blockdex.loadtest.verdicts import has_outage, is_untested

OK, FAILED, REFUSED, MISSED, UNTESTED, INTERRUPTED = 0, 1, 2, 3, 4, 130
_GRAVEST_FIRST = (FAILED, INTERRUPTED, MISSED, UNTESTED, OK)


def loadtest(words: Sequence[str]) -> int:
    """Runs the load test that the words behind `blockdex loadtest` say; the exit status is the answer."""
    try:
        arguments = parse(words)
        if arguments.settings.check_share and not reference_is_there():
            why = "package 'torch' is missing, which checks answers"
            raise RefusedError(f"{why}: pip install 'blockdex[server]', or --check-share 0")
        return _run(arguments) if arguments.sweep is None else _sweep(arguments, arguments.sweep)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        return _tell(REFUSED, f"package {package!r} is missing: pip install 'blockdex[loadtest]'")
    except (RefusedError, ObjectiveError, ComparisonError, SweepError, ShapeError) as error:
        return _tell(REFUSED, str(error))
    except (BlockdexError, MetricsError, FleetError) as error:
        return _tell(FAILED, str(error))
    except InterruptedEarlyError:
        return _tell(INTERRUPTED, "interrupted before anything was measured")


def exit_status(result: dict[str, Any]) -> int:
    """What a result comes to."""
    every = result["all"]
    is_so = {
        FAILED: result["checks"]["wrong"] or every["calls"] == every["errors"] or has_outage(result),
        INTERRUPTED: result["window"]["interrupted"],
        MISSED: not all(slo["met"] for slo in result["slos"]),
        UNTESTED: is_untested(result),
    }
    return next((status for status in _GRAVEST_FIRST if is_so.get(status)), OK)


def _run(arguments: Arguments) -> int:
    result = _measure(arguments, arguments.settings)
    _write(arguments.output, result)
    print(f"written: {arguments.output}.json, {arguments.output}.html")
    return int(result["exit_status"])


def _sweep(arguments: Arguments, sweep: Sweep) -> int:
    """Runs once for each value; writes each run's own files, and after each what they come to together so far."""
    output, results = arguments.output, list[dict[str, Any]]()
    for name, settings in zip(sweep.names(), sweep.over(arguments.settings), strict=True):
        try:
            results.append(_measure(arguments, settings))
        except InterruptedEarlyError:
            if not results:
                raise
            break
        _write(output.with_name(f"{output.name}-{name}"), results[-1])
        output.with_name(output.name + ".csv").write_text(table(results), encoding="utf-8")
        output.with_name(output.name + ".html").write_text(sweep_report(sweep.setting, results), encoding="utf-8")
        if results[-1]["window"]["interrupted"]:
            break
    print(f"written: {output}.csv, {output}.html, and for each run {output}-{sweep.setting}-*.json and .html")
    statuses = {result["exit_status"] for result in results}
    if len(results) < len(sweep.values):
        statuses.add(INTERRUPTED)
    return next(status for status in _GRAVEST_FIRST if status in statuses)


def _measure(arguments: Arguments, settings: Settings) -> dict[str, Any]:
    """One run, shown and judged."""
    # rich comes with an extra; what can be refused or explained without it has been.
    from rich.console import Console  # noqa: PLC0415

    from blockdex.loadtest.display import Display, show  # noqa: PLC0415

    with Display(Console(stderr=True)) as display, _interrupting(display):
        result = LoadTest(settings, arguments.target, display).run()
    result["outages"]["bound"] = arguments.outage
    result["slos"] = [objective.judge(result) for objective in arguments.objectives]
    result["comparison"] = None if arguments.old is None else compare(arguments.old, result)
    result["exit_status"] = exit_status(result)
    show(result, Console())
    return result


def _write(output: Path, result: dict[str, Any]) -> None:
    for suffix, text in ((".json", json.dumps(result, indent=1, allow_nan=False) + "\n"), (".html", report(result))):
        output.with_name(output.name + suffix).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _interrupting(screen: Screen) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run early; a second one ends it at once."""

    def on_signal(*_: object) -> None:
        if screen.interrupted:
            raise KeyboardInterrupt
        screen.interrupted = True

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(status: int, why: str) -> int:
    """Says why in one line, however many a server's own message has."""
    print(f"blockdex loadtest: {' '.join(why.split())}", file=sys.stderr)
    return status
