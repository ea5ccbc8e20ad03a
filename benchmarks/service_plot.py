"""The plot of a result of the service benchmark; `python -m benchmarks.service_plot FILE` draws it again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Numbers = dict[str, Any]
Panel = Callable[[Any], None]

_HEADROOM = 1.35  # Above the bars, for the legend.
_ECHO, _KERNEL, _REST = "#9aa5b1", "#3d7ea6", "#e0a458"


def plot(result: Numbers, path: Path) -> None:
    """Draws what was measured: a step and a call by what they are made of, throughput and decodes beside others."""
    import matplotlib  # noqa: PLC0415 - takes a second to load, and only the end needs it

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    draw = {"step": _step, "calls": _calls, "clients": _clients, "decode": _decode}
    panels: list[Panel] = [partial(draw[part], numbers) for part, numbers in result["parts"].items() if part in draw]
    if not panels:
        return
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    for axes, panel in zip(grid.flat, panels, strict=True):
        panel(axes)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.set_ylim(top=axes.get_ylim()[1] * _HEADROOM)
            axes.legend(loc="upper right")
    machine = result["machine"]
    device = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
    figure.suptitle(f"A served blockdex on {device}, {machine['cores']} cores (commit {result['commit']})")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _step(numbers: Numbers, axes: Any) -> None:
    engine, kernels = numbers["engine_us"], numbers["kernels_us"]
    axes.bar([0, 1], [engine["p50"], kernels["p50"]], color=[_REST, _KERNEL])
    axes.plot([0, 1], [engine["p99"], kernels["p99"]], "k_", markersize=18, label="p99")
    axes.set_xticks([0, 1], ["in the core,\nmessage to answer", "kernels alone\nfrom the host"])
    axes.set_ylabel("us, p50")
    axes.set_title("A decode step")


def _calls(numbers: Numbers, axes: Any) -> None:
    kernel = numbers["kernel_ms"]
    transports = ("stream", "unary")
    echo = [numbers[f"echo_{transport}"]["p50"] for transport in transports]
    whole = [numbers[transport]["p50"] for transport in transports]
    rest = [max(call - bare - kernel, 0) for call, bare in zip(whole, echo, strict=True)]
    places = range(len(transports))
    axes.bar(places, echo, color=_ECHO, label="bare echo")
    axes.bar(places, kernel, bottom=echo, color=_KERNEL, label="kernels")
    axes.bar(places, rest, bottom=[bare + kernel for bare in echo], color=_REST, label="the rest")
    axes.plot(places, [numbers[transport]["p99"] for transport in transports], "k_", markersize=18, label="p99")
    axes.set_xticks(places, transports)
    axes.set_ylabel("ms, p50")
    axes.set_title("AppendAndSelect, one client")


def _clients(numbers: Numbers, axes: Any) -> None:
    rates = numbers["calls_per_second"]
    axes.bar([0, 1], [rates["served"], rates["echo"]], color=[_REST, _ECHO])
    axes.set_xticks([0, 1], ["blockdex", "bare echoes"])
    axes.set_ylabel("calls a second")
    axes.set_title(f"Decode, {len(numbers['waves']['served'][0])} clients")


def _decode(numbers: Numbers, axes: Any) -> None:
    kinds = {"alone": numbers["alone_ms"], "beside prefills": numbers["beside_ms"]}
    places = range(len(kinds))
    axes.bar(places, [each["p50"] for each in kinds.values()], color=_REST)
    axes.plot(places, [each["p99"] for each in kinds.values()], "k_", markersize=18, label="p99")
    axes.set_xticks(places, kinds)
    axes.set_ylabel("ms, p50")
    axes.set_title("Decode calls of one client")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        plot(json.loads(Path(name).read_text(encoding="utf-8")), Path(name).with_suffix(".png"))
