"""A figure of a benchmark, beside its target."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: of what.
        measured: the figure.
        unit: of it and of its target.
        target: what it is to reach; None on a CPU, which no target is for, and of what only explains another figure.
        at_least: whether more is better.
        basis: what it was made of.
    """

    name: str
    measured: float
    unit: str
    target: float | None
    at_least: bool
    basis: str

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target

    def row(self) -> dict[str, Any]:
        """The figure as a row of a result."""
        return asdict(self) | {"met": self.met}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A figure as a row of a table: what it is, measured, target, whether that is met, what it was made of."""
    figure = Figure(**{name: value for name, value in row.items() if name != "met"})
    target = "" if figure.target is None else f"{'>=' if figure.at_least else '<='} {figure.target:,g} {figure.unit}"
    met = {True: "yes", False: "no", None: ""}[figure.met]
    return figure.name, f"{figure.measured:,.2f} {figure.unit}", target, met, figure.basis
