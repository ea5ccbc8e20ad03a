"""One load test for each of several values of a setting, and their figures beside each other."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from blockdex.loadtest.result import PERCENTILES
from blockdex.loadtest.settings import Settings

_KINDS: dict[str, type[int] | type[float]] = {"clients": int, "rate": float}
_FIGURES = ("calls_per_second", "tokens_per_second", "queries_per_second")


class SweepError(ValueError):
    """Values that cannot be swept over: one line that says why."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Values of one setting.

    Attributes:
        setting: its name.
        values: at least two, in the order in which they are run.
    """

    setting: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """Reads `clients=1,2,4,8` or `rate=100,200`.

        Raises:
            SweepError: the text is something else.
        """
        setting, _, words = text.partition("=")
        if setting not in _KINDS:
            raise SweepError(f"--sweep {text!r}: must be like clients=1,2,4,8 or rate=100,200")
        try:
            values = tuple(_KINDS[setting](word) for word in words.split(","))
        except ValueError as error:
            raise SweepError(f"--sweep {text!r}: {error}") from None
        if len(set(values)) < max(len(values), 2) or not all(0 < value < math.inf for value in values):
            raise SweepError(f"--sweep {text!r}: must be two or more different numbers above 0")
        return cls(setting, values)

    def over(self, settings: Settings) -> tuple[Settings, ...]:
        """The settings of each run; of fewer clients than processes, each has a process."""
        changes: list[dict[str, Any]] = [{self.setting: value} for value in self.values]
        points = (dataclasses.replace(settings, **change) for change in changes)
        return tuple(dataclasses.replace(point, processes=min(point.processes, point.clients)) for point in points)

    def names(self) -> Iterator[str]:
        """What each run's files are called by: `clients-4`."""
        return (f"{self.setting}-{value:g}" for value in self.values)


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line of CSV for each result; durations in seconds."""
    lines = [_line(result) for result in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _line(result: dict[str, Any]) -> dict[str, Any]:
    settings, every = result["settings"], result["all"]
    return {
        **{name: settings[name] for name in ("scenario", "clients", "processes", "rate", "transport")},
        **{name: result["throughput"][name] for name in _FIGURES},
        **{f"{name}_seconds": every["latency_seconds"][name] for name in (*PERCENTILES, "max")},
        **{name: every[name] for name in ("calls", "errors")},
        "unsent": result["unsent"],
        "seconds_without_an_answer": result["outages"]["seconds"],
        "answers_checked": result["checks"]["checked"],
        "wrong_answers": len(result["checks"]["wrong"]),
        "exit_status": result["exit_status"],
    }
