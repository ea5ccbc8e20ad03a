"""Where the Triton kernels are tested: on a GPU, or else on the CPU, in Triton's interpreter (see `conftest.py`).

The interpreter computes some things otherwise than every GPU does; importing this module puts them right.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from blockdex_kernels import IndexSpec
from blockdex_kernels.interface import Fp8Scoring
from blockdex_kernels.triton import TritonBackend
from support.kernel_cases import Run, pages_of

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

PREFILL_KERNEL = "hopper"
"""Of `backend_for`, where there is such a chip; tests on a GPU set the other one too."""

_TORCH_DTYPES = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}


def _as_float32(handle: Any) -> Any:
    """An operand of a product, exactly; bf16 and e4m3 are bits to the interpreter."""
    dtype = _TORCH_DTYPES.get(handle.dtype.scalar)
    if dtype is None:
        return handle
    return TensorHandle(torch.tensor(handle.data).view(dtype).float().numpy(), tl.float32)


_create_dot = InterpreterBuilder.create_dot
_cast_impl = InterpreterBuilder.cast_impl


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter multiplies bf16 as if its bits were integers, and takes NaN in e4m3 for 480."""
    return _create_dot(self, _as_float32(a), _as_float32(b), *rest)


def _cast(self: Any, source: Any, target: Any) -> Any:
    """The interpreter cuts float32 off where bf16 rounds."""
    if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
        return _cast_impl(self, source, target)
    rounded = torch.tensor(source.data).bfloat16().view(torch.uint16)
    return TensorHandle(rounded.numpy(), tl.bfloat16)


InterpreterBuilder.create_dot = _dot
InterpreterBuilder.cast_impl = _cast
for _name in ("create_fp_ext", "create_fp_trunc"):
    setattr(InterpreterBuilder, _name, _cast)


def backend_for(
    spec: IndexSpec, runs: list[Run], fp8_scoring: Fp8Scoring = "native", spare_pages: int = 7, **options: Any
) -> TritonBackend:
    """With more pages than the runs fill: the others stay poisoned."""
    num_pages = pages_of(runs, spec) + spare_pages
    options.setdefault("prefill_kernel", PREFILL_KERNEL)
    return TritonBackend(spec, num_pages, DEVICE, reason="tested", fp8_scoring=fp8_scoring, **options)
