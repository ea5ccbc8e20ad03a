"""What the core counts of its steps and of its requests' time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from blockdex.contract.errors import Code
from support.bare_core import (
    LENGTH,
    SECONDS_BOUNDS,
    BareCore,
)


def test_what_is_counted(device_core: BareCore) -> None:
    bare = device_core
    frontend = bare.open_client()
    frontend.send(
        bare.both(0, (1, LENGTH, 1)), bare.both(0, (2, LENGTH, 2), (3, LENGTH, 1)), bare.both(1, (1, LENGTH, 4))
    )
    bare.look()
    time.sleep(0.01)
    frontend.send(bare.both(2, (1, LENGTH, 1)), first_ticket=3)
    bare.look()
    time.sleep(0.03)
    bare.device.end()
    bare.look()
    time.sleep(0.02)
    bare.device.end()
    bare.look()
    counted = bare.counted
    assert (counted["steps"], counted["append_tokens"], counted["decode_tokens"]) == (2, 9, 9)
    assert counted["step_requests"] == counted["append_requests"] == counted["decode_requests"] == ([1, 0, 1, 0], 4.0)
    assert counted["append_sizes"] == counted["decode_sizes"] == ([1, 0, 1, 0], 9.0)
    assert 0.04 + 0.05 <= counted["device_seconds"] < 1
    assert 0.06 <= counted["device_busy_seconds"] < counted["device_seconds"] - 0.025, "for 0.03 s both were there"
    frontend.read()
    told = np.array([frontend.told[ticket].numbers[-4:] for ticket in range(4)])
    assert (told[:, 2] >= [0.04, 0.04, 0.04, 0.05]).all() and (told > 0).all()
    for (counts, total), seconds in zip(counted["stages"][4:8], told.T, strict=True):
        assert total == pytest.approx(seconds.sum())
        assert counts == np.bincount(np.searchsorted(SECONDS_BOUNDS, seconds), minlength=3).tolist()


def test_a_bound_belongs_to_the_bucket_below_it(bare: BareCore) -> None:
    frontend = bare.open_client()
    for ticket, count in enumerate((1, 2, 3)):
        frontend.send(bare.both(0, *[(sequence, LENGTH, 1) for sequence in range(1, count + 1)]), first_ticket=ticket)
        bare.lengths[:] = LENGTH
        bare.look()
    assert bare.counted["decode_sizes"] == ([1, 1, 1, 0], 6.0)


def test_a_step_that_is_given_up_was_on_the_device(device_core: BareCore) -> None:
    bare = device_core
    frontend = bare.open_client()
    frontend.send(bare.both(0, (1, LENGTH, 1)))
    bare.look()
    time.sleep(0.02)
    bare.abandon()
    busy = bare.counted["device_busy_seconds"]
    assert 0.02 <= busy < 1
    bare.abandon()
    time.sleep(0.02)
    bare.abandon()
    assert bare.counted["device_busy_seconds"] == busy


def test_a_clock_stands_still_while_steps_are_on_their_way(device_core: BareCore) -> None:
    """So that it and what was busy with steps are the time that has passed, whenever one asks."""
    bare = device_core
    frontend = bare.open_client()
    began = bare.core.time_beside
    assert bare.core.time_beside - began == pytest.approx(0, abs=1) and time.monotonic() - began < 1
    time.sleep(0.01)
    frontend.send(bare.both(0, (1, LENGTH, 1)))
    bare.look()
    stopped = bare.core.time_beside
    assert stopped - began >= 0.01
    time.sleep(0.02)
    frontend.send(bare.both(1, (1, LENGTH, 1)), first_ticket=1)
    bare.look()
    bare.device.end()
    bare.look()
    assert bare.core.time_beside == stopped, "one is still there"
    bare.device.end()
    before = time.monotonic()
    bare.look()
    busy = bare.counted["device_busy_seconds"]
    assert busy >= 0.02
    assert before <= bare.core.time_beside + busy <= time.monotonic()


def test_a_request_from_the_future_has_waited_for_no_time(bare: BareCore) -> None:
    frontend = bare.open_client()
    frontend.write(frontend.lay(bare.both(0, (1, LENGTH, 1)), 0)._replace(received=2**62))
    bare.look()
    bare.look()
    frontend.read()
    assert frontend.told[0].numbers.queue_seconds == 0
    assert bare.counted["stages"][4][1] == 0


def test_times_that_no_clock_has_shown(bare: BareCore) -> None:
    """One that is late is dropped, one that is wrong refused; neither has waited for longer than the clock runs."""
    frontend = bare.open_client()
    late = frontend.lay(bare.both(0, (1, LENGTH, 1)), 0)._replace(received=-(2**63), deadline=-(2**63))
    wrong = frontend.lay(bare.both(77, (1, LENGTH, 1)), 1)._replace(received=-(2**63))
    frontend.write(late, wrong)
    bare.look()
    frontend.read()
    now = time.monotonic()
    answers = [frontend.told[ticket] for ticket in (0, 1)]
    assert [answer.numbers.code for answer in answers] == [Code.DEADLINE_EXCEEDED, Code.INVALID_ARGUMENT]
    assert all(0 <= answer.numbers.queue_seconds <= now for answer in answers)
    assert str(answers[0].answer).startswith("timeout: 0.000 s were allowed")
