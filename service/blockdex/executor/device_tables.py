"""Page tables on a GPU that grow where they are: graphs hold their address, and are captured once."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels import cuda_driver

_RESERVED_CELLS = 1 << 31
"""Cells of the address range, which takes no memory: tables of a quarter of a million sequences of a million tokens."""

_CHANGES = 2048
"""Cells that one graph writes: rows of a batch's pools, or a long sequence's first pages."""
_WRITERS = 4


class _Writer:
    """A graph that writes cells: torch alone takes five times as long on the host, between two steps.

    Args:
        cells: int32, all there may be.
        pool: memory that graphs share, which run one after the other.
    """

    def __init__(self, cells: torch.Tensor, pool: Any) -> None:
        self._host = torch.zeros(2, _CHANGES, dtype=torch.int64, pin_memory=True)
        self._changes = self._host.numpy()
        self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._there = there = torch.zeros_like(self._host, device=cells.device)  # the graph has its address
        stream = torch.cuda.Stream(cells.device)  # type: ignore[no-untyped-call]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            there.copy_(self._host, non_blocking=True)
            # A cell that is named twice has the same page in both places.
            cells.index_copy_(0, there[0], there[1].int())
        self._graph.replay()  # The first time a graph takes up to a millisecond. Cell 0 becomes what it is, 0.

    def write(self, places: NDArray[np.intp], pages: NDArray[np.int32]) -> None:
        """Queues up to `_CHANGES` cells on the current stream."""
        self._read.synchronize()
        self._changes[:, : len(places)] = places, pages
        self._changes[:, len(places) :] = self._changes[:, :1]
        self._graph.replay()
        self._read.record()


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
        pool = torch.cuda.graph_pool_handle()
        self._writers = itertools.cycle([_Writer(self._cells, pool) for _ in range(_WRITERS)])

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

    def write(self, places: NDArray[np.intp], pages: NDArray[np.int32]) -> None:
        """Queues the writing of some cells on the current stream.

        Args:
            places: `[C]`, which.
            pages: `[C]`, what they hold from then on.
        """
        for first in range(0, len(places), _CHANGES):
            part = slice(first, first + _CHANGES)
            next(self._writers).write(places[part], pages[part])

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
