"""Caches, calls and strides beyond what 32 bits count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blockdex_kernels import IndexSpec
from blockdex_kernels.interface import Fp8Scoring, Selection
from support.kernel_cases import compare, spans_of
from support.triton_device import DEVICE, backend_for
from support.vectorised_reference import select

CACHE_BYTES = 20 << 30


@pytest.mark.parametrize("cache", [("bf16", "native"), ("fp8_e4m3", "native"), ("fp8_e4m3", "upcast")], ids="-".join)
def test_a_cache_far_above_4_gib(cache: tuple[Any, Fp8Scoring], generator: torch.Generator) -> None:
    """Pages of both ends and all around, in the last layer; what lies elsewhere is NaN."""
    spec = IndexSpec(num_layers=5, key_dtype=cache[0])
    num_pages = CACHE_BYTES // spec.bytes_per_page
    backend = backend_for(spec, [], cache[1], spare_pages=num_pages)
    backend.pages.view(torch.uint8).fill_(0xFF)
    # Page 1 and the last but two are left for copies.
    pages = torch.randperm(num_pages - 5, generator=generator)[:67] + 2
    table = torch.cat([torch.tensor([num_pages - 1, 0, num_pages - 2]), pages]).view(2, 35).to(DEVICE)
    keys = torch.randn(2, 35 * 128, 128, generator=generator).bfloat16().to(DEVICE)
    queries = torch.randn(2, 7, 4, 128, generator=generator).bfloat16().to(DEVICE)

    backend.append(keys.view(-1, 128), spans_of([4, 4], [0, 0], [35 * 128] * 2, table))
    spans = spans_of([4, 4], [35 * 128 - 7] * 2, [7, 7], table)

    tolerance = backend.flip_tolerance
    references = [
        select(*run, 35 * 128 - 7, spec, fp8_scoring=cache[1], flip_tolerance=tolerance)
        for run in zip(keys, queries, strict=True)
    ]
    for phase in (backend.decode, backend.prefill):
        answer = phase(queries.view(-1, 4, 128), spans, order="ascending", return_scores=True)
        compare(answer, references, spec, "ascending")
    backend.copy_pages(torch.tensor([num_pages - 1, 1]), torch.tensor([1, num_pages - 3]))
    copied = backend.pages.view(torch.uint8)[[num_pages - 1, 1, num_pages - 3]]
    assert torch.equal(copied[0], copied[1]) and torch.equal(copied[0], copied[2])


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_a_call_whose_scores_are_cut_into_slices(key_dtype: Any, generator: torch.Generator) -> None:
    """16,384 queries at 1,048,576 tokens: 2 GiB of scores, of which 512 MiB are there at a time."""
    spec = IndexSpec(num_layers=1, key_dtype=key_dtype)
    tokens, num_queries = spec.max_sequence_tokens, 16_384
    backend = backend_for(spec, [], spare_pages=spec.max_blocks)
    device_generator = torch.Generator(DEVICE).manual_seed(1)
    keys, queries = (
        torch.randn(*shape, generator=device_generator, device=DEVICE, dtype=torch.bfloat16)
        for shape in ((tokens, 128), (num_queries, 4, 128))
    )
    table = torch.randperm(spec.max_blocks, generator=generator)[None].to(DEVICE)
    backend.append(keys, spans_of([0], [0], [tokens], table))
    start = tokens - num_queries

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answer = backend.prefill(
        queries, spans_of([0], [start], [num_queries], table), order="ascending", return_scores=True
    )
    assert torch.cuda.max_memory_allocated() - before < 700 << 20

    assert answer.scores is not None
    sample = [0, 1, 127, 128, 4094, 4095, 4096, 4097, 8191, 8192, 12_287, 12_288, 16_382, 16_383]
    sample += torch.randint(num_queries, (6,), generator=generator).tolist()
    references = [
        select(keys, queries[row : row + 1], start + row, spec, flip_tolerance=backend.flip_tolerance) for row in sample
    ]
    compare(Selection(answer.block_ids[sample], answer.scores[sample]), references, spec, "ascending")


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_strides_beyond_2_to_the_31(key_dtype: Any, generator: torch.Generator) -> None:
    spec = IndexSpec(num_layers=1, key_dtype=key_dtype)
    stride, num_tokens = 120_000_019, 40
    wide = torch.empty(stride * num_tokens, dtype=torch.float8_e4m3fn, device=DEVICE)
    keys = wide.as_strided((num_tokens, 128), (stride, 1))
    queries = wide.as_strided((num_tokens, 4, 128), (stride, 256, 1), 1000)
    keys.copy_(torch.randn(keys.shape, generator=generator))
    queries.copy_(torch.randn(queries.shape, generator=generator))
    backend = backend_for(spec, [])
    spans = spans_of([0], [0], [num_tokens], torch.tensor([[3]], device=DEVICE))

    backend.append(keys, spans)

    reference = select(keys.clone(), queries.clone(), 0, spec, flip_tolerance=backend.flip_tolerance)
    for phase in (backend.decode, backend.prefill):
        compare(phase(queries, spans, order="ascending", return_scores=True), [reference], spec, "ascending")
