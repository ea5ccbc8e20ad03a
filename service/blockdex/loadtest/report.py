"""The result as one HTML file that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from blockdex.loadtest.page import latency_axis, page, section, table
from blockdex.loadtest.plot import Axis, Series, bar_chart, line_chart, linear_axis, percentile_axis
from blockdex.loadtest.result import PERCENTILES
from blockdex.loadtest.verdicts import LONGER, is_untested, verdicts
from blockdex.loadtest.wording import NONE, counted, duration, figure, share, significant

_STAGE = re.compile(r'blockdex_stage_duration_seconds\{phase="(\w+)",stage="(\w+)"\}')


def report(result: dict[str, Any]) -> str:
    """The page of a result."""
    title = f"blockdex load test: {result['settings']['scenario']}"
    return page(title, [_heading(result), *_sections(result)])


def _sections(result: dict[str, Any]) -> list[str]:
    return [
        _tiles(result),
        f'<section class="charts">{"".join(_charts(result))}</section>',
        section("Operations", _operations(result)),
        section("Objectives", _objectives(result["slos"])) if result["slos"] else "",
        section("Beside an earlier run", _comparison(result["comparison"])) if result["comparison"] else "",
        section("Without an answer", _outages(result)) if result["outages"]["gaps"] else "",
        section("Answers", _answers(result)),
        section("The load test's own ceiling", _ceiling(result)),
        section("The server's own account of the window", _account(result["server"])),
        section("Load and shapes", _load(result)),
        section("Where", _where(result)),
    ]


def _heading(result: dict[str, Any]) -> str:
    marks = "".join(f'<span class="mark {grave}">{escape(words)}</span>' for grave, words in verdicts(result))
    title = f"<h1>blockdex load test <b>{escape(result['settings']['scenario'])}</b></h1>"
    return f"<header>{title}<p>{escape(conditions(result))}</p>{marks}</header>"


def conditions(result: dict[str, Any]) -> str:
    """A line of when, how and against what."""
    settings, server = result["settings"], result["server"]
    rate = settings["rate"]
    loop = "closed loop" if rate is None else f"{rate:g} calls/s, {settings['spacing']}"
    clients = f"{counted(settings['clients'], 'client')} in {counted(settings['processes'], 'process')}"
    return (
        f"{result['date']} · {clients}, {loop}, {settings['transport']} · measured for "
        f"{duration(result['window']['seconds'])} after {duration(settings['warm_up'])} of warm-up · "
        f"blockdex {server['version']} on {server['device']}"
    )


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
        ("without an answer", duration(result["outages"]["seconds"] or None)),
    )
    return (
        '<section class="tiles">'
        + "".join(f"<div><span>{escape(name)}</span><b>{escape(value)}</b></div>" for name, value in tiles)
        + "</section>"
    )


def _charts(result: dict[str, Any]) -> Iterator[str]:
    seconds = result["seconds"]
    time = linear_axis("seconds since measuring began", result["window"]["seconds"], "{:g}".format)
    lines = [Series(name, [(_middle(second), second[name]) for second in seconds]) for name in ("max", "p99", "p50")]
    gaps = [(gap["start"], gap["start"] + gap["seconds"]) for gap in result["outages"]["gaps"]]
    yield line_chart("Latency over time", time, latency_axis(lines), lines, gaps)
    operations = result["operations"]
    curves = [
        Series(name, [(at, value) for at, value in calls["curve"] if value]) for name, calls in operations.items()
    ]
    most = max((calls["calls"] for calls in operations.values()), default=1)
    percent = percentile_axis("per cent of calls", 100 - 100 / most)
    yield line_chart("Latency by percentile", percent, latency_axis(curves), curves)
    for title, name in (("Calls answered", "calls"), ("Tokens appended", "tokens")):
        rates = Series("", [(_middle(second), second[name] / second["length"]) for second in seconds])
        yield line_chart(f"{title} a second", time, _count_axis([rates]), [rates], gaps)
    codes = sorted({code for second in seconds for code in second["errors"]})
    errors = [
        Series(code, [(_middle(second), second["errors"].get(code, 0) / second["length"]) for second in seconds])
        for code in codes
    ]
    yield line_chart("Errors a second", time, _count_axis(errors), errors, gaps)
    if metrics := result["server"]["metrics"]:
        stages = [
            (" ".join(match.groups()), observed["mean"])
            for name, observed in metrics["histograms"].items()
            if (match := _STAGE.fullmatch(name))
        ]
        yield bar_chart("Mean time by stage, in the server", stages, duration)


def _middle(second: dict[str, Any]) -> float:
    return float(second["second"] + second["length"] / 2)


def _count_axis(lines: Sequence[Series]) -> Axis:
    values = [value for line in lines for _, value in line.points if value is not None]
    return linear_axis("", max(values, default=1.0), "{:,g}".format)


def _operations(result: dict[str, Any]) -> str:
    rows = []
    for name, calls in (*result["operations"].items(), ("all", result["all"])):
        latencies = [duration(calls["latency_seconds"][percentile]) for percentile in (*PERCENTILES, "mean", "max")]
        outcomes = ", ".join(f"{count:,} {words}" for words, count in calls["outcomes"].items() if words != "OK")
        rows.append((name, f"{calls['calls']:,}", *latencies, outcomes or NONE))
    if errors := result["set_up_errors"]:
        rows.append(("starting over", NONE, *[NONE] * (len(PERCENTILES) + 2), counted(errors, "error")))
    note = f"Percentiles are of calls that were answered, within {share(result['latency_relative_error'])}."
    if result["settings"]["rate"] is not None:
        late = duration(result["lateness_seconds"]["p99"])
        note += (
            f" Latency counts from the moment at which a call was meant to begin; 99 % were sent at most {late} after "
            f"it. {result['unsent']:,} arrivals found no free client before the end."
        )
    return table(("operation", "calls", *PERCENTILES, "mean", "max", "errors"), rows) + f"<p>{escape(note)}</p>"


def _objectives(slos: Iterable[dict[str, Any]]) -> str:
    rows = [(slo["slo"], figure(slo["measured"], slo["kind"]), "met" if slo["met"] else "missed") for slo in slos]
    return table(("objective", "measured", ""), rows)


def _comparison(comparison: dict[str, Any]) -> str:
    differences = [
        (difference["what"], str(difference["old"]), str(difference["new"])) for difference in comparison["differences"]
    ]
    text = f"<p>The other run is of {escape(comparison['old_date'])}.</p>"
    if differences:
        text += "<p>The runs are not alike:</p>" + table(("what", "then", "now"), differences)
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
    return text + table(("figure", "then", "now", "now / then"), rows)


def _outages(result: dict[str, Any]) -> str:
    outages = result["outages"]
    rows = [(f"{gap['start']:g} s", duration(gap["seconds"])) for gap in outages["gaps"]]
    lasted, longest, bound = map(duration, (outages["seconds"], outages["longest"], outages["bound"]))
    words = (
        f"For {lasted} of {duration(result['window']['seconds'])} clients waited and no call of the load was answered, "
        f"{longest} at a stretch; {bound} are allowed. Stretches of less than a second are not counted. "
        "After a failure a client makes new sequences first."
    )
    return table(("from", "for"), rows) + f"<p>{escape(words)}</p>"


def _answers(result: dict[str, Any]) -> str:
    checks, spec = result["checks"], result["server"]["spec"]
    words = (
        f"{checks['checked']:,} of {counted(checks['answers'], 'answer')} ({checks['rows']:,} rows) were held against "
        f"the float64 reference: {len(checks['wrong'])} wrong, {checks['flips']} blocks exchanged for others that "
        "score as high but for rounding."
    )
    if checks["whole"]:
        longest = spec["topk"] * spec["block_size"]
        words += (
            f" Beside them {counted(checks['whole'], 'answer')} took every block, as any selection of at most "
            f"{longest:,} tokens does, and so tested nothing."
        )
        if is_untested(result):
            words += f" {LONGER}"
    text = f"<p>{escape(words)}</p>"
    rows = [
        (wrong["operation"], str(wrong["sequence"]), str(wrong["layer"]), str(wrong["position"]), wrong["reason"])
        for wrong in checks["wrong"]
    ]
    return text + (table(("operation", "sequence", "layer", "position", "why"), rows) if rows else "")


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
    return table(("", "calls", "p50", "p99", "of a core, by process"), rows) + f"<p>{escape(words)}</p>"


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
        text += table(("histogram", "count", "mean", "p50", "p99"), rows)
        text += table(("counter", "rose by"), [(name, f"{rise:,.6g}") for name, rise in metrics["counters"].items()])
    if after is not None:
        text += table(
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
    return text + table(("clients", "shape"), rows) + table(("setting", ""), settings)


def _where(result: dict[str, Any]) -> str:
    server = result["server"]
    kernels = {f"{phase} kernel": f"{name} ({why})" for phase, (name, why) in server["kernels"].items()}
    facts = {"server": result["target"]["address"], "version": server["version"], "device": server["device"]}
    rows = [*facts.items(), *kernels.items(), *server["spec"].items()]
    own = [(name, value) for name, value in result["environment"].items()]
    return table(("server", ""), rows) + table(("load test", ""), own)
