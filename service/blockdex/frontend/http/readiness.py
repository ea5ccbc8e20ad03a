"""Whether the server takes requests, and why not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Readiness:
    """Changed by the process, read by `/readyz` and `/metrics`; all on one loop.

    Attributes:
        obstacle: why no request is taken; empty while they are.
    """

    obstacle: str = "starting"

    def compiling(self, done: int, total: int) -> None:
        """Kernels are compiled first."""
        self.obstacle = f"compiling kernels, {done} of {total}"

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self.obstacle
