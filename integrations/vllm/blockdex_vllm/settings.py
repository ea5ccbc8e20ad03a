"""What may be set, in vLLM's `--additional-config '{"blockdex": {...}}'`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Settings:
    """How the plugin behaves.

    Attributes:
        verify: share of the calls of the host, 0 to 1, whose answers are compared with vLLM's own kernels.

    Raises:
        ValueError: a value is out of bounds.
    """

    verify: float = 0.0

    def __post_init__(self) -> None:
        number = isinstance(self.verify, int | float) and not isinstance(self.verify, bool)
        if not (number and 0 <= self.verify <= 1):
            raise ValueError(f"blockdex.verify must be a number from 0 to 1, got {self.verify!r}")

    @classmethod
    def from_config(cls, additional_config: Any) -> Settings:
        """Those of vLLM's `additional_config`; the defaults where it has none.

        Raises:
            ValueError: a name is unknown or a value out of bounds.
        """
        given = additional_config.get("blockdex", {}) if isinstance(additional_config, dict) else {}
        known = {field.name for field in fields(cls)}
        if not isinstance(given, dict) or set(given) - known:
            raise ValueError(f"blockdex: may hold {', '.join(sorted(known))}, got {given!r}")
        return cls(**given)
