"""The caller's tensors to the wire and back. torch is touched only where a tensor is torch's own."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from blockdex.contract.errors import DataLossError, InvalidArgumentError, Reason
from blockdex.contract.messages import FloatDtype

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", NDArray[Any], "torch.Tensor")
"""numpy or torch: what goes in comes out."""

NUMPY_DTYPES: dict[np.dtype[Any], FloatDtype] = {
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype("<f2"): "fp16",
    np.dtype("<f4"): "fp32",
    np.dtype(ml_dtypes.float8_e4m3fn): "fp8_e4m3",
}
_TORCH_DTYPES: dict[str, FloatDtype] = {
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.float8_e4m3fn": "fp8_e4m3",
}
# torch gives numpy no such types: the same bits cross under another name.
_TORCH_BITS = {
    "torch.bfloat16": ("int16", np.dtype(ml_dtypes.bfloat16)),
    "torch.float8_e4m3fn": ("uint8", np.dtype(ml_dtypes.float8_e4m3fn)),
}
_LITTLE_ENDIAN = {"int32": np.dtype("<i4"), "float32": np.dtype("<f4")}


def host_array(name: str, tensor: Any) -> NDArray[Any]:
    """A tensor's elements on the host, in their order, little-endian, of one of `NUMPY_DTYPES`; copied where they must.

    Raises:
        InvalidArgumentError: a dtype that the wire does not have, or no dense elements (INVALID_TENSOR).
        TypeError: neither a numpy array nor a torch tensor.
    """
    if isinstance(tensor, np.ma.MaskedArray):
        raise InvalidArgumentError(f"{name}: a masked array, whose mask could not be kept", Reason.INVALID_TENSOR)
    if isinstance(tensor, np.ndarray):
        array = np.asarray(tensor, tensor.dtype.newbyteorder("<"), "C")
        if array.dtype not in NUMPY_DTYPES:
            raise _unknown_dtype(name, tensor.dtype)
        return array
    torch = torch_of(tensor)
    if torch is None:
        raise TypeError(f"{name} must be a numpy array or a torch tensor, got {type(tensor).__name__}")
    dtype = str(tensor.dtype)
    if dtype not in _TORCH_DTYPES:
        raise _unknown_dtype(name, dtype)
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        kind = "on the meta device" if tensor.is_meta else "nested" if tensor.is_nested else f"of {tensor.layout}"
        raise InvalidArgumentError(f"{name}: must be a dense tensor, got one {kind}", Reason.INVALID_TENSOR)
    host = tensor.detach().resolve_neg().cpu().contiguous()
    if dtype in _TORCH_BITS:
        bits, same = _TORCH_BITS[dtype]
        host = host.view(getattr(torch, bits))
    elements: NDArray[Any] = host.numpy()
    return elements.view(same) if dtype in _TORCH_BITS else elements


def array_like(tensor: Any, name: str, buffer: bytearray | None, dtype: str, shape: tuple[int, ...]) -> Any:
    """An answer's elements in the buffer, which it keeps; of the kind and on the device of the caller's tensor.

    Raises:
        DataLossError: they are not as many as the shape says.
    """
    expected, got = 4 * math.prod(shape), 0 if buffer is None else len(buffer)
    if buffer is None or got != expected:
        words = f"{name}: [{', '.join(map(str, shape))}] takes {expected} bytes, the answer has {got}"
        raise DataLossError(words, Reason.INTERNAL)
    torch = None if isinstance(tensor, np.ndarray) else torch_of(tensor)
    if torch is None:
        return np.ndarray(shape, _LITTLE_ENDIAN[dtype], buffer)
    return torch.frombuffer(buffer, dtype=getattr(torch, dtype)).reshape(shape).to(tensor.device)


def torch_of(thing: object) -> Any:
    """The module torch where this is a tensor or a dtype of its own, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(thing, torch.Tensor | torch.dtype) else None


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    """Of the elements of keys and queries of a dtype of torch; None where they cannot have it."""
    word = _TORCH_DTYPES.get(str(dtype))
    return next((numpy for numpy, each in NUMPY_DTYPES.items() if each == word), None)


def _unknown_dtype(name: str, dtype: object) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{name}: dtype must be one of {', '.join(_TORCH_DTYPES.values())}, got {dtype}", Reason.INVALID_TENSOR
    )
