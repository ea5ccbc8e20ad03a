"""A process whose lane has no memory left for an answer that has to wait: nobody is answered twice."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from bare_lane import LENGTH, LONGEST, bare_lane
from blockdex.errors import BlockdexError, Code
from blockdex.messages import TokenAnswer
from blockdex.transport.segment import Sizes
from blockdex_kernels import IndexSpec

SPEC = IndexSpec(num_layers=1, num_index_heads=256, head_dim=128, block_size=8, topk=128)
ROWS = 96
"""Of 4 tokens: their answer takes 48 MiB, more than malloc ever has at hand."""


def run() -> None:
    """Ends with an error where somebody is."""
    size = 4 * ROWS * LONGEST * SPEC.num_index_heads * SPEC.topk
    sizes = Sizes(slots=8, request_bytes=1 << 26, answer_bytes=2 * size)
    with bare_lane(SPEC, sequences=ROWS + 2) as bare:
        first, full, last = (bare.open_door(sizes) for _ in range(3))
        while bare.lines[1].claim(size) is not None:
            pass  # never read
        first.send(bare.both(0, (1, LENGTH, 1)))
        full.send(bare.both(0, *[(sequence, LENGTH, LONGEST) for sequence in range(2, ROWS + 2)]))
        last.send(bare.both(0, (ROWS + 2, LENGTH, 1)))
        assert bare.look() == 0
        limits = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), limits[1]))
        try:
            with pytest.raises(MemoryError):
                bare.look()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        bare.lane.abandon(int(Code.INTERNAL), len(b"INTERNAL"), b"INTERNALa fault")
        bare.lane.abandon(int(Code.INTERNAL), len(b"INTERNAL"), b"INTERNALa fault")
        assert (first.read(), last.read()) == (1, 1)
        assert isinstance(first.told[0].answer, TokenAnswer)
        assert isinstance(last.told[0].answer, BlockdexError)
        assert bare.lines[1].has_unwritten, "the fault, which waits for room"
        assert not bare.lane.in_flight


if __name__ == "__main__":
    run()
