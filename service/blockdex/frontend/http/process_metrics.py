"""What the operating system says of each process of the server: `process_*` of Prometheus's client, and which it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import Metric

Processes = Callable[[], Mapping[str, int]]
"""The processes that run now: their ids, by what they are."""


class ProcessesCollector:
    """CPU time, memory, open files and start time of every process, read from /proc when they are asked for."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def collect(self) -> Iterator[Metric]:
        """Each family once, with a sample for each process; of one that has just ended, none."""
        families: dict[str, Metric] = {}
        for process, pid in self._processes().items():
            for family in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                told = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    told.add_sample(sample.name, {"process": process}, sample.value)
        yield from families.values()
