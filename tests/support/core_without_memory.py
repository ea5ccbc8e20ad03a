"""A process whose core has no memory left for an answer that has to wait: nobody is answered twice."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockdex.contract.errors import BlockdexError, Code
from blockdex.contract.messages import TokenAnswer
from blockdex.ring.segment import Sizes
from blockdex_kernels import IndexSpec
from support.bare_core import LENGTH, LONGEST, BareLane, bare_core
from support.foreign_frontend import ForeignFrontend

SPEC = IndexSpec(num_layers=1, num_index_heads=256, head_dim=128, block_size=8, topk=128)
ROWS = 96
"""Of 4 tokens: their answer takes 48 MiB, more than malloc ever has at hand."""


SIZE = 4 * ROWS * LONGEST * SPEC.num_index_heads * SPEC.topk
SIZES = Sizes(slots=8, request_bytes=1 << 26, answer_bytes=2 * SIZE)


@contextmanager
def no_memory() -> Iterator[None]:
    """Nothing large can be allocated, and somebody tries."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), limits[1]))
    try:
        with pytest.raises(MemoryError):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def abandon(bare: BareLane, text: bytes = b"INTERNALa fault") -> None:
    """Gives up what is on its way."""
    bare.core.abandon(int(Code.INTERNAL), len(b"INTERNAL"), text)


def fill(bare: BareLane, line: int) -> None:
    """Leaves no room for an answer, which nobody reads."""
    while bare.lines[line].claim(SIZE) is not None:
        pass


def check_told(door: ForeignFrontend, kind: type) -> None:
    """Checks that the one request was answered once, in this way."""
    assert door.read() == 1
    assert isinstance(door.told[0].answer, kind)


def land_without_memory() -> None:
    """One answer is written, the next one fails, the third is not come to."""
    with bare_core(SPEC, sequences=ROWS + 2) as bare:
        first, full, last = (bare.open_client(SIZES) for _ in range(3))
        fill(bare, 1)
        first.send(bare.both(0, (1, LENGTH, 1)))
        full.send(bare.both(0, *[(sequence, LENGTH, LONGEST) for sequence in range(2, ROWS + 2)]))
        last.send(bare.both(0, (ROWS + 2, LENGTH, 1)))
        assert bare.look() == 0
        with no_memory():
            bare.look()
        abandon(bare)
        abandon(bare)
        check_told(first, TokenAnswer)
        check_told(last, BlockdexError)
        assert bare.lines[1].has_unwritten, "the fault, which waits for room"
        assert not bare.core.in_flight


def abandon_without_memory() -> None:
    """The same, where there is not even any for the fault."""
    with bare_core(SPEC, replays=[(2, 1, 1000)]) as bare:
        first, full = (bare.open_client(SIZES) for _ in range(2))
        fill(bare, 1)
        first.send(bare.both(0, (1, LENGTH, 1)))
        full.send(bare.both(0, (2, LENGTH, 1)))
        assert bare.look() == 0
        text = b"INTERNAL" + bytes(SIZE - 64)
        with no_memory():
            abandon(bare, text)
        assert bare.core.in_flight == 1
        abandon(bare)
        check_told(first, BlockdexError)
        assert bare.lines[1].has_unwritten
        assert not bare.core.in_flight


if __name__ == "__main__":
    land_without_memory()
    abandon_without_memory()
