"""Memory that a client shares with a server on its host: the tensors in it are read, and answers written, in place."""

from __future__ import annotations

import ctypes
import math
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from blockdex.client.requests import Scores, TokenRequest
from blockdex.client.tensors import host_array, numpy_dtype, torch_of
from blockdex.contract.errors import InvalidArgumentError, Reason, UnimplementedError
from blockdex.ring.layout import ALIGNMENT, aligned
from blockdex.ring.sharing import DeviceMemory, HostMemory

if TYPE_CHECKING:
    import torch

_GPU = re.compile(r"cuda(?::(\d+))?")
_ANSWERS = (("block_ids", "int32"), ("scores", "float32"))


class SharedRegion:
    """Memory that `Client.share` has made. Threads may share it.

    Keys and queries of the client's calls that lie in it, as one piece from a multiple of 64 bytes on, are not copied.
    What a call reads stays as it is until the call has ended, and what it writes is its own until then; after a call
    that failed by its timeout, or was cancelled, until the server has given it up, which the end of the client makes
    sure of.

    Attributes:
        bytes: that it has; on a GPU whole units of 2 MiB.
    """

    def __init__(self, memory: HostMemory | DeviceMemory) -> None:
        self.memory = memory
        self.bytes = memory.bytes
        self._taken = 0
        self._lock = threading.Lock()

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any:
        """An array of memory that nothing else was made of, which is not given back before all of the region is.

        Args:
            shape: of the array.
            dtype: of numpy, or of torch; memory of a GPU takes torch's alone. What it is of, the array is of.

        Raises:
            ValueError: less is left.
            TypeError: memory of a GPU has no arrays of numpy.
        """
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        torch = torch_of(dtype)
        num_bytes = math.prod(dims) * (dtype if torch else np.dtype(dtype)).itemsize
        host = self.memory if isinstance(self.memory, HostMemory) else None
        if torch is None and host is None:
            raise TypeError(f"dtype: must be one of torch, in memory of a GPU, got {dtype!r}")
        with self._lock:
            begin, end = self._taken, self._taken + num_bytes
            if end > self.bytes:
                raise ValueError(f"region: {self.bytes - begin} bytes are left, {num_bytes} are needed")
            self._taken = aligned(end)
        if host is not None and torch is None:
            return np.ndarray(dims, dtype, host.buffer, begin)
        whole = torch.as_tensor(self.memory) if host is None else torch.frombuffer(host.buffer, dtype=torch.uint8)
        return whole[begin:end].view(dtype).view(dims)

    def holds(self, address: int, num_bytes: int) -> bool:
        """Whether so much memory lies in it, and begins where requests can say."""
        begin = address - self.memory.address
        return 0 <= begin <= self.bytes - num_bytes and begin % ALIGNMENT == 0


def no_regions(transport: str) -> UnimplementedError:
    """What is said to a client whose transport shares no memory."""
    message = f"share: takes a client over a ring, this one's transport is {transport}"
    return UnimplementedError(message, Reason.REGION_UNSUPPORTED)


def new_region(num_bytes: int, device: str | None) -> SharedRegion:
    """Memory of this host, or of a GPU.

    Raises:
        ValueError: there are no bytes, or it is no word for a GPU.
        OSError, RuntimeError: there is not so much memory, or no such device.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes must be at least 1, got {num_bytes}")
    if device is None:
        return SharedRegion(HostMemory(num_bytes))
    if not (found := _GPU.fullmatch(device)):
        raise ValueError(f"device must be cuda or cuda:N, got {device!r}")
    return SharedRegion(DeviceMemory(int(found[1] or 0), num_bytes))


Regions = tuple[SharedRegion, ...]
"""Those of a client, as they are at one time: another tuple once that changes."""


def array_of(regions: Regions, name: str, tensor: Any) -> tuple[NDArray[Any], bool]:
    """A tensor's elements, as `host_array`; whether they are where they were, in shared memory of a GPU.

    Of such an array only the address means anything here.
    """
    torch = torch_of(tensor) if regions else None
    dtype = numpy_dtype(tensor.dtype) if torch and tensor.is_cuda and tensor.is_contiguous() else None
    if dtype is None or not _are_in(regions, tensor.data_ptr(), tensor.nbytes):
        return host_array(name, tensor), False
    _wait_for_stream(torch, tensor)
    there = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    return np.ndarray(tuple(tensor.shape), dtype, there), True


def answer_into(request: TokenRequest, regions: Regions, out: Any, return_scores: Scores) -> None:
    """Has a request's answer written to shared memory.

    Args:
        request: that selects.
        regions: the client's.
        out: block ids; with scores a pair of both.
        return_scores: whether there are scores.

    Raises:
        InvalidArgumentError: of another shape or dtype, not in one piece (INVALID_TENSOR), or in none of the regions
            (INVALID_REGION).
        TypeError: not one, or not two, of arrays.
    """
    wanted = _ANSWERS if return_scores is not False else _ANSWERS[:1]
    given = tuple(out) if return_scores is not False else (out,)
    if len(given) != len(wanted):
        raise TypeError(f"out: must be the pair of block ids and scores, got {len(given)} arrays")
    addresses = [0, 0]
    for number, ((name, dtype), tensor) in enumerate(zip(wanted, given, strict=True)):
        addresses[number] = _address_of(f"out, {name}", tensor, dtype, request.shape, regions)
    request.answer_into(*addresses)


def _address_of(name: str, tensor: Any, dtype: str, shape: tuple[int, ...], regions: Regions) -> int:
    torch = torch_of(tensor)
    if torch is None and not isinstance(tensor, np.ndarray):
        raise TypeError(f"{name} must be a numpy array or a torch tensor, got {type(tensor).__name__}")
    got = str(tensor.dtype).removeprefix("torch.")
    if (got, tuple(tensor.shape)) != (dtype, shape):
        raise InvalidArgumentError(
            f"{name}: must be {dtype} {list(shape)}, got {got} {list(tensor.shape)}", Reason.INVALID_TENSOR
        )
    if not (tensor.is_contiguous() if torch else tensor.flags.c_contiguous and tensor.flags.writeable):
        raise InvalidArgumentError(f"{name}: must lie in one piece, and be writeable", Reason.INVALID_TENSOR)
    address = int(tensor.data_ptr() if torch else tensor.ctypes.data)
    if not _are_in(regions, address, 4 * math.prod(shape)):
        raise InvalidArgumentError(
            f"{name}: must lie in memory of `share`, at a multiple of {ALIGNMENT} bytes", Reason.INVALID_REGION
        )
    if torch and tensor.is_cuda:
        _wait_for_stream(torch, tensor)
    return address


def _are_in(regions: Regions, address: int, num_bytes: int) -> bool:
    return any(region.holds(address, num_bytes) for region in regions)


def _wait_for_stream(torch: Any, tensor: torch.Tensor) -> None:
    """The server knows nothing of the stream, and comes behind all that it was told already."""
    torch.cuda.current_stream(tensor.device).synchronize()
