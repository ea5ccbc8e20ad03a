"""The pages of the cache: which are free, and how many sequences or pools hold each of the others."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class PageCopy(NamedTuple):
    """Page `destination` gets what page `source` holds, in all layers."""

    source: int
    destination: int


class PagePool:
    """Page ids 0 to `num_pages - 1`, each free or held by one or more sequences, or by a pool.

    Attributes:
        holders: int32 `[num_pages]`, sequences that hold each page, 0 where it is free.
        shared: pages that more than one sequence holds.
        free_pages: int64 `[1]`, how many are free, where the core checks it.
        numbers: int32 `[num_pages]`, of a page that a pool has, its number there.
    """

    def __init__(self, num_pages: int) -> None:
        self.holders: NDArray[np.int32] = np.zeros(num_pages, np.int32)
        self.numbers: NDArray[np.int32] = np.zeros(num_pages, np.int32)
        self.shared = 0
        self._free = deque(range(num_pages))
        self.free_pages: NDArray[np.int64] = np.array([num_pages], np.int64)

    @property
    def total(self) -> int:
        """Pages there are."""
        return len(self.holders)

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def allocate(self, count: int) -> NDArray[np.int32]:
        """Takes `count` free pages, at most `free`, for one holder."""
        pages = np.array([self._free.popleft() for _ in range(count)], np.int32)
        self.holders[pages] = 1
        self.free_pages[0] -= count
        return pages

    def share(self, pages: NDArray[np.int32]) -> None:
        """Adds a holder to pages that are held; no page twice."""
        holders = self.holders[pages]
        self.holders[pages] = holders + 1
        self.shared += int(np.count_nonzero(holders == 1))

    def release(self, pages: NDArray[np.int32]) -> None:
        """Takes a holder from pages that are held; no page twice. Without a holder a page is free."""
        holders = self.holders[pages]
        self.holders[pages] = holders - 1
        self.shared -= int(np.count_nonzero(holders == 2))
        self._free.extend(pages[holders == 1].tolist())
        self.free_pages[0] = len(self._free)
