"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from serving import Serving, serve

if not torch.cuda.is_available():
    # Read when Triton is imported, and for all of the process: without a GPU its kernels run in the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
# What it does anyway; left unsaid, it warns of another default to come.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture(scope="session")
def server() -> Iterator[Serving]:
    """One small CPU server for all tests; each of them uses a tenant or sequence ids of its own."""
    with serve() as serving:
        yield serving
