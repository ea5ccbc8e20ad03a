"""The calls of the CUDA driver that torch has no word for: memory that processes share, and memory of the host."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_PINNED, _ON_DEVICE, _READ_WRITE, _AS_FILE = 1, 1, 3, 1
_MAPPED = 2
"""CU_MEMHOSTREGISTER_DEVICEMAP."""


class CudaError(RuntimeError):
    """A call of the driver failed.

    Attributes:
        number: the CUresult.
    """

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{name} failed: CUDA error {number}")
        self.number = number


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


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments: Any) -> None:
    """Calls a function of the driver, whole numbers as 64-bit ones.

    Raises:
        CudaError: it failed.
        OSError: there is no driver.
    """
    wide = [ctypes.c_size_t(each) if isinstance(each, int) else each for each in arguments]
    error = getattr(_driver(), name)(*wide)
    if error:
        raise CudaError(name, error)


def address_of(name: str) -> int:
    """That of a function of the driver, for C code to call."""
    return ctypes.cast(getattr(_driver(), name), ctypes.c_void_p).value or 0


def use_primary_context(device: int) -> None:
    """Makes the context that torch has of a device the calling thread's."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(handle), device)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    call("cuCtxSetCurrent", context)


def device_uuid(device: int) -> bytes:
    """16 bytes, the same in every process that sees the device."""
    handle, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(handle), device)
    call("cuDeviceGetUuid_v2", uuid, handle)
    return bytes(uuid)


def can_reach(device: int, other: int) -> bool:
    """Whether kernels of a device may read and write memory of another one."""
    handles, yes = (ctypes.c_int(), ctypes.c_int()), ctypes.c_int()
    for handle, number in zip(handles, (device, other), strict=True):
        call("cuDeviceGet", ctypes.byref(handle), number)
    call("cuDeviceCanAccessPeer", ctypes.byref(yes), *handles)
    return bool(yes.value)


def granularity(device: int) -> int:
    """Bytes of which a mapping has a whole number."""
    bytes_ = ctypes.c_size_t()
    properties = _properties(device)
    call("cuMemGetAllocationGranularity", ctypes.byref(bytes_), ctypes.byref(properties), 0)
    return bytes_.value


def reserve(size: int, alignment: int) -> int:
    """A range of addresses, without memory."""
    address = ctypes.c_uint64()
    call("cuMemAddressReserve", ctypes.byref(address), size, alignment, 0, 0)
    return address.value


def create(device: int, size: int, *, shared: bool = False) -> int:
    """Handle of new memory of a device, which `export_file` can share if it is said here."""
    handle = ctypes.c_uint64()
    properties = _properties(device, _AS_FILE if shared else 0)
    call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(properties), 0)
    return handle.value


def export_file(handle: int) -> int:
    """A file descriptor for another process, which may import the memory even when this one is gone."""
    fd = ctypes.c_int()
    call("cuMemExportToShareableHandle", ctypes.byref(fd), handle, ctypes.c_int(_AS_FILE), 0)
    return fd.value


def import_file(fd: int) -> int:
    """Handle of the memory that another process has exported; the file stays the caller's."""
    handle = ctypes.c_uint64()
    call("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(fd), ctypes.c_int(_AS_FILE))
    return handle.value


def device_of(handle: int) -> int:
    """On which device memory lies, as this process counts them."""
    properties = _Properties()
    call("cuMemGetAllocationPropertiesFromHandle", ctypes.byref(properties), handle)
    return int(properties.location.id)


def map_memory(address: int, size: int, handle: int, device: int) -> None:
    """Puts all of a handle's memory at an address, for a device to read and write; the mapping keeps the memory.

    The handle is given back, also where that fails.
    """
    try:
        call("cuMemMap", address, size, 0, handle, 0)
    finally:
        call("cuMemRelease", handle)
    try:
        access = _Access(_Location(_ON_DEVICE, device), _READ_WRITE)
        call("cuMemSetAccess", address, size, ctypes.byref(access), 1)
    except CudaError:
        call("cuMemUnmap", address, size)
        raise


def unmap(address: int, size: int) -> None:
    """Gives back a mapping and its addresses; no kernel uses them any more."""
    call("cuMemUnmap", address, size)
    call("cuMemAddressFree", address, size)


def copy(there: int, here: int, size: int, stream: int) -> None:
    """Queues a copy between addresses, of the host or of a device: by torch it takes the host ten times as long."""
    call("cuMemcpyAsync", there, here, size, stream)


def register(address: int, size: int) -> int:
    """Pins memory of the host; the address that kernels of the current device find it at."""
    there = ctypes.c_uint64()
    call("cuMemHostRegister_v2", address, size, ctypes.c_uint(_MAPPED))
    call("cuMemHostGetDevicePointer_v2", ctypes.byref(there), address, ctypes.c_uint(0))
    return there.value


def unregister(address: int) -> None:
    """Ends what `register` began."""
    call("cuMemHostUnregister", address)


def _properties(device: int, handle_types: int = 0) -> _Properties:
    return _Properties(type=_PINNED, handle_types=handle_types, location=_Location(_ON_DEVICE, device))
