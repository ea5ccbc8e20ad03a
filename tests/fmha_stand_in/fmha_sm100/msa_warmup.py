"""Which kernels a configuration may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import api, jit

_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class WarmupItem:
    label: str
    fmha_variant: str | None = None


def plan_warmup(
    kv_cache_dtype: str,
    index_cache_dtype: str | None,
    num_q_heads: int,
    num_kv_heads: int,
    topk: int,
    decode_query_lens: Any = (1,),
    *,
    num_index_heads: int | None = None,
    page_size: int = 128,
    decode_backend: str = "auto",
    block_scale_shift: int = 3,
    sparse_decode: bool = True,
    sparse_prefill: bool = True,
    prefill_backend: str = "auto",
    device: Any = None,
) -> list[WarmupItem]:
    assert kv_cache_dtype == index_cache_dtype and index_cache_dtype in _DTYPES and num_index_heads is not None
    assert num_kv_heads == 1 and page_size == 128 and not sparse_decode and not sparse_prefill
    names = set()
    for longest in range(1, 130):
        pack = api.pack_factor_of(longest, num_index_heads, 1)
        rows = longest * pack
        names.add(jit.variant_name(_DTYPES[index_cache_dtype], 128 if rows <= 128 else 256, rows <= 64, pack))
    scoring = [WarmupItem(f"index score {name}", name) for name in sorted(names)]
    return [WarmupItem("plan"), *scoring, WarmupItem("sparse top-k select")]
