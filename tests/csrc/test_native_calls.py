"""The compiled module's private calls: whatever they are called with, the process lives."""

from __future__ import annotations

import pytest

from blockdex import _native
from support import native_calls
from support.programs import run_module


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 9))])
def test_no_argument_ends_the_process(seed: int) -> None:
    run_module(native_calls.__name__, str(seed), seconds=100)


def test_every_call_is_in_the_stub() -> None:
    """From which arguments are made."""
    known = native_calls.signatures()
    with native_calls.made() as made:
        for of in (_native, made.line, made.core, made.link, made.connection, made.maker, made.request):
            assert {name for name, _ in native_calls.callables(of)} <= known.keys() | {
                "TokenRequest"
            }  # which has no constructor
