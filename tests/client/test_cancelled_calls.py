"""What cancelled calls of an asyncio client leave in its process."""

from __future__ import annotations

import pytest

from support.programs import run_module
from support.serving import Serving

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("transport", ["stream", "ring"])
def test_cancelled_calls_leave_nothing(server: Serving, transport: str) -> None:
    assert int(run_module("support.cancelled_calls", server.grpc_address, transport)) < 200


def test_grpc_still_keeps_something_of_a_cancelled_unary_call(server: Serving) -> None:
    """Once this fails, grpc.aio has been mended, and docs/transports.md need not warn any more."""
    assert 300 < int(run_module("support.cancelled_calls", server.grpc_address, "unary")) < 2000
