"""Service level objectives: `p99<20ms`, `errors<0.1%`, `rate>100/s`, each held against a result."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blockdex.loadtest.result import PERCENTILES

_GRAMMAR = re.compile(r"(?:(?P<operation>\w+)\.)?(?P<quantity>[a-z]+[\d.]*)(?P<relation><=|>=|<|>)(?P<limit>.+)")
_LIMIT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(us|ms|s|%|/s)?")
_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_UNITS = {
    "seconds": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
    "share": {"%": 0.01, "": 1.0},
    "per_second": {"/s": 1.0, "": 1.0},
}
_KINDS = {
    **dict.fromkeys((*PERCENTILES, "mean", "max"), "seconds"),
    **dict.fromkeys(("errors", "unsent"), "share"),
    **dict.fromkeys(("rate", "tokens", "queries"), "per_second"),
}
_OF_OPERATIONS = (*PERCENTILES, "mean", "max", "errors")


class ObjectiveError(ValueError):
    """An objective that cannot be read: one line that says why."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One objective.

    Attributes:
        text: as it was given.
        operation: the operation that it is about; empty for all together.
        quantity: what is held against the limit.
        relation: `<`, `<=`, `>` or `>=`.
        limit: in seconds, as a share, or per second.
    """

    text: str
    operation: str
    quantity: str
    relation: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Reads `[OPERATION.]QUANTITY RELATION LIMIT UNIT`, with or without spaces.

        Raises:
            ObjectiveError: the text is something else.
        """
        match = _GRAMMAR.fullmatch("".join(text.split()))
        if match is None:
            raise ObjectiveError(f"--slo {text!r}: must be like p99<20ms, errors<0.1%, rate>100/s or decode.p50<5ms")
        operation, quantity, relation = match["operation"] or "", match["quantity"], match["relation"]
        if quantity not in _KINDS:
            raise ObjectiveError(f"--slo {text!r}: {quantity!r} is none of {', '.join(_KINDS)}")
        if operation and quantity not in _OF_OPERATIONS:
            raise ObjectiveError(f"--slo {text!r}: {quantity} is of all calls together, not of {operation}")
        units = _UNITS[_KINDS[quantity]]
        limit = _LIMIT.fullmatch(match["limit"])
        if limit is None or (limit[2] or "") not in units:
            words = ", ".join(unit or "no unit" for unit in units)
            raise ObjectiveError(f"--slo {text!r}: {quantity} takes a number with {words}, got {match['limit']!r}")
        return cls(text, operation, quantity, relation, float(limit[1]) * units[limit[2] or ""])

    def judge(self, result: dict[str, Any]) -> dict[str, Any]:
        """The objective beside what was measured; without a measurement it is missed."""
        measured = self._measured(result)
        met = measured is not None and _RELATIONS[self.relation](measured, self.limit)
        kind = _KINDS[self.quantity]
        return {"slo": self.text, "kind": kind, "limit": self.limit, "measured": measured, "met": met}

    def _measured(self, result: dict[str, Any]) -> float | None:
        if self.operation:
            part = result["operations"].get(self.operation)
            if part is None:
                return None
        else:
            part = result["all"]
        if self.quantity == "errors":
            return float(part["errors"] / part["calls"]) if part["calls"] else None
        if self.quantity == "unsent":
            arrivals = part["calls"] + result["unsent"]
            return float(result["unsent"] / arrivals) if arrivals else None
        if _KINDS[self.quantity] == "per_second":
            name = "calls" if self.quantity == "rate" else self.quantity
            value = result["throughput"][f"{name}_per_second"]
        else:
            value = part["latency_seconds"][self.quantity]
        return None if value is None else float(value)
