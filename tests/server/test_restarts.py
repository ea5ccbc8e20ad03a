"""Children that do not last: another one each time, after longer and longer pauses, and the end of that."""

from __future__ import annotations

import asyncio

import pytest

from blockdex.server import restarts
from blockdex.server.bootstrap import StartError
from blockdex.server.child_process import Child
from blockdex.server.restarts import MOST_SHORT_LIVES, Kept


async def never_starts() -> Child:
    raise StartError("device: it is lost")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(restarts, "_LONGEST_PAUSE_SECONDS", 0.002)


async def test_what_never_lasts_ends_the_restarts() -> None:
    counts = {"core": 0}
    kept = Kept("core", never_starts, lambda _: None, counts, gives_up=True)
    with pytest.raises(StartError, match=f"core: {MOST_SHORT_LIVES} in a row ended within 30 s of their start"):
        await asyncio.wait_for(kept.keep(), 10)
    assert counts == {"core": MOST_SHORT_LIVES - 1}


async def test_frontends_are_started_for_ever() -> None:
    counts = {"frontend": 0}
    keeping = asyncio.create_task(Kept("frontend", never_starts, lambda _: None, counts).keep())
    while counts["frontend"] < 3 * MOST_SHORT_LIVES:
        await asyncio.sleep(0.01)
        assert not keeping.done()
    keeping.cancel()
