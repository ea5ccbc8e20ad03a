"""Figures as people read them, alike on the screen and in the report."""

from __future__ import annotations

NONE = "-"

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def duration(seconds: float | None) -> str:
    """Three significant digits in the unit that fits: `12.3 ms`."""
    if seconds is None:
        return NONE
    for size, unit in _UNITS:
        if seconds >= size or unit == "µs":
            return f"{significant(seconds / size)} {unit}"
    return NONE


def significant(value: float) -> str:
    """Three significant digits, or the whole number where it has more: `1.23`, `12.3`, `1,234`."""
    if value == 0:
        return "0"
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    if abs(value) < 0.1:
        return f"{value:.3g}"
    return f"{value:,.{decimals}f}"


def counted(count: int, noun: str) -> str:
    """`1 client`, `1,200 clients`, `2 processes`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def share(value: float | None) -> str:
    """As per cent."""
    return NONE if value is None else f"{significant(100 * value)} %"


def figure(value: float | None, kind: str) -> str:
    """A figure of a kind: `seconds`, `share`, `per_second`, or a plain number."""
    if value is None:
        return NONE
    match kind:
        case "seconds":
            return duration(value)
        case "share":
            return share(value)
        case "per_second":
            return f"{significant(value)}/s"
    return f"{value:,.0f}" if float(value).is_integer() else significant(value)
