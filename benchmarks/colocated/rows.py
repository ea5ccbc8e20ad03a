"""The rows of the run: what is started for each, how long it may take, and which figures are made of its numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.colocated.settings import FIRST_ID, FLEET_FIRST_ID, Settings
from benchmarks.figures import Figure

Numbers = dict[str, Any]

RANKS, _GPU_STEPS = 4, 10


class Row(NamedTuple):
    """A row.

    Attributes:
        command: what prints its numbers as JSON, as its last line.
        figures: what these tell.
        seconds: after which it is ended.
        gpus: how many it needs.
        without_mps: whether it is measured without MPS too, which makes a difference where two processes use one GPU.
    """

    command: Callable[[Settings], list[str]]
    figures: Callable[[Numbers, Settings], Iterator[Figure]]
    seconds: float
    gpus: int = 0
    without_mps: bool = False


class Aims(NamedTuple):
    """What figures of calls are to reach."""

    call_p50_us: float | None = None
    call_p99_us: float | None = None
    step_p50_ms: float | None = None
    step_p99_ms: float | None = None


NO_AIMS = Aims()


def of_calls(name: str, numbers: Numbers, settings: Settings, aims: Aims = NO_AIMS) -> Iterator[Figure]:
    """A call, and a step of all layers."""
    layers = settings.layers
    for kind, what, unit in (("call", "a call", "us"), ("step", f"{layers} layers", "ms")):
        for place in ("p50", "p99"):
            key = f"{kind}_{place}_{unit}"
            if key in numbers:
                yield Figure(f"{name}: {what}, {place}", numbers[key], unit, getattr(aims, key), False, "")


def in_python(module: str, **other: str) -> Callable[[Settings], list[str]]:
    """A module of this package, in a process of its own; `other` settings are its alone."""
    return lambda settings: [
        *(sys.executable, "-m", f"benchmarks.colocated.{module}"),
        replace(settings, **other).word(),  # type: ignore[arg-type]
    ]


def in_c(first_id: int, *, clients: int = 1, ranks: int = 1, region: bool = False) -> Callable[[Settings], list[str]]:
    """`client.c`; `clients` 0 is the fleet."""

    def command(settings: Settings) -> list[str]:
        layers = settings.layers if clients else settings.fleet_layers
        numbers = (first_id, clients or settings.clients, ranks, layers, settings.sequences, settings.tokens)
        # As many calls of the fleet's; on a GPU more of all, which take microseconds there.
        steps = settings.steps if clients else settings.steps * settings.layers // settings.fleet_layers
        steps *= _GPU_STEPS if settings.device.startswith("cuda") else 1
        folder = Path(settings.folder)
        return [str(folder / "client"), settings.socket, str(folder), *map(str, (*numbers, steps, int(region)))]

    return command


def _python(numbers: Numbers, settings: Settings) -> Iterator[Figure]:
    basis = "a mean, by the server's metrics"
    yield Figure("kernels of a call, in steps one by one", numbers["kernels_us"], "us", None, False, basis)
    yield from of_calls("unary, Python client", numbers["unary"], settings)
    yield from of_calls("stream, Python client", numbers["stream"], settings)
    yield from of_calls("ring, Python client", numbers["ring"], settings, Aims(45, 120, 2.6))


def _ring_in_c(numbers: Numbers, settings: Settings) -> Iterator[Figure]:
    yield from of_calls("ring, C client", numbers, settings, Aims(30, None, 2.6))


def _region(numbers: Numbers, settings: Settings) -> Iterator[Figure]:
    yield from of_calls("ring with a memfd as region, C client", numbers, settings)


def _fleet(numbers: Numbers, settings: Settings) -> Iterator[Figure]:
    name = f"{settings.clients} C clients on rings, {settings.sequences} sequences each"
    basis = f"a process each, every answer checked; a call p50 {numbers['call_p50_us']:.0f} us"
    yield Figure(f"{name}: calls a second", numbers["calls_per_second"], "calls/s", 60_000, True, basis)


def _ranks_on_rings(numbers: Numbers, settings: Settings) -> Iterator[Figure]:
    name = f"{RANKS} ranks of one head, C clients on rings, a barrier a layer"
    yield from of_calls(name, numbers, settings, Aims(step_p50_ms=3.2))


def _channel(numbers: Numbers, settings: Settings) -> Iterator[Figure]:
    alone, channel = numbers["alone"], numbers["channel"]
    yield from of_calls("kernels alone, one graph of the engine's process", alone, settings)
    yield from of_calls("device channel, one graph", channel, settings, Aims(None, None, 1.6, 2.5))
    rest = 1e3 * (channel["step_p50_ms"] - alone["step_p50_ms"]) / settings.layers
    stages = ", ".join(f"{name} {mean:.1f} us" for name, mean in numbers["stages_us"].items())
    yield Figure("device channel: a call less its kernels", rest, "us", 15, False, f"in the core: {stages}")
    yield from of_calls("the same on a closed channel", numbers["closed"], settings)
    idle = f"idle for {settings.idle_seconds:g} s"
    yield Figure("open, idle channel: core's processor", numbers["idle_percent"], "% of a core", 3, False, idle)
    yield Figure("open, idle channel: first call", numbers["first_call_ms"], "ms", 1, False, idle)


def _two_gpus(numbers: Numbers, settings: Settings) -> Iterator[Figure]:
    name = "device channel, the engine on a GPU of its own"
    yield from of_calls(name, numbers["channel"], settings, Aims(step_p50_ms=1.8))


def _ranks_on_channels(numbers: Numbers, settings: Settings) -> Iterator[Figure]:
    name = f"{RANKS} ranks of one head, device channels, a barrier on the device a layer"
    yield from of_calls(name, numbers, settings, Aims(step_p50_ms=2.4))


def _prefill(numbers: Numbers, settings: Settings) -> Iterator[Figure]:
    alone = numbers["kernels alone"]
    for way, target in {"ring": None, "memfd": 1.2, "cuda_fd": 1.1}.items():
        if way in numbers:
            basis = f"{numbers[way] / 1e3:,.2f} ms, the kernels {alone / 1e3:,.2f} ms"
            name = f"prefill of {settings.queries:,} queries at {settings.prompt:,}, {way}: to its kernels"
            yield Figure(name, numbers[way] / alone, "x", target, False, basis)


ROWS = {
    "python": Row(in_python("python_clients"), _python, 40),
    "c": Row(in_c(FIRST_ID), _ring_in_c, 15),
    "region": Row(in_c(FIRST_ID, region=True), _region, 15),
    "ranks": Row(in_c(FIRST_ID, clients=RANKS, ranks=RANKS), _ranks_on_rings, 20),
    "fleet": Row(in_c(FLEET_FIRST_ID, clients=0), _fleet, 30),
    "channel": Row(in_python("channel"), _channel, 60, gpus=1, without_mps=True),
    "channel-ranks": Row(in_python("ranks"), _ranks_on_channels, 45, gpus=1),
    "prefill": Row(in_python("prefill"), _prefill, 40, without_mps=True),
    "two-gpus": Row(in_python("channel", engine_device="cuda:1"), _two_gpus, 45, gpus=2),
}
"""In the order in which they run."""
