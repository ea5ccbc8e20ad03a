"""A result beside an older one: what differs in how they were made, then the figures and their ratios."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockdex.loadtest.result import FORMAT, PERCENTILES

_CONDITIONS = (
    ("settings", None),
    ("shapes", ("scale", "layers", "chunk")),
    ("server", ("version", "device", "kernels", "spec", "limits")),
    ("environment", None),
)


class ComparisonError(ValueError):
    """A file that is no result of a load test: one line that says why."""


def read_result(path: Path) -> dict[str, Any]:
    """A result that was written before.

    Raises:
        ComparisonError: it cannot be read, or is something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ComparisonError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ComparisonError(f"{path}: not JSON: {error}") from error
    written = result.get("format") if isinstance(result, dict) else None
    if written != FORMAT:
        raise ComparisonError(f"{path}: must be a load test's result of format {FORMAT}, got {written!r}")
    return dict(result)


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What differs, and, for the same scenario, the figures of both with new / old as ratio.

    Figures of runs that were made differently are given too, under the list of what differs: whether they can be
    compared is for the reader to say. Those of different scenarios cannot, and are left out.
    """
    differences = list(_differences(old, new))
    alike = old["settings"]["scenario"] == new["settings"]["scenario"]
    return {
        "old_date": old["date"],
        "differences": differences,
        "comparable": alike,
        "figures": list(_figures(old, new)) if alike else [],
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part, chosen in _CONDITIONS:
        names = chosen or sorted(old[part].keys() | new[part].keys())
        for name in names:
            before, after = old[part].get(name), new[part].get(name)
            if before != after:
                yield {"what": f"{part}.{name}", "old": before, "new": after}


def _figures(old: dict[str, Any], new: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in ("calls_per_second", "tokens_per_second", "queries_per_second"):
        words = name.removesuffix("_per_second")
        yield _figure(words, "per_second", old["throughput"][name], new["throughput"][name])
    yield _figure("errors", "count", old["all"]["errors"], new["all"]["errors"])
    yield _figure("unsent", "count", old["unsent"], new["unsent"])
    yield _figure("set-up errors", "count", old["set_up_errors"], new["set_up_errors"])
    yield _figure("without an answer", "seconds", old["outages"]["seconds"], new["outages"]["seconds"])
    for operation in sorted(old["operations"].keys() & new["operations"].keys()):
        before, after = (result["operations"][operation]["latency_seconds"] for result in (old, new))
        for percentile in (*PERCENTILES, "max"):
            yield _figure(f"{operation} {percentile}", "seconds", before[percentile], after[percentile])


def _figure(name: str, kind: str, old: float | None, new: float | None) -> dict[str, Any]:
    ratio = new / old if old and new is not None else None
    return {"figure": name, "kind": kind, "old": old, "new": new, "ratio": ratio}
