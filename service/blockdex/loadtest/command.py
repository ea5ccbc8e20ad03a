"""`blockdex loadtest`: arguments in, result files and an exit status out."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from blockdex.contract.errors import BlockdexError
from blockdex.loadtest.arguments import Arguments, RefusedError, parse
from blockdex.loadtest.checking import reference_is_there
from blockdex.loadtest.comparison import ComparisonError, compare
from blockdex.loadtest.fleet import FleetError
from blockdex.loadtest.metrics import MetricsError
from blockdex.loadtest.report import report
from blockdex.loadtest.run import InterruptedEarlyError, LoadTest, Screen
from blockdex.loadtest.shapes import ShapeError
from blockdex.loadtest.slo import ObjectiveError

OK, FAILED, REFUSED, MISSED, INTERRUPTED = 0, 1, 2, 3, 130


def loadtest(words: Sequence[str]) -> int:
    """Runs the load test that the words behind `blockdex loadtest` say; the exit status is the answer."""
    try:
        arguments = parse(words)
        if arguments.settings.check_share and not reference_is_there():
            why = "package 'torch' is missing, which checks answers"
            raise RefusedError(f"{why}: pip install 'blockdex[server]', or --check-share 0")
        return _run(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        return _tell(REFUSED, f"package {package!r} is missing: pip install 'blockdex[loadtest]'")
    except (RefusedError, ObjectiveError, ComparisonError, ShapeError) as error:
        return _tell(REFUSED, str(error))
    except (BlockdexError, MetricsError, FleetError) as error:
        return _tell(FAILED, str(error))
    except InterruptedEarlyError:
        return _tell(INTERRUPTED, "interrupted before anything was measured")


def exit_status(result: dict[str, Any]) -> int:
    """What a result comes to."""
    every = result["all"]
    if result["checks"]["wrong"] or every["calls"] == every["errors"]:
        return FAILED
    if result["window"]["interrupted"]:
        return INTERRUPTED
    return OK if all(slo["met"] for slo in result["slos"]) else MISSED


def _run(arguments: Arguments) -> int:
    # rich comes with an extra; what can be refused or explained without it has been.
    from rich.console import Console  # noqa: PLC0415

    from blockdex.loadtest.display import Display, show  # noqa: PLC0415

    with Display(Console(stderr=True)) as display, _interrupting(display):
        result = LoadTest(arguments.settings, arguments.target, display).run()
    result["slos"] = [objective.judge(result) for objective in arguments.objectives]
    result["comparison"] = None if arguments.old is None else compare(arguments.old, result)
    result["exit_status"] = exit_status(result)
    output = arguments.output
    for suffix, text in ((".json", json.dumps(result, indent=1, allow_nan=False) + "\n"), (".html", report(result))):
        output.with_name(output.name + suffix).write_text(text, encoding="utf-8")
    show(result, Console())
    print(f"written: {output}.json, {output}.html")
    return int(result["exit_status"])


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
