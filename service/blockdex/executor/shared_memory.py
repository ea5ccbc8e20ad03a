"""Memory that other processes share, opened for the kernels of one GPU. Any thread may call these."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from blockdex_kernels import cuda_driver

_LAZY_PEER_ACCESS = 1


class Opened(NamedTuple):
    """Memory of a GPU that another process owns.

    Attributes:
        address: where it begins.
        num_bytes: of it.
        close: gives it back; nothing on the device uses it any more.
    """

    address: int
    num_bytes: int
    close: Callable[[], None]


class _Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("bytes", ctypes.c_ubyte * 64),)


def pin(device: int, address: int, num_bytes: int) -> Callable[[], None]:
    """Has a GPU read and write memory of the host by itself; returns what ends that.

    Raises:
        RuntimeError: the driver refuses.
    """
    cuda_driver.use_primary_context(device)
    cuda_driver.register(address, num_bytes)
    return _when_idle(device, cuda_driver.unregister, address)


def open_file(device: int, fd: int, num_bytes: int, uuid: str) -> Opened:
    """Maps an allocation of CUDA's virtual memory management that was exported as a file.

    Args:
        device: whose kernels use it.
        fd: the file, which stays the caller's.
        num_bytes: of the allocation.
        uuid: of the GPU that it lies on, as its owner says; hexadecimal digits.

    Raises:
        RuntimeError: the driver refuses, it lies on another GPU than is said, or on one that the device cannot reach.
    """
    cuda_driver.use_primary_context(device)
    unit = cuda_driver.granularity(device)
    if num_bytes % unit:
        raise RuntimeError(f"bytes must be a multiple of {unit}, got {num_bytes}")
    address = cuda_driver.reserve(num_bytes, unit)
    try:
        handle = cuda_driver.import_file(fd)
        try:
            check_owner(device, cuda_driver.device_of(handle), uuid)
        except RuntimeError:
            cuda_driver.call("cuMemRelease", handle)
            raise
        cuda_driver.map_memory(address, num_bytes, handle, device)
    except RuntimeError:
        cuda_driver.call("cuMemAddressFree", address, num_bytes)
        raise
    return Opened(address, num_bytes, _when_idle(device, cuda_driver.unmap, address, num_bytes))


def check_owner(device: int, owner: int, uuid: str) -> None:
    """Refuses memory that lies elsewhere than is said, or where kernels of a device do not reach it.

    Raises:
        RuntimeError: that is so.
    """
    there = cuda_driver.device_uuid(owner).hex()
    if there != uuid:
        raise RuntimeError(f"is said to lie on GPU {uuid}, lies on {there}")
    if owner != device and not cuda_driver.can_reach(device, owner):
        own = cuda_driver.device_uuid(device).hex()
        raise RuntimeError(f"lies on GPU {uuid}, which the server's, {own}, cannot reach: there is no peer access")


def open_handle(device: int, handle: bytes, uuid: str) -> Opened:
    """Opens memory that cudaMalloc has allocated; how much it is says the driver.

    Args:
        device: whose kernels use it.
        handle: 64 bytes, as cudaIpcGetMemHandle makes them.
        uuid: of the GPU that it lies on, as its owner says; hexadecimal digits.

    Raises:
        RuntimeError: the driver refuses, or the memory lies on another GPU.
    """
    cuda_driver.use_primary_context(device)
    own = cuda_driver.device_uuid(device).hex()
    if uuid != own:
        raise RuntimeError(f"lies on GPU {uuid}, the server's is {own}")
    address, base, size = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_size_t()
    by_value = _Handle.from_buffer_copy(handle)
    cuda_driver.call("cuIpcOpenMemHandle_v2", ctypes.byref(address), by_value, ctypes.c_uint(_LAZY_PEER_ACCESS))
    cuda_driver.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
    return Opened(base.value, size.value, _when_idle(device, cuda_driver.call, "cuIpcCloseMemHandle", address))


def _when_idle(device: int, close: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    """What gives memory back: behind all that is queued on the device, also by a step that failed."""

    def run() -> None:
        cuda_driver.use_primary_context(device)
        cuda_driver.call("cuCtxSynchronize")
        close(*arguments)

    return run
