"""A process whose core has no memory left for an answer that has to wait: nobody is answered twice."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.ring_messages import TokenAnswer
from blockdex.contract.errors import BlockdexError
from blockdex.ring.segment import Sizes
from blockdex_kernels import IndexSpec
from support.bare_core import LENGTH, LONGEST, BareCore, bare_core
from support.foreign_frontend import ForeignFrontend

SPEC = IndexSpec(num_layers=1, num_index_heads=64, head_dim=384, block_size=8, topk=384)
ROWS = 127
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


def fill(bare: BareCore, line: int) -> None:
    """Leaves no room for an answer, which nobody reads."""
    while bare.lines[line].claim(SIZE) is not None:
        pass


def check_told(frontend: ForeignFrontend, kind: type) -> None:
    """Checks that the one request was answered once, in this way."""
    assert frontend.read() == 1
    assert isinstance(frontend.told[0].answer, kind)


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
        bare.abandon()
        bare.abandon()
        check_told(first, TokenAnswer)
        check_told(last, BlockdexError)
        assert bare.lines[1].has_unwritten, "the fault, which waits for room"
        assert not bare.core.in_flight


if __name__ == "__main__":
    land_without_memory()
