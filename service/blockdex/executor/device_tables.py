"""Page tables on a GPU that grow where they are: graphs hold their address, and are captured once."""

from __future__ import annotations

from typing import Any

import torch

from blockdex_kernels import cuda_driver

_RESERVED_CELLS = 1 << 31
"""Cells of the address range, which takes no memory: tables of a quarter of a million sequences of a million tokens."""


class DeviceTables:
    """All page tables of a cache on one GPU.

    Memory is mapped into a range of addresses that was reserved for the largest there can be, a piece at a time.

    Args:
        device: a CUDA device, whose context is current.
        row: W, cells of a row.
        cells: how many there are to begin with.

    Attributes:
        mapped: cells that there are.
    """

    def __init__(self, device: torch.device, row: int, cells: int) -> None:
        torch.zeros(1, device=device)  # makes the context, where there is none yet
        self._device = device.index or 0
        self._granularity = cuda_driver.granularity(self._device)
        self._address = cuda_driver.reserve(4 * _RESERVED_CELLS, self._granularity)
        self.mapped = 0
        self._grow(cells)
        self._row = row
        self._cells = torch.as_tensor(self, device=device)
        self._cells[: self.mapped].zero_()

    @property
    def rows(self) -> torch.Tensor:
        """int32 `[rows, W]`: those that there are. Who holds it may read rows behind it once these are there."""
        return self._cells[: self.mapped].view(-1, self._row)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What torch makes a tensor of."""
        return {
            "shape": (_RESERVED_CELLS,),
            "typestr": "<i4",
            "data": (self._address, False),
            "version": 2,
        }

    def make_room(self, cells: int) -> None:
        """Has so many cells mapped at least; new ones are 0.

        Raises:
            RuntimeError: there is no memory, or there are more than the range has.
        """
        before = self.mapped
        if cells <= before:
            return
        self._grow(max(cells, 2 * before))
        self._cells[before : self.mapped].zero_()

    def _grow(self, cells: int) -> None:
        end = -(-4 * cells // self._granularity) * self._granularity
        if end > 4 * _RESERVED_CELLS:
            raise RuntimeError(f"page tables: at most {_RESERVED_CELLS} cells, {cells} are needed")
        begin = 4 * self.mapped
        size = end - begin
        cuda_driver.map_memory(self._address + begin, size, cuda_driver.create(self._device, size), self._device)
        self.mapped = end // 4
