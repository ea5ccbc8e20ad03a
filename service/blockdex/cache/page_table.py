"""The page tables of all sequences: which page holds which block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROW = 64
"""Blocks of a row: tables begin at rows."""

_FIRST_ROWS = 64


class PageTables:
    """A page for each block of each of S entries, all in one array that a device can have a copy of.

    An entry's table is one extent of 2**n rows of 64 blocks, so a long sequence takes room for itself, not for as many
    blocks in every entry; one that outgrows its extent moves into one of twice the size. Row 0 belongs to nobody and
    stays empty.

    Attributes:
        cells: int32 `[rows * 64]`, pages; without one 0, or -1 in a pool's row. Replaced by a longer one as needed.
        first_rows: int32 `[S]`, the row in which an entry's table begins, 0 where it has none.
    """

    def __init__(self, num_entries: int) -> None:
        self.cells: NDArray[np.int32] = np.zeros(_FIRST_ROWS * ROW, np.int32)
        self.first_rows: NDArray[np.int32] = np.zeros(num_entries, np.int32)
        self._num_rows: NDArray[np.int32] = np.zeros(num_entries, np.int32)
        self._free: dict[int, list[int]] = {}
        self._unused_row = 1
        self._changes: list[NDArray[np.intp]] = []

    def get(self, entries: NDArray[np.intp] | int, blocks: NDArray[np.intp]) -> NDArray[np.int32]:
        """The pages of blocks `[M]` of entries, one or `[M]`: a copy."""
        return self.cells[self._places(entries, blocks)]

    def glimpse(self, entries: NDArray[np.intp], blocks: NDArray[np.intp]) -> NDArray[np.int32]:
        """As `get`, for who looks on from another thread: of entries that have changed hands it is any pages."""
        places = self._places(entries, blocks)  # before the cells, which grow first
        return self.cells.take(places, mode="clip")

    def set(self, entries: NDArray[np.intp] | int, blocks: NDArray[np.intp], pages: NDArray[np.int32] | int) -> None:
        """Enters pages for blocks `[M]` of entries, one or `[M]`, for which there is room."""
        places = self._places(entries, blocks)
        self.cells[places] = pages
        self._changes.append(places)

    def take_changes(self) -> NDArray[np.intp]:
        """The cells that were written since this was last asked."""
        changes, self._changes = self._changes, []
        return np.concatenate(changes) if changes else _NO_CELLS

    def resize(self, entry: int, before: int, after: int) -> None:
        """Makes room for `after` blocks in an entry that has room for `before`; what lay behind is forgotten."""
        first, num_rows = int(self.first_rows[entry]), int(self._num_rows[entry])
        self.cells[first * ROW + after : first * ROW + before] = 0
        needed = 1 << (-(-after // ROW) - 1).bit_length() if after else 0
        if needed <= num_rows and after:
            return
        moved = self._take(needed) if needed else 0
        kept = min(before, after)
        cells = self.cells
        cells[moved * ROW : moved * ROW + kept] = cells[first * ROW : first * ROW + kept]
        cells[first * ROW : first * ROW + before] = 0
        self.first_rows[entry], self._num_rows[entry] = moved, needed
        self._changes.append(np.arange(moved * ROW, moved * ROW + kept))
        if num_rows:
            self._free.setdefault(num_rows, []).append(first)

    def open_row(self, entry: int, blocks: int) -> None:
        """Makes room for so many blocks of an entry that has none, whose cells are -1 until they are set in place.

        The device is told of cells that are set alone, so that what it has of the others is a page still.
        """
        self.resize(entry, 0, blocks)
        first = int(self.first_rows[entry]) * ROW
        self.cells[first : first + blocks] = -1

    def double_entries(self) -> None:
        """Makes room for as many entries more."""
        more = (0, len(self.first_rows))
        self.first_rows, self._num_rows = np.pad(self.first_rows, more), np.pad(self._num_rows, more)

    def _places(self, entries: NDArray[np.intp] | int, blocks: NDArray[np.intp]) -> NDArray[np.intp]:
        places: NDArray[np.intp] = self.first_rows[entries] * np.intp(ROW) + blocks
        return places

    def _take(self, num_rows: int) -> int:
        """A free extent, empty: one that a table of the same size has left, or new rows."""
        if self._free.get(num_rows):
            return self._free[num_rows].pop()
        first = self._unused_row
        self._unused_row += num_rows
        while self._unused_row * ROW > len(self.cells):
            self.cells = np.pad(self.cells, (0, len(self.cells)))
        return first


_NO_CELLS: NDArray[np.intp] = np.zeros(0, np.intp)
