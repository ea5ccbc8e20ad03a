"""The result as one HTML file that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from blockdex.loadtest.plot import Axis, Series, bar_chart, line_chart, linear_axis, logarithmic_axis, percentile_axis
from blockdex.loadtest.result import PERCENTILES
from blockdex.loadtest.style import STYLE
from blockdex.loadtest.wording import NONE, duration, figure, share, significant

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STAGE = re.compile(r'blockdex_stage_duration_seconds\{phase="(\w+)",stage="(\w+)"\}')


def report(result: dict[str, Any]) -> str:
    """The page of a result."""
    settings = result["settings"]
    parts = [
        _heading(result),
        _tiles(result),
        f'<section class="charts">{"".join(_charts(result))}</section>',
        _section("Operations", _operations(result)),
        _section("Objectives", _objectives(result["slos"])) if result["slos"] else "",
        _section("Beside an earlier run", _comparison(result["comparison"])) if result["comparison"] else "",
        _section("Answers", _answers(result["checks"])),
        _section("The load test's own ceiling", _ceiling(result)),
        _section("The server's own account of the window", _account(result["server"])),
        _section("Load and shapes", _load(result)),
        _section("Where", _where(result)),
    ]
    title = f"blockdex load test: {settings['scenario']}"
    return _PAGE.format(title=escape(title), style=STYLE, body="\n".join(filter(None, parts)))


def verdicts(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is to be known first: how grave (`good`, `warn`, `bad`), and words."""
    if wrong := len(result["checks"]["wrong"]):
        yield "bad", f"{wrong} wrong answers"
    elif result["checks"]["checked"]:
        yield "good", "answers right"
    else:
        yield "warn", "answers not checked"
    if result["slos"]:
        missed = sum(not slo["met"] for slo in result["slos"])
        yield ("bad", f"{missed} of {len(result['slos'])} objectives missed") if missed else ("good", "objectives met")
    if errors := result["all"]["errors"]:
        yield "bad", f"{errors:,} errors"
    if result["unsent"]:
        yield "bad", f"{result['unsent']:,} arrivals unsent"
    if result["left_open"]:
        yield "bad", f"{result['left_open']:,} sequences left open"
    if result["window"]["interrupted"]:
        yield "warn", "interrupted"
    if result["ceiling"] and result["ceiling"]["near"]:
        yield "warn", "near the load test's own ceiling"


def _heading(result: dict[str, Any]) -> str:
    settings, server = result["settings"], result["server"]
    rate = settings["rate"]
    loop = "closed loop" if rate is None else f"{rate:g} calls/s, {settings['spacing']}"
    line = (
        f"{result['date']} · {settings['clients']} clients in {settings['processes']} processes, {loop}, "
        f"{settings['transport']} · measured for {duration(result['window']['seconds'])} after "
        f"{duration(settings['warm_up'])} of warm-up · blockdex {server['version']} on {server['device']}"
    )
    marks = "".join(f'<span class="mark {grave}">{escape(words)}</span>' for grave, words in verdicts(result))
    title = f"<h1>blockdex load test <b>{escape(settings['scenario'])}</b></h1>"
    return f"<header>{title}<p>{escape(line)}</p>{marks}</header>"


def _tiles(result: dict[str, Any]) -> str:
    rates, latencies = result["throughput"], result["all"]["latency_seconds"]
    every = result["all"]
    tiles = (
        ("calls", figure(rates["calls_per_second"], "per_second")),
        ("tokens", figure(rates["tokens_per_second"], "per_second")),
        ("p50", duration(latencies["p50"])),
        ("p99", duration(latencies["p99"])),
        ("longest", duration(latencies["max"])),
        ("errors", share(every["errors"] / every["calls"] if every["calls"] else None)),
    )
    return (
        '<section class="tiles">'
        + "".join(f"<div><span>{escape(name)}</span><b>{escape(value)}</b></div>" for name, value in tiles)
        + "</section>"
    )


def _charts(result: dict[str, Any]) -> Iterator[str]:
    seconds = result["seconds"]
    time = linear_axis("seconds since measuring began", result["window"]["seconds"], "{:g}".format)
    lines = [
        Series(name, [(_middle(second), second[name]) for second in seconds if second[name]])
        for name in ("max", "p99", "p50")
    ]
    yield line_chart("Latency over time", time, _latency_axis(lines), lines)
    operations = result["operations"]
    curves = [
        Series(name, [(at, value) for at, value in calls["curve"] if value]) for name, calls in operations.items()
    ]
    most = max((calls["calls"] for calls in operations.values()), default=1)
    percent = percentile_axis("per cent of calls", 100 - 100 / most)
    yield line_chart("Latency by percentile", percent, _latency_axis(curves), curves)
    for title, name in (("Calls answered", "calls"), ("Tokens appended", "tokens")):
        rates = Series("", [(_middle(second), second[name] / second["length"]) for second in seconds])
        yield line_chart(f"{title} a second", time, _count_axis([rates]), [rates])
    codes = sorted({code for second in seconds for code in second["errors"]})
    errors = [
        Series(code, [(_middle(second), second["errors"].get(code, 0) / second["length"]) for second in seconds])
        for code in codes
    ]
    yield line_chart("Errors a second", time, _count_axis(errors), errors)
    if metrics := result["server"]["metrics"]:
        stages = [
            (" ".join(match.groups()), observed["mean"])
            for name, observed in metrics["histograms"].items()
            if (match := _STAGE.fullmatch(name))
        ]
        yield bar_chart("Mean time by stage, in the server", stages, duration)


def _middle(second: dict[str, Any]) -> float:
    return float(second["second"] + second["length"] / 2)


def _latency_axis(lines: Sequence[Series]) -> Axis:
    values = [value for line in lines for _, value in line.points] or [1e-3, 1e-2]
    return logarithmic_axis("", min(values), max(values), duration)


def _count_axis(lines: Sequence[Series]) -> Axis:
    return linear_axis("", max((value for line in lines for _, value in line.points), default=1.0), "{:,g}".format)


def _operations(result: dict[str, Any]) -> str:
    rows = []
    for name, calls in (*result["operations"].items(), ("all", result["all"])):
        latencies = [duration(calls["latency_seconds"][percentile]) for percentile in (*PERCENTILES, "mean", "max")]
        outcomes = ", ".join(f"{count:,} {words}" for words, count in calls["outcomes"].items() if words != "OK")
        rows.append((name, f"{calls['calls']:,}", *latencies, outcomes or NONE))
    note = f"Percentiles are within {share(result['latency_relative_error'])}."
    if result["settings"]["rate"] is not None:
        late = duration(result["lateness_seconds"]["p99"])
        note += (
            f" Latency counts from the moment at which a call was meant to begin; 99 % were sent at most {late} after "
            f"it. {result['unsent']:,} arrivals found no free client before the end."
        )
    return _table(("operation", "calls", *PERCENTILES, "mean", "max", "errors"), rows) + f"<p>{escape(note)}</p>"


def _objectives(slos: Iterable[dict[str, Any]]) -> str:
    rows = [(slo["slo"], figure(slo["measured"], slo["kind"]), "met" if slo["met"] else "missed") for slo in slos]
    return _table(("objective", "measured", ""), rows)


def _comparison(comparison: dict[str, Any]) -> str:
    differences = [
        (difference["what"], str(difference["old"]), str(difference["new"])) for difference in comparison["differences"]
    ]
    text = f"<p>The other run is of {escape(comparison['old_date'])}.</p>"
    if differences:
        text += "<p>The runs are not alike:</p>" + _table(("what", "then", "now"), differences)
    if not comparison["comparable"]:
        return text + "<p>Another scenario: figures are not compared.</p>"
    rows = [
        (
            row["figure"],
            figure(row["old"], row["kind"]),
            figure(row["new"], row["kind"]),
            NONE if row["ratio"] is None else significant(row["ratio"]),
        )
        for row in comparison["figures"]
    ]
    return text + _table(("figure", "then", "now", "now / then"), rows)


def _answers(checks: dict[str, Any]) -> str:
    text = (
        f"<p>{checks['checked']:,} of {checks['answers']:,} answers ({checks['rows']:,} rows) were held against the "
        f"float64 reference: {len(checks['wrong'])} wrong, {checks['flips']} blocks exchanged for others that score as "
        "high but for rounding.</p>"
    )
    rows = [
        (wrong["operation"], str(wrong["sequence"]), str(wrong["layer"]), str(wrong["position"]), wrong["reason"])
        for wrong in checks["wrong"]
    ]
    return text + (_table(("operation", "sequence", "layer", "position", "why"), rows) if rows else "")


def _ceiling(result: dict[str, Any]) -> str:
    ceiling = result["ceiling"]
    cores = ", ".join(share(part) for part in result["cpu_shares"])
    if ceiling is None:
        return f"<p>Not measured. The load test's processes took {cores} of a core each.</p>"
    rows = [
        (
            name,
            figure(part["throughput"]["calls_per_second"], "per_second"),
            duration(latencies["p50"]),
            duration(latencies["p99"]),
            ", ".join(share(cpu) for cpu in part["cpu_shares"]),
        )
        for name, part, latencies in (
            ("this server", result, result["all"]["latency_seconds"]),
            ("a server that computes nothing", ceiling, ceiling["latency_seconds"]),
        )
    ]
    words = (
        f"{share(ceiling['share_reached'])} of what the same clients reach where nothing is computed, on this machine."
    )
    if ceiling["near"]:
        words += " That is near: the rate may be the load test's own and not the server's."
    return _table(("", "calls", "p50", "p99", "of a core, by process"), rows) + f"<p>{escape(words)}</p>"


def _account(server: dict[str, Any]) -> str:
    metrics = server["metrics"]
    before, after = server["cache_before"], server["cache_at_end"]
    text = ""
    if metrics is None:
        text = "<p>Its metrics were not asked for (<code>--http-address</code>), or did not answer.</p>"
    else:
        rows = []
        for name, observed in metrics["histograms"].items():
            kind = "seconds" if name.partition("{")[0].endswith("_seconds") else "count"
            figures = [figure(observed[column], kind) for column in ("mean", "p50", "p99")]
            rows.append((name, f"{observed['count']:,.0f}", *figures))
        text += _table(("histogram", "count", "mean", "p50", "p99"), rows)
        text += _table(("counter", "rose by"), [(name, f"{rise:,.6g}") for name, rise in metrics["counters"].items()])
    if after is not None:
        text += _table(
            ("cache", "before the run", "at the end of the window"),
            [(name.replace("_", " "), f"{before[name]:,}", f"{after[name]:,}") for name in before],
        )
    return text


def _load(result: dict[str, Any]) -> str:
    shapes = result["shapes"]
    rows = [(str(group["clients"]), group["shape"]) for group in shapes["clients"]]
    text = (
        f"<p>Published token counts times {significant(shapes['scale'])}, to fit the {shapes['free_tokens']:,} tokens "
        f"that the server had free; {shapes['layers']} layers. Tokens and queries count once a layer.</p>"
    )
    settings = [(name.replace("_", " "), str(value)) for name, value in result["settings"].items()]
    return text + _table(("clients", "shape"), rows) + _table(("setting", ""), settings)


def _where(result: dict[str, Any]) -> str:
    server = result["server"]
    kernels = {f"{phase} kernel": f"{name} ({why})" for phase, (name, why) in server["kernels"].items()}
    facts = {"server": result["target"]["address"], "version": server["version"], "device": server["device"]}
    rows = [*facts.items(), *kernels.items(), *server["spec"].items()]
    own = [(name, value) for name, value in result["environment"].items()]
    return _table(("server", ""), rows) + _table(("load test", ""), own)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
