"""How long a call takes on a device, beside others of its kind: medians of interleaved replays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Mode = Literal["graph", "eager", "host"]
"""`graph`: CUDA events round the replay of a graph that holds the calls. `eager`: events round the calls themselves,
the host's work included wherever the device waits for it. `host`: the processor's clock, for a device that is one."""

Call = Callable[[], object]

_WARM_UP = 3
_HEAD_START_CYCLES = 20_000_000  # About ten milliseconds, in which the host gets ahead with its launches.


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: each replay's time divided by its calls, of that the median and the extremes."""

    median_us: float
    least_us: float
    most_us: float


def time_calls(versions: Mapping[str, Sequence[Call]], mode: Mode, replays: int) -> dict[str, Timing]:
    """Times versions of the same work, one replay of each in turn, so that whatever else goes on strikes all alike.

    Args:
        versions: of each, the calls of one replay: the same work on different inputs, so that no call finds its own in
            a cache. Every call is made once before, which compiles what it needs.
        mode: what is timed, and by which clock.
        replays: of each version.
    """
    loops = {name: _loop(calls, mode) for name, calls in versions.items()}
    for _ in range(_WARM_UP):
        for loop in loops.values():
            loop()
    samples = _host_samples(loops, replays) if mode == "host" else _device_samples(loops, replays, mode)
    return {
        name: Timing(*(pick(samples[name]) / len(calls) for pick in (statistics.median, min, max)))
        for name, calls in versions.items()
    }


def _loop(calls: Sequence[Call], mode: Mode) -> Callable[[], None]:
    """One replay of the calls, each of which has been made before."""

    def loop() -> None:
        for call in calls:
            call()

    loop()
    if mode != "graph":
        return loop
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()
    return graph.replay


def _host_samples(loops: Mapping[str, Callable[[], None]], replays: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(replays):
        for name, loop in loops.items():
            began = time.perf_counter()
            loop()
            samples[name].append((time.perf_counter() - began) * 1e6)
    return samples


def _device_samples(loops: Mapping[str, Callable[[], None]], replays: int, mode: Mode) -> dict[str, list[float]]:
    """Microseconds of each replay. Nothing is waited for before the end: a launch is not to cost an idle device."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in loops}
    torch.cuda.synchronize()
    if mode == "graph":
        torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
    for _ in range(replays):
        for name, loop in loops.items():
            start, end = _event(), _event()
            start.record()
            loop()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) * 1e3 for start, end in pairs] for name, pairs in events.items()}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
