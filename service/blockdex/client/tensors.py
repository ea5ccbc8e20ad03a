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
from blockdex.v1 import indexer_pb2 as pb

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
_ANSWER_DTYPES = {pb.DTYPE_INT32: np.dtype("<i4"), pb.DTYPE_FP32: np.dtype("<f4")}


def elements_of(name: str, tensor: Any) -> tuple[FloatDtype, NDArray[Any]]:
    """A tensor's dtype, and its elements on the host, little-endian, in its shape; copied only where they must be.

    Raises:
        InvalidArgumentError: a dtype that the wire does not have (INVALID_TENSOR).
        TypeError: neither a numpy array nor a torch tensor.
    """
    if isinstance(tensor, np.ndarray):
        array = tensor if tensor.dtype.byteorder != ">" else tensor.astype(tensor.dtype.newbyteorder("<"))
        known = NUMPY_DTYPES.get(array.dtype)
        if known is None:
            raise _unknown_dtype(name, tensor.dtype)
        return known, array
    torch = _torch_of(tensor)
    if torch is None:
        raise _no_tensor(name, tensor)
    dtype = str(tensor.dtype)
    if dtype not in _TORCH_DTYPES:
        raise _unknown_dtype(name, dtype)
    host = tensor.detach().cpu()
    if dtype in _TORCH_BITS:
        bits, same = _TORCH_BITS[dtype]
        return _TORCH_DTYPES[dtype], host.view(getattr(torch, bits)).numpy().view(same)
    return _TORCH_DTYPES[dtype], host.numpy()


def rows_of(name: str, tensor: Any) -> int:
    """How many rows a tensor has; a lone number has none.

    Raises:
        TypeError: neither a numpy array nor a torch tensor.
    """
    if not isinstance(tensor, np.ndarray) and _torch_of(tensor) is None:
        raise _no_tensor(name, tensor)
    return int(tensor.shape[0]) if len(tensor.shape) > 0 else 0


def tensor_like(tensor: Any, name: str, answer: pb.Tensor, shape: tuple[int, ...]) -> Any:
    """An answer of the shape, of the same kind (and on the same device) as the caller's tensor, and writable.

    Raises:
        DataLossError: the answer does not have that many elements.
    """
    dtype = _ANSWER_DTYPES.get(answer.dtype)
    expected = 4 * math.prod(shape)
    buffer = bytearray(answer.data)
    if dtype is None or len(buffer) != expected:
        raise DataLossError(
            f"{name}: [{', '.join(map(str, shape))}] takes {expected} bytes, the answer has {len(buffer)}",
            Reason.INTERNAL,
        )
    return array_like(tensor, dtype, buffer, shape)


def array_like(tensor: Any, dtype: np.dtype[Any], buffer: bytearray, shape: tuple[int, ...]) -> Any:
    """The elements in the buffer, which it keeps; of the kind and on the device of the caller's tensor."""
    torch = None if isinstance(tensor, np.ndarray) else _torch_of(tensor)
    if torch is None:
        return np.ndarray(shape, dtype, buffer)
    return torch.frombuffer(buffer, dtype=getattr(torch, dtype.name)).reshape(shape).to(tensor.device)


def _torch_of(tensor: object) -> Any:
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(tensor, torch.Tensor) else None


def _no_tensor(name: str, tensor: object) -> TypeError:
    return TypeError(f"{name} must be a numpy array or a torch tensor, got {type(tensor).__name__}")


def _unknown_dtype(name: str, dtype: object) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{name}: dtype must be one of {', '.join(_TORCH_DTYPES.values())}, got {dtype}", Reason.INVALID_TENSOR
    )
