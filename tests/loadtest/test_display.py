"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from blockdex.loadtest.display import Display
from blockdex.loadtest.fleet import Begins, Measured, Measuring
from blockdex.loadtest.histogram import Histogram
from blockdex.loadtest.jobs import Progress
from blockdex.loadtest.schedule import Window

LIVE = ("50.0 calls/s", "400 tokens/s", "p50 4.", "3 errors", "refused: [RESOURCE_EXHAUSTED]", "closing")
PLAIN = ("setting up\nwarming up\nmeasuring\nclosing\n",)


@pytest.mark.parametrize(("terminal", "expected"), [(True, LIVE), (False, PLAIN)])
def test_progress_is_seen(terminal: bool, expected: tuple[str, ...]) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    latencies = Histogram()
    for _ in range(100):
        latencies.observe(0.004)
    now = time.monotonic()
    with Display(console) as display:
        display.phase("setting up")
        display.see(Begins(Window(now, now, now + 60)))
        display.see(Measuring())
        display.see(Progress(latencies, errors=3, tokens=800, last_error="refused:\n  [RESOURCE_EXHAUSTED]"))
        display.see(Measured())
    assert isinstance(console.file, io.StringIO)
    seen = console.file.getvalue()
    for words in expected:
        assert words in seen
    assert not display.interrupted
