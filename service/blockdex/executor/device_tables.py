"""Page tables on a GPU that grow where they are: graphs hold their address, and are captured once."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_RESERVED_CELLS = 1 << 31
"""Cells of the address range, which takes no memory: tables of a quarter of a million sequences of a million tokens."""

_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


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
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._location = _Location(_ON_DEVICE, device.index or 0)
        self._properties = _Properties(type=_PINNED, location=self._location)
        granularity, address = ctypes.c_size_t(), ctypes.c_uint64()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._properties), 0)
        self._granularity, self._address = granularity.value, address
        size = 4 * _RESERVED_CELLS
        self._call("cuMemAddressReserve", ctypes.byref(address), size, granularity.value, 0, 0)
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
            "data": (self._address.value, False),
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
        handle, size = ctypes.c_uint64(), end - begin
        at = ctypes.c_uint64(self._address.value + begin)
        access = _Access(self._location, _READ_WRITE)
        self._call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), 0)
        self._call("cuMemMap", at, size, 0, handle, 0)
        self._call("cuMemRelease", handle)  # the mapping keeps it
        self._call("cuMemSetAccess", at, size, ctypes.byref(access), 1)
        self.mapped = end // 4

    def _call(self, name: str, *arguments: Any) -> None:
        wide = [ctypes.c_size_t(each) if isinstance(each, int) else each for each in arguments]
        error = getattr(self._driver, name)(*wide)
        if error:
            raise RuntimeError(f"page tables: {name} failed: CUDA error {error}")
