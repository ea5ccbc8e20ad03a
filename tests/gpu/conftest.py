"""What the tests on a GPU share: they are skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support import triton_device

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def generator() -> torch.Generator:
    """The same numbers in every run."""
    return torch.Generator().manual_seed(20261124)


@pytest.fixture(params=["portable", "hopper"])
def prefill_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel scores the prefills of `backend_for`."""
    monkeypatch.setattr(triton_device, "PREFILL_KERNEL", request.param)
    return str(request.param)
