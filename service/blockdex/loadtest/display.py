"""What is seen of a load test on a terminal: how it goes on, and what came of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from blockdex.loadtest.fleet import Begins, Event, Measured, Measuring
from blockdex.loadtest.histogram import Histogram
from blockdex.loadtest.jobs import Progress as Report
from blockdex.loadtest.result import PERCENTILES
from blockdex.loadtest.schedule import Window
from blockdex.loadtest.verdicts import LONGER, has_outage, is_untested
from blockdex.loadtest.wording import NONE, counted, duration, figure, share, significant

_RECENT_SECONDS = 2.0
_PLAIN_SECONDS = 5.0
_ERROR_LETTERS = 120


class Display:
    """Live progress on stderr; lines every few seconds where stderr is no terminal.

    Attributes:
        interrupted: set from outside to end the run early.
    """

    def __init__(self, console: Console) -> None:
        self.interrupted = False
        self._console = console
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)
        self._task = self._bar.add_task("", total=None)
        self._window: Window | None = None
        self._recent: deque[tuple[float, Report]] = deque()
        self._last_error = ""
        self._errors = 0
        self._plain_due = 0.0
        # Last: it draws at once.
        self._live = Live(console=console, get_renderable=self._render, transient=True) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def phase(self, words: str) -> None:
        """What is done from now on."""
        self._window = None
        self._recent.clear()
        self._plain_due = time.monotonic() + _PLAIN_SECONDS
        self._bar.reset(self._task, description=words, total=None)
        if not self._live:
            self._console.print(words, highlight=False)

    def see(self, event: Event) -> None:
        """Something has happened."""
        match event:
            case Begins():
                self._window = event.window
                self._say("warming up")
            case Measuring():
                self._say("measuring")
            case Measured():
                self._say("closing")
            case Report():
                self._recent.append((time.monotonic(), event))
                self._errors += event.errors
                self._last_error = event.last_error or self._last_error
        if self._window is not None:
            total = self._window.end - self._window.begin
            self._bar.update(self._task, total=total, completed=time.monotonic() - self._window.begin)
        if not self._live and time.monotonic() >= self._plain_due:
            self._plain_due = time.monotonic() + _PLAIN_SECONDS
            self._console.print(self._now(), highlight=False)

    def _say(self, step: str) -> None:
        self._bar.update(self._task, description=step)
        if not self._live:
            self._console.print(step, highlight=False)

    def _render(self) -> RenderableType:
        return Group(self._bar, Text(self._now()))

    def _now(self) -> str:
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - _RECENT_SECONDS:
            self._recent.popleft()
        latencies = Histogram()
        tokens = 0
        for _, report in self._recent:
            latencies.merge(report.latencies)
            tokens += report.tokens
        words = (
            f"{significant(latencies.count / _RECENT_SECONDS)} calls/s",
            f"{significant(tokens / _RECENT_SECONDS)} tokens/s",
            f"p50 {duration(latencies.percentile(50))}",
            f"p99 {duration(latencies.percentile(99))}",
            f"{self._errors} errors",
            " ".join(self._last_error.split())[:_ERROR_LETTERS],
        )
        return "   ".join(filter(None, words))


def show(result: dict[str, Any], console: Console) -> None:
    """The result as tables and lines."""
    console.print(_operations(result))
    for line in _lines(result):
        console.print(line, highlight=False, soft_wrap=True)
    if result["server"]["metrics"]:
        console.print(_stages(result["server"]["metrics"]["histograms"]))
    if result["slos"]:
        console.print(_objectives(result["slos"]))
    if result["comparison"]:
        _show_comparison(result["comparison"], console)


def _operations(result: dict[str, Any]) -> Table:
    settings = result["settings"]
    loop = "closed loop" if settings["rate"] is None else f"{settings['rate']:g} arrivals/s, {settings['spacing']}"
    table = Table(
        title=f"{settings['scenario']}: {counted(settings['clients'], 'client')}, {loop}, {settings['transport']}"
    )
    table.add_column("operation")
    for heading in ("calls", "errors", *PERCENTILES, "max"):
        table.add_column(heading, justify="right")
    for name, calls in (*result["operations"].items(), ("all", result["all"])):
        latencies = [duration(calls["latency_seconds"][percentile]) for percentile in (*PERCENTILES, "max")]
        table.add_row(name, f"{calls['calls']:,}", f"{calls['errors']:,}", *latencies)
    return table


def _lines(result: dict[str, Any]) -> Iterator[str]:
    rates = result["throughput"]
    yield "  ".join(
        (
            f"throughput: {significant(rates['calls_per_second'])} calls/s",
            f"{significant(rates['tokens_per_second'])} tokens/s",
            f"{significant(rates['queries_per_second'])} queries/s, each counted once a layer",
        )
    )
    shapes = result["shapes"]
    scale = significant(shapes["scale"])
    yield f"shapes: published token counts times {scale}; {shapes['free_tokens']:,} tokens were free"
    outages = result["outages"]
    if outages["gaps"]:
        window, bound = duration(result["window"]["seconds"]), duration(outages["bound"])
        colour = "red" if has_outage(result) else "yellow"
        yield (
            f"[{colour}]without an answer: {duration(outages['seconds'])} of {window}, "
            f"{duration(outages['longest'])} at a stretch ({bound} are allowed)[/{colour}]"
        )
    if result["server"]["same_epoch"] is False:
        yield "[yellow]the server started anew: its own account begins where it did[/yellow]"
    for outcome, count in result["all"]["outcomes"].items():
        if outcome != "OK":
            yield f"[red]errors: {count:,} x {outcome}[/red]"
    if result["set_up_errors"]:
        yield f"[red]errors while clients started over: {result['set_up_errors']:,}[/red]"
    if result["unsent"]:
        yield f"[red]unsent: {result['unsent']:,} arrivals found no free client before the end[/red]"
    if result["left_open"]:
        yield f"[red]left open: {result['left_open']:,} sequences, the server did not answer[/red]"
    if result["window"]["interrupted"]:
        yield f"[yellow]interrupted after {duration(result['window']['seconds'])}[/yellow]"
    yield from _ceiling_lines(result)
    yield _check_line(result)
    for wrong in result["checks"]["wrong"][:5]:
        place = (
            f"{wrong['operation']}, sequence {wrong['sequence']}, layer {wrong['layer']}, position {wrong['position']}"
        )
        yield f"[red]wrong answer: {place}: {wrong['reason']}[/red]"


def _ceiling_lines(result: dict[str, Any]) -> Iterator[str]:
    ceiling = result["ceiling"]
    if ceiling is None:
        yield "the load test's own ceiling: not measured"
        return
    rate, latency = ceiling["throughput"]["calls_per_second"], ceiling["latency_seconds"]["p50"]
    yield (
        f"the load test's own ceiling: {significant(rate)} calls/s, p50 {duration(latency)} where nothing is computed; "
        f"{share(ceiling['share_reached'])} of it reached"
    )
    if ceiling["near"]:
        yield (
            "[yellow]near the load test's own ceiling: the rate above may be the load test's, not the server's "
            "(more --processes on more cores move it)[/yellow]"
        )


def _check_line(result: dict[str, Any]) -> str:
    checks = result["checks"]
    if is_untested(result):
        return f"[red]answers: no selection was tested, {checks['whole']:,} took every block. {LONGER}[/red]"
    if not checks["checked"]:
        return "answers: none checked"
    colour = "red" if checks["wrong"] else "green"
    return (
        f"[{colour}]answers: {checks['checked']:,} of {checks['answers']:,} checked ({checks['rows']:,} rows): "
        f"{len(checks['wrong'])} wrong, {checks['flips']} flips[/{colour}]"
    )


def _stages(histograms: dict[str, dict[str, float]]) -> Table:
    table = Table(title="the server's own account of the window")
    table.add_column("", overflow="fold")
    for heading in ("count", "mean", "p50", "p99"):
        table.add_column(heading, justify="right")
    for name, observed in histograms.items():
        kind = "seconds" if name.partition("{")[0].endswith("_seconds") else "count"
        figures = [figure(observed[column], kind) for column in ("mean", "p50", "p99")]
        table.add_row(name.removeprefix("blockdex_"), f"{observed['count']:,.0f}", *figures)
    return table


def _objectives(slos: list[dict[str, Any]]) -> Table:
    table = Table(title="objectives")
    for heading in ("objective", "measured", ""):
        table.add_column(heading)
    for slo in slos:
        table.add_row(
            slo["slo"],
            figure(slo["measured"], slo["kind"]),
            "[green]met[/green]" if slo["met"] else "[red]missed[/red]",
        )
    return table


def _show_comparison(comparison: dict[str, Any], console: Console) -> None:
    for difference in comparison["differences"]:
        words = f"{difference['what']}: {difference['old']} then, {difference['new']} now"
        console.print(f"[yellow]not alike: {words}[/yellow]", highlight=False, soft_wrap=True)
    if not comparison["comparable"]:
        console.print("[yellow]another scenario: figures are not compared[/yellow]")
        return
    table = Table(title=f"beside the run of {comparison['old_date']}")
    table.add_column("figure")
    for heading in ("then", "now", "now / then"):
        table.add_column(heading, justify="right")
    for row in comparison["figures"]:
        then, now = (figure(row[when], row["kind"]) for when in ("old", "new"))
        table.add_row(row["figure"], then, now, NONE if row["ratio"] is None else significant(row["ratio"]))
    console.print(table)
