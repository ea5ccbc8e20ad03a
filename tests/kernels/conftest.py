"""What the kernel tests share: a seeded generator."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    """The same numbers in every run."""
    return torch.Generator().manual_seed(20261123)
