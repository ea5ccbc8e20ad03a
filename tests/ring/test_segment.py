"""The shared memory of a link: what it is made of, and what is no such memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from blockdex.ring.layout import HEADER_BYTES
from blockdex.ring.segment import RingError, Segment, Sizes

SLOTS = 4


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(Sizes(SLOTS, request_bytes=1 << 16, answer_bytes=1 << 16), epoch=99)
    yield segment
    os.close(segment.fd)


def test_a_segment_is_what_it_was_made(segment: Segment) -> None:
    again = Segment(os.dup(segment.fd))
    os.close(again.fd)
    assert (again.epoch, again.request_slots, again.request_arena_bytes) == (99, SLOTS, 1 << 16)
    again.memory[HEADER_BYTES] = 7
    assert segment.memory[HEADER_BYTES] == 7
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 0)


@pytest.mark.parametrize("offset", [0, 8, 12, 80])
def test_memory_of_something_else_is_refused(segment: Segment, offset: int) -> None:
    segment.memory[offset] ^= 1
    with pytest.raises(RingError, match="segment: expected magic"):
        Segment(segment.fd)


def test_a_file_that_is_cut_off_is_refused() -> None:
    fd = os.memfd_create("cut")
    try:
        for size in (0, 8, HEADER_BYTES, HEADER_BYTES + 1):
            os.ftruncate(fd, size)
            with pytest.raises(RingError):
                Segment(fd)
    finally:
        os.close(fd)
