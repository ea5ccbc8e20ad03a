"""The page tables of all sequences: which page holds which block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_PIECE = 64
_FIRST_PIECES = 64


class PageTables:
    """A page for each block of each of S slots, 0 where there is none.

    Tables are kept in pieces of 64 blocks, found through a directory: a long sequence takes room for itself, not for
    as many blocks in every slot. Piece 0 stays empty; the directory points to it where a slot has no piece.
    """

    def __init__(self, num_slots: int) -> None:
        self._pages: NDArray[np.int32] = np.zeros(_FIRST_PIECES * _PIECE, np.int32)
        self._directory: NDArray[np.intp] = np.zeros((num_slots, 1), np.intp)
        self._free = list(reversed(range(1, _FIRST_PIECES)))

    def rows(self, slots: NDArray[np.intp], width: int) -> NDArray[np.int32]:
        """The first `width` blocks of slots `[N]`: a copy `[N, width]`."""
        pieces = self._directory[slots, : -(-width // _PIECE)]
        return self._pages.reshape(-1, _PIECE)[pieces].reshape(len(slots), -1)[:, :width]

    def get(self, slots: NDArray[np.intp] | int, blocks: NDArray[np.intp]) -> NDArray[np.int32]:
        """The pages of blocks `[M]` of slots, one or `[M]`: a copy."""
        places = self._places(slots, blocks)  # before the pages, which grow first: onlookers may be in another thread
        return self._pages[places]

    def set(self, slots: NDArray[np.intp] | int, blocks: NDArray[np.intp], pages: NDArray[np.int32] | int) -> None:
        """Enters pages for blocks `[M]` of slots, one or `[M]`, for which there is room."""
        self._pages[self._places(slots, blocks)] = pages

    def resize(self, slot: int, before: int, after: int) -> None:
        """Makes room for `after` blocks in a slot that has room for `before`; what lay behind is forgotten."""
        self.set(slot, np.arange(after, before), 0)
        have, need = -(-before // _PIECE), -(-after // _PIECE)
        if need > self._directory.shape[1]:
            more = max(need - self._directory.shape[1], self._directory.shape[1])
            self._directory = np.pad(self._directory, ((0, 0), (0, more)))
        while len(self._free) < need - have:
            self._double_pieces()
        self._directory[slot, have:need] = [self._free.pop() for _ in range(have, need)]
        self._free.extend(self._directory[slot, need:have].tolist())
        self._directory[slot, need:have] = 0

    def double_slots(self) -> None:
        """Makes room for as many slots more."""
        self._directory = np.pad(self._directory, ((0, len(self._directory)), (0, 0)))

    def _places(self, slots: NDArray[np.intp] | int, blocks: NDArray[np.intp]) -> NDArray[np.intp]:
        piece, place = np.divmod(blocks, _PIECE)
        places: NDArray[np.intp] = self._directory[slots, piece] * _PIECE + place
        return places

    def _double_pieces(self) -> None:
        old = len(self._pages)
        self._pages = np.pad(self._pages, (0, old))
        self._free.extend(reversed(range(old // _PIECE, 2 * old // _PIECE)))
