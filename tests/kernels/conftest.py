"""What the kernel tests share: a seeded generator, and the count of flips at the end of a run."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import TALLY


@pytest.fixture
def generator() -> torch.Generator:
    """The same numbers in every run."""
    return torch.Generator().manual_seed(20261123)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many blocks rounding exchanged."""
    if TALLY.rows:
        terminalreporter.write_line(
            f"kernels: {TALLY.rows} selections against the float64 reference, {TALLY.flips} flips within its bound"
        )
