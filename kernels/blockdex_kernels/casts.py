"""How keys and queries become what the cache holds and what is scored."""

from __future__ import annotations

import torch

from blockdex_kernels.spec import KeyDtype

TORCH_DTYPES: dict[KeyDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}

FP8_MAX = 448.0


def cast_keys(keys: torch.Tensor, key_dtype: KeyDtype) -> torch.Tensor:
    """Keys as the cache holds them: rounded to nearest even; fp8 saturates (infinities too) and keeps NaN.

    Args:
        keys: any shape, bfloat16, float16, float32 or float8_e4m3fn.
        key_dtype: the cache's.

    Returns:
        The same shape in the cache's dtype.
    """
    dtype = TORCH_DTYPES[key_dtype]
    if key_dtype == "bf16" or keys.dtype == dtype:
        return keys.to(dtype)
    return keys.float().clamp(-FP8_MAX, FP8_MAX).to(dtype)


def scale_to_fp8(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries scaled row by row into the fp8 range and cast.

    A row's scale is the power of two that brings its largest finite magnitude into [128, 256), at most 2^126: exact on
    every device, and far enough from 448 that no finite element saturates. Infinities saturate, NaN stays.

    Args:
        queries: `[..., D]`, bfloat16, float16, float32 or float8_e4m3fn.

    Returns:
        float8_e4m3fn `[..., D]`, and float32 `[..., 1]`: what scores are multiplied by to undo the scale.
    """
    rows = queries.float()
    largest = rows.abs().nan_to_num(nan=0.0, posinf=0.0).amax(dim=-1, keepdim=True)
    shift = (8 - torch.frexp(largest).exponent).clamp(max=126)
    return cast_keys(rows * _power_of_two(shift), "fp8_e4m3"), _power_of_two(-shift)


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2^exponent in float32, exactly; exponents from -126 to 127."""
    return ((exponents + 127) << 23).view(torch.float32)
