"""Memory that tests share with an engine, as a client of it has it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockdex.ring.sharing import new_memfd


class SharedMemory(NamedTuple):
    """A memfd that can be shared, and its bytes as its owner sees them."""

    fd: int
    bytes: NDArray[np.uint8]


@contextmanager
def shared_memory(num_bytes: int) -> Iterator[SharedMemory]:
    """New memory, whose file is closed in the end."""
    fd = new_memfd(num_bytes)
    try:
        yield SharedMemory(fd, np.frombuffer(mmap.mmap(fd, num_bytes), np.uint8))
    finally:
        os.close(fd)


def mappings() -> int:
    """How often this process has shared memory of clients mapped, their own side too."""
    return Path("/proc/self/maps").read_text("ascii").count("blockdex-region")


def files() -> int:
    """Files that this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))
