"""The core and devices that take no step, fail, hang or are given up."""

from __future__ import annotations

import time

import pytest

from blockdex import _native as native
from blockdex.contract.errors import BlockdexError, Code
from support import core_without_memory
from support.bare_core import (
    LENGTH,
    BareCore,
    check_answer,
)
from support.foreign_frontend import ForeignFrontend
from support.programs import run_module
from support.running_engine import TIMEOUT


def check_refused(frontend: ForeignFrontend, *tickets: int) -> None:
    """Checks that just these were answered, all with the fault."""
    frontend.read()
    assert sorted(frontend.told) == list(tickets)
    for told in frontend.told.values():
        assert isinstance(told.answer, BlockdexError)
        assert (told.answer.code, told.answer.reason, told.answer.message) == (Code.INTERNAL, "INTERNAL", "a fault")


def test_a_device_that_takes_no_step_while_another_is_on_its_way(device_core: BareCore) -> None:
    bare = device_core
    frontend, other = bare.open_client(), bare.open_client()
    frontend.send(bare.both(0, (1, LENGTH, 1)))
    bare.look()
    frontend.send(bare.both(0, (1, LENGTH + 1, 1)), first_ticket=1)
    other.send(bare.both(0, (2, LENGTH, 1)), bare.both(0, (2, LENGTH + 1, 1)))
    bare.device.error = 700
    with pytest.raises(RuntimeError, match="cuGraphLaunch failed: CUDA error 700"):
        bare.look()
    assert bare.core.in_flight == 2
    bare.abandon()
    check_refused(frontend, 0, 1)
    check_refused(other, 0, 1)
    assert bare.core.in_flight == 0
    bare.abandon()  # nothing is left
    check_refused(frontend, 0, 1)
    bare.device.begun.clear()
    # What comes is served as if nothing had been: the error is forgotten.
    request = bare.both(1, (1, LENGTH, 1))
    frontend.send(request, first_ticket=2)
    bare.look()
    bare.device.end()
    bare.look()
    frontend.read()
    check_answer(frontend, 2, request)


def test_a_step_in_python_that_fails(bare: BareCore) -> None:
    frontend = bare.open_client()
    frontend.send(bare.both(0, (1, LENGTH, 1)), bare.both(1, (1, LENGTH, 1)))
    bare.device.error = 3
    with pytest.raises(RuntimeError, match="error 3, made for this test"):
        bare.look()
    assert (bare.core.in_flight, bare.core.steps) == (1, 0)
    bare.abandon()
    check_refused(frontend, 0, 1)
    bare.device.error = 0
    request = bare.both(0, (2, LENGTH, 1))
    frontend.send(request, first_ticket=2)
    bare.look()
    bare.look()
    frontend.read()
    check_answer(frontend, 2, request)


def test_a_step_that_hangs_is_asked_after_and_given_up_with_those_behind_it(device_core: BareCore) -> None:
    bare = device_core
    frontend = bare.open_client()
    frontend.send(bare.both(0, (1, LENGTH, 1)))
    began = time.monotonic()
    assert bare.core.run(TIMEOUT) == native.LATE
    assert 0.001 <= time.monotonic() - began < 1
    assert began <= bare.core.launched <= time.monotonic()
    frontend.send(bare.both(0, (1, LENGTH + 1, 1)), first_ticket=1)
    launched = bare.core.launched
    asked = time.monotonic()
    for _ in range(5):
        assert bare.core.run(TIMEOUT) == native.LATE
    assert time.monotonic() - asked >= 0.004, "it is not asked after all the time"
    assert bare.core.in_flight == 2
    assert bare.core.launched == launched, "the oldest one's"
    bare.abandon()
    check_refused(frontend, 0, 1)


def test_nobody_is_answered_twice_where_no_memory_is_left() -> None:
    """In a process of its own, in which no memory was given back that could be had again."""
    run_module(core_without_memory.__name__)
