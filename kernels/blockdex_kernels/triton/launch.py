"""What differs between chips when a kernel is launched."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Programmatic dependent launch: nothing before this may touch memory, and the next kernel may already start.

    Each program of each kernel waits, so that a kernel which is done implies that all before it are.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def next_may_come_early(rows, width):
    """Whether the programs that rank so many rows of scores leave room for those of a next kernel.

    Beside more of them some of its programs find no shared memory (those that rank leave it to the L1 cache), and come
    only when others of it are done.
    """
    return (rows <= 1024) & (rows * width <= 1 << 20)


def pdl_launch(pdl: bool) -> dict[str, bool]:
    """The launch option; given only where it is on, since not every Triton backend knows it."""
    return {"launch_pdl": True} if pdl else {}


def padded_runs(runs: int) -> int:
    """Runs that a kernel is compiled for: 32, 128, 512 and so on, so that few variants serve every batch."""
    padded = 32
    while padded < runs:
        padded *= 4
    return padded
