"""A minute of hostile input; `python -m fuzz` in `tests` has more of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import guided, live, ring, wire

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
_MAY_GROW_BYTES = 256 << 20
"""Of private memory of all processes; what tenants open and never close, tables of pools too, is part of it."""


def test_the_wire_reads_whatever_comes(tmp_path: Path) -> None:
    assert wire.fuzz(tmp_path, 10) > 100_000
    reached = wire.lines_reached(tmp_path)
    print(reached)
    assert len(reached) == 2
    assert min(reached.values()) > 70


def test_the_core_admits_whatever_comes(tmp_path: Path) -> None:
    count, reached, edges = guided.fuzz(tmp_path, 15)
    print(count, reached, edges)
    assert count > 1000
    assert reached > 600


def test_slots_of_one_tenant_harm_no_other() -> None:
    slots = ring.run(10_000, seed=1)
    print(slots)
    assert slots.broken > 100
    assert slots.outcomes[0] > 100, "some are good requests"
    assert slots.compared > 1000


def test_a_live_server_goes_on() -> None:
    report = live.run(10_000, seed=1, seconds=20)
    print({name: (door.inputs, dict(door.outcomes)) for name, door in report.doors.items()}, report.memory)
    assert not report.wrong
    assert report.answers > 100
    assert all(door.inputs > 500 for door in report.doors.values())
    assert report.memory[1] - report.memory[0] < _MAY_GROW_BYTES
