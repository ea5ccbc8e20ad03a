"""The vectorised reference is the reference."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from blockdex_kernels import IndexSpec, reference
from blockdex_kernels.interface import Fp8Scoring, Order
from support import vectorised_reference
from support.kernel_cases import random_run


@pytest.mark.parametrize("order", ["ascending", "score"])
@pytest.mark.parametrize("cache", [("bf16", "native"), ("fp8_e4m3", "native"), ("fp8_e4m3", "upcast")], ids="-".join)
@pytest.mark.parametrize("forced", [(0, 1), (0, 0), (1, 2), (3, 3), (6, 0)])
def test_both_say_the_same(
    forced: tuple[int, int],
    cache: tuple[Any, Fp8Scoring],
    order: Order,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vectorised_reference, "_PRODUCTS", 10_000)
    spec = IndexSpec(
        num_index_heads=2,
        head_dim=4,
        block_size=8,
        topk=6,
        init_blocks=forced[0],
        local_blocks=forced[1],
        key_dtype=cache[0],
    )
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1.0])
    for length, num_queries in ((1, 1), (40, 40), (301, 30), (320, 5)):
        run = random_run(generator, spec, length, num_queries)
        for tensor in (run.keys, run.queries):
            spots = torch.rand(tensor.shape, generator=generator) < 0.2
            tensor[spots] = odd[torch.randint(8, (int(spots.sum()),), generator=generator)]
        arguments = (run.keys, run.queries, run.first, spec)
        options: Any = {"order": order, "fp8_scoring": cache[1], "flip_tolerance": 0.125}
        expected = reference.select(*arguments, **options)
        ours = vectorised_reference.select(*arguments, **options)
        for field in dataclasses.fields(expected):
            torch.testing.assert_close(
                getattr(ours, field.name), getattr(expected, field.name), rtol=1e-14, atol=1e-14, equal_nan=True
            )
