"""Forks of a process that has clients: it goes on as before, and its children are told at once that they have none."""

from __future__ import annotations

import pytest

from support.programs import run_module
from support.serving import Serving

PARENTS = ["stream", "unary", "ring", "async-stream", "async-unary", "async-ring"]


@pytest.mark.parametrize("calling", [0, 2], ids=["idle", "busy"])
@pytest.mark.parametrize("forks", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parent", PARENTS)
def test_a_forked_process_has_no_client(server: Serving, parent: str, forks: int, calling: int) -> None:
    run_module("support.forking_parent", server.grpc_address, parent, str(forks), str(calling), seconds=30 + 2 * forks)
