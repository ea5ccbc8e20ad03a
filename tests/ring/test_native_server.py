"""The engine's end of a link in C: room for answers, round and round, and answers that wait for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blockdex import _native as native
from blockdex.ring.handshake import new_link
from blockdex.ring.layout import AT, SLOT_BYTES, aligned
from blockdex.ring.segment import Sizes
from support.foreign_frontend import ForeignFrontend

ARENA, SLOTS = 1024, 64


@contextmanager
def link(slots: int = SLOTS, arena: int = ARENA) -> Iterator[tuple[native.ServerLink, ForeignFrontend]]:
    engine, client = new_link(Sizes(slots, request_bytes=1 << 12, answer_bytes=arena), epoch=1)
    frontend = ForeignFrontend(client)
    try:
        yield native.ServerLink(engine.segment, engine.client_bell, engine.engine_bell), frontend
    finally:
        frontend.close()
        engine.close()


def test_room_that_nobody_uses_is_taken_from_the_front_again() -> None:
    with link() as (line, frontend):
        counters = frontend.handles.segment.counters
        for number in range(40):
            place = line.claim(100)
            assert place is not None
            slot, offset, end = place
            assert slot == frontend.handles.segment.answer_slots_offset + number % SLOTS * SLOT_BYTES
            assert (offset, end % ARENA) == (0, 128)
            counters[AT["answer_bytes_freed"] // 8] = end
            counters[AT["answers_read"] // 8] = number + 1


def test_what_was_passed_over_is_free() -> None:
    """One answer at the front, which is not read yet, takes no more room than it needs."""
    with link() as (line, frontend):
        first = line.claim(100)
        assert first is not None
        frontend.handles.segment.counters[AT["answer_bytes_freed"] // 8] = first[2]
        offsets = [place[1] for _ in range(ARENA // 128) if (place := line.claim(100))]
        assert offsets == list(range(0, ARENA, 128))
        assert line.claim(1) is None


@given(st.lists(st.tuples(st.booleans(), st.integers(0, ARENA // 2), st.integers(0, 100)), max_size=60))
@example([(False, ARENA // 2, 0), (False, ARENA // 2, 0), (False, 64, 0)])
@example([(False, 448, 0), (False, 448, 0), (True, 0, 0), (False, 64, 0), (False, 448, 0)])
def test_no_answer_is_written_where_one_is_still_read(steps: list[tuple[bool, int, int]]) -> None:
    with link() as (line, frontend):
        counters = frontend.handles.segment.counters
        extents: dict[int, tuple[int, int]] = {}  # offset and size of what is read still, by the position of its end
        claimed = 0
        for give_back, size, which in steps:
            if give_back and extents:
                for end in sorted(extents)[: 1 + which % len(extents)]:
                    counters[AT["answer_bytes_freed"] // 8] = end
                    del extents[end]
                continue
            place = line.claim(size)
            if place is None:
                assert extents, "an empty arena has room"
                continue
            claimed += 1
            counters[AT["answers_read"] // 8] = claimed  # slots are no matter here
            _, offset, end = place
            if not size:
                assert (offset, end) == (0, 0)
                continue
            assert offset % 64 == 0 and offset + aligned(size) <= ARENA
            for start, length in extents.values():
                assert offset + aligned(size) <= start or start + length <= offset, "it lies where another one is"
            extents[end] = (offset, aligned(size))
        used = sum(size for _, size in extents.values())
        if not extents:
            assert line.claim(line.longest) is not None
        assert used <= ARENA


def test_all_of_the_room_is_used() -> None:
    with link() as (line, frontend):
        counters = frontend.handles.segment.counters
        for quarter in range(4):
            assert line.claim(ARENA // 4) is not None, quarter
        assert line.claim(1) is None
        counters[AT["answer_bytes_freed"] // 8] = ARENA // 4
        place = line.claim(ARENA // 4)
        assert place is not None and place[1:] == (0, ARENA + ARENA // 4)
        assert line.claim(1) is None


@pytest.mark.parametrize("freed", [64, 1 << 40, 2**64 - 2 * ARENA])
def test_room_that_was_never_taken_is_not_given_back(freed: int) -> None:
    """Who says so harms itself: it gets nothing."""
    with link() as (line, frontend):
        frontend.handles.segment.counters[AT["answer_bytes_freed"] // 8] = freed
        assert line.claim(64) is None


def test_more_answers_read_than_written() -> None:
    with link() as (line, frontend):
        frontend.handles.segment.counters[AT["answers_read"] // 8] = 1
        assert line.claim(0) is None


def test_a_slot_for_each_answer_and_no_more() -> None:
    with link(slots=4) as (line, frontend):
        counters, begin = frontend.handles.segment.counters, frontend.handles.segment.answer_slots_offset
        places = [line.claim(0) for _ in range(5)]
        assert [place and place[0] for place in places] == [*(begin + number * SLOT_BYTES for number in range(4)), None]
        assert counters[AT["answers_written"] // 8] == 0
        line.publish()
        assert counters[AT["answers_written"] // 8] == 4
        counters[AT["answers_read"] // 8] = 1
        place = line.claim(0)
        assert place is not None and place[0] == begin


def test_the_bell_is_rung_for_who_sleeps_when_there_is_something_new() -> None:
    with link() as (line, frontend):
        flags, bell = frontend.handles.segment.flags, frontend.handles.client_bell
        flags[AT["client_sleeps"] // 4] = 1
        line.publish()
        assert flags[AT["client_sleeps"] // 4] == 1, "nothing was written"
        line.claim(0)
        line.publish()
        assert (flags[AT["client_sleeps"] // 4], os.read(bell, 8)) == (0, b"\0")
        flags[AT["client_sleeps"] // 4] = 1
        line.publish()
        assert flags[AT["client_sleeps"] // 4] == 1, "nothing was written since"
        flags[AT["client_sleeps"] // 4] = 0
        line.claim(0)
        line.publish()
        with pytest.raises(BlockingIOError):
            os.read(bell, 8)


@pytest.mark.parametrize("size", [ARENA + 1, 2**63, 2**64 - 63, 2**64 - 1])
def test_more_than_all_of_the_room_is_never_had(size: int) -> None:
    with link() as (line, _):
        assert line.claim(size) is None
        assert line.claim(ARENA) is not None


def test_a_request_that_is_not_there_is_not_given_back() -> None:
    with link() as (line, frontend):
        with pytest.raises(ValueError, match="release: no request is there"):
            line.release()
        frontend.handles.segment.counters[AT["requests_written"] // 8] = SLOTS + 1
        with pytest.raises(ValueError, match="release: no request is there"):
            line.release()


@pytest.mark.parametrize(
    "changes",
    [
        {name: number}
        for name in ("request_slots_offset", "answer_slots_offset", "request_arena_offset", "answer_arena_offset")
        for number in (0, 4096 + 8, 2**40, 2**64 - 64)
    ]
    + [{name: number} for name in ("request_slots", "answer_slots") for number in (0, 3, 2**24, 2**56)]
    + [{name: number} for name in ("request_arena_bytes", "answer_arena_bytes") for number in (2**40, 2**64 - 64)]
    + [{"answer_arena_bytes": 0}, {"answer_arena_bytes": 65}, {"memory": bytearray(64)}],
    ids=str,
)
def test_a_segment_whose_parts_are_not_inside_it_is_refused(changes: dict[str, Any]) -> None:
    engine, client = new_link(Sizes(SLOTS, request_bytes=1 << 12, answer_bytes=ARENA), epoch=1)
    with closing(engine), closing(client):
        right = {name: getattr(engine.segment, name) for name in vars(engine.segment)}
        native.ServerLink(SimpleNamespace(**right), engine.client_bell, engine.engine_bell)
        with pytest.raises(ValueError, match="segment: its parts are not inside its memory"):
            native.ServerLink(SimpleNamespace(**right | changes), engine.client_bell, engine.engine_bell)


def test_a_link_gives_its_segment_back() -> None:
    engine, client = new_link(Sizes(SLOTS, request_bytes=1 << 12, answer_bytes=ARENA), epoch=1)
    with closing(engine), closing(client), memoryview(engine.segment.memory) as memory:
        right = {name: getattr(engine.segment, name) for name in vars(engine.segment)}
        line = native.ServerLink(SimpleNamespace(**right | {"memory": memory}), engine.client_bell, engine.engine_bell)
        with pytest.raises(BufferError):
            memory.release()
        del line
        memory.release()


def test_a_tenant_that_is_too_long_is_refused() -> None:
    engine, client = new_link(Sizes(SLOTS, request_bytes=1 << 12, answer_bytes=ARENA), epoch=1)
    with closing(engine), closing(client), pytest.raises(ValueError, match="tenant: at most 256 bytes, got 257"):
        native.ServerLink(engine.segment, engine.client_bell, engine.engine_bell, "t" * 257)


def test_what_is_no_segment_is_no_line() -> None:
    with pytest.raises(AttributeError):
        native.ServerLink(object(), 0, 0)
    with link() as (line, _), pytest.raises(TypeError, match="cannot be deleted"):
        del line.gone
