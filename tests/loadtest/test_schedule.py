"""When calls are meant to begin."""

from __future__ import annotations

import asyncio
import itertools
import time
from random import Random

import numpy as np
import pytest

from blockdex.loadtest.schedule import ClosedLoop, OpenLoop, Window, arrivals


def window(seconds: float) -> Window:
    now = time.monotonic()
    return Window(now, now, now + seconds)


def test_poisson_arrivals_have_the_rate_and_its_spread() -> None:
    moments = np.array(list(itertools.islice(arrivals(50, "poisson", 100.0, Random(1)), 20_000)))
    distances = np.diff(moments, prepend=100.0)
    assert distances.min() > 0
    assert distances.mean() == pytest.approx(1 / 50, rel=0.03)
    assert distances.std() == pytest.approx(1 / 50, rel=0.03)


def test_fixed_arrivals_are_equally_far_apart() -> None:
    moments = list(itertools.islice(arrivals(50, "fixed", 100.0, Random(1)), 1000))
    assert 100.0 <= moments[0] < 100.02
    assert np.diff(moments) == pytest.approx(np.full(999, 0.02))


def test_the_same_seed_gives_the_same_arrivals() -> None:
    first, again, other = (list(itertools.islice(arrivals(9, "poisson", 0, Random(n)), 50)) for n in (1, 1, 2))
    assert first == again != other


@pytest.mark.alone
async def test_an_arrival_is_given_at_its_moment_or_as_soon_as_a_client_is_free() -> None:
    span = window(5)
    moments = [span.begin + offset for offset in (0.02, 0.03, 0.04)]
    loop = OpenLoop(span, iter([*moments, span.end + 1]))
    assert await loop.turn() == moments[0]
    assert time.monotonic() >= moments[0]
    await asyncio.sleep(0.1)
    late = time.monotonic()
    assert [await loop.turn(), await loop.turn()] == moments[1:]
    assert time.monotonic() - late < 0.05, "arrivals that are due were waited for"


async def test_arrivals_that_nobody_took_are_unsent() -> None:
    span = window(0.1)
    loop = OpenLoop(span, arrivals(100, "fixed", span.begin, Random(1)))
    taken = 0
    while await loop.turn() is not None:
        taken += 1
        await asyncio.sleep(0.03)
    assert 1 <= taken <= 4  # fewer where the machine was busy with other things
    assert taken + loop.unsent() == 10


async def test_the_end_is_not_told_before_it_has_come() -> None:
    span = window(0.15)
    assert await OpenLoop(span, iter([span.end + 1])).turn() is None
    assert span.over()


async def test_stopping_ends_a_wait_soon() -> None:
    span = window(60)
    loop = OpenLoop(span, iter([span.end - 1]))
    turn = asyncio.create_task(loop.turn())
    await asyncio.sleep(0.01)
    span.stop()
    assert await asyncio.wait_for(turn, 1) is None
    assert loop.unsent() == 0


async def test_a_closed_loop_gives_turns_until_the_end() -> None:
    loop = ClosedLoop(span := window(0.05))
    moment = await loop.turn()
    assert moment is not None
    assert moment == pytest.approx(time.monotonic(), abs=0.02)
    await asyncio.sleep(0.06)
    assert await loop.turn() is None
    assert span.over()


def test_a_stopped_window_is_not_set_again() -> None:
    span = Window(float("inf"), float("inf"), float("inf"))
    span.stop()
    span.set(window(60))
    assert span.over()


def test_a_window_names_the_phase_of_a_moment() -> None:
    span = Window(1.0, 2.0, 3.0)
    assert [span.phase_of(moment) for moment in (1.5, 2.0, 2.99, 3.0)] == ["warm_up", "measured", "measured", "after"]
    assert [span.measures(moment) for moment in (1.99, 2.0, 3.0)] == [False, True, False]
