"""Fixtures that every test may use, what is done before the first, and the count of flips at the end of a run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from support.kernel_cases import TALLY
from support.serving import Serving, serve

if not torch.cuda.is_available():
    # Read when Triton is imported, and for all of the process: without a GPU its kernels run in the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
# What it does anyway; left unsaid, it warns of another default to come.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


# An example takes as long as a busy machine makes it take, and so does making it up; a test has its own bound.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


@pytest.fixture
def random() -> np.random.Generator:
    """Numbers that are the same in every run."""
    return np.random.default_rng(13)


@pytest.fixture(scope="session")
def server() -> Iterator[Serving]:
    """One small CPU server for all tests; each of them uses a tenant or sequence ids of its own."""
    with serve() as serving:
        yield serving


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> None:
    """Tests run the collector, each of some files several times: what was there before would only take its time."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many blocks rounding exchanged."""
    if TALLY.rows:
        terminalreporter.write_line(
            f"kernels: {TALLY.rows} selections against the float64 reference, {TALLY.flips} flips within its bound"
        )
