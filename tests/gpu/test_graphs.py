"""Steps captured in CUDA graphs and replayed with other numbers answer as when they are called."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from blockdex_kernels import IndexSpec
from blockdex_kernels.interface import Order, Selection
from support.kernel_cases import load, poison, random_run, spans_of
from support.triton_device import DEVICE, backend_for

RUNS, MOST, BLOCKS = 6, 4, 40
"""What is captured: so many runs of at most so many queries, and places of the page table."""


@triton.jit  # type: ignore[untyped-decorator]
def _write_late_kernel(source, target, count, waits, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Lets the next kernel begin, reads for a while, and only then copies int32 numbers."""
    tl.extra.cuda.gdc_launch_dependents()
    number = tl.arange(0, WIDE)
    value = tl.load(source + number, mask=number < count, other=0)
    for _ in range(waits):
        value = tl.maximum(value, tl.load(source + number, mask=number < count, other=0, volatile=True))
    tl.store(target + number, value, mask=number < count)


def assert_same(ours: Selection, theirs: Selection) -> None:
    assert torch.equal(ours.block_ids, theirs.block_ids)
    assert ours.scores is not None and theirs.scores is not None
    assert torch.equal(ours.scores, theirs.scores)


@pytest.mark.parametrize("order", ["ascending", "score"])
@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_a_decode_step_is_replayed_for_other_batches(key_dtype: Any, order: Order, generator: torch.Generator) -> None:
    """Append and decode as one graph; fewer runs than captured are padded with length 0 and rows of NaN."""
    spec = IndexSpec(num_layers=2, key_dtype=key_dtype)
    backend, eager = (backend_for(spec, [], spare_pages=RUNS * BLOCKS) for _ in range(2))
    history = torch.randn(RUNS * BLOCKS, 2, 128, 128, generator=generator).to(backend.pages.dtype)
    for one in (backend, eager):
        one.pages.copy_(history)
    keys = torch.zeros(RUNS * MOST, 128, dtype=torch.bfloat16, device=DEVICE)
    queries = torch.zeros(RUNS * MOST, 4, 128, dtype=torch.bfloat16, device=DEVICE)
    table = torch.zeros(RUNS, BLOCKS, dtype=torch.int32, device=DEVICE)
    static = dataclasses.replace(spans_of([0] * RUNS, [0] * RUNS, [0] * RUNS, table), max_length=MOST)

    def step() -> Selection:
        backend.append(keys, static)
        return backend.decode(queries, static, order=order, return_scores=True)

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = step()

    for num_runs in (6, 1, 4, 6, 0):
        lengths = torch.randint(1, MOST + 1, (num_runs,), generator=generator).tolist()
        starts = torch.randint(0, BLOCKS * 128 - MOST, (num_runs,), generator=generator).tolist()
        layers = torch.randint(0, 2, (num_runs,), generator=generator).tolist()
        pages = torch.randperm(RUNS * BLOCKS, generator=generator).view(RUNS, BLOCKS)
        total, padding = sum(lengths), [0] * (RUNS - num_runs)
        keys[:total] = torch.randn(total, 128, generator=generator).bfloat16().to(DEVICE)
        queries[:total] = torch.randn(total, 4, 128, generator=generator).bfloat16().to(DEVICE)
        keys[total:], queries[total:] = math.nan, math.nan
        static.layers.copy_(torch.tensor(layers + padding))
        static.starts.copy_(torch.tensor(starts + padding))
        static.lengths.copy_(torch.tensor(lengths + padding))
        static.page_table.copy_(pages)

        graph.replay()

        own = spans_of(layers, starts, lengths, pages[:num_runs].to(DEVICE))
        eager.append(keys[:total], own)
        expected = eager.decode(queries[:total], own, order=order, return_scores=True)
        assert answer.scores is not None
        assert_same(Selection(answer.block_ids[:total], answer.scores[:total]), expected)
        assert (answer.block_ids[total:] == -1).all()
        assert (answer.scores[total:] == -math.inf).all()
        assert torch.equal(backend.pages.view(torch.uint8), eager.pages.view(torch.uint8))


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_a_prefill_is_replayed_for_other_keys_and_queries(key_dtype: Any, generator: torch.Generator) -> None:
    spec = IndexSpec(num_layers=1, key_dtype=key_dtype)
    runs = [random_run(generator, spec, length, 300) for length in (5000, 3000)]
    backend = backend_for(spec, runs)
    spans = load(backend, runs, generator)
    columns = torch.stack([spans.layers, spans.starts, spans.lengths]).cpu().numpy()
    spans = dataclasses.replace(spans, columns=columns)
    queries = torch.cat([run.queries for run in runs]).to(DEVICE)

    def step() -> Selection:
        return backend.prefill(queries, spans, order="ascending", return_scores=True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = step()

    for _ in range(3):
        queries.copy_(torch.randn(queries.shape, generator=generator))
        spans.page_table[:, :20] = torch.randperm(40, generator=generator).view(2, 20).int().to(DEVICE)
        graph.replay()
        assert_same(answer, step())


def test_nothing_is_left_of_a_batch_that_went_before(generator: torch.Generator) -> None:
    """Kernels that start early, as dependents of those before, wait for what they read: steps back to back."""
    spec = IndexSpec(num_layers=1)
    backend = backend_for(spec, [], spare_pages=64)
    poison(backend)
    table = torch.arange(64, device=DEVICE)[None]
    batches = [
        (torch.randn(8192, 128, generator=generator).to(DEVICE), torch.randn(4, 4, 128, generator=generator).to(DEVICE))
        for _ in range(6)
    ]
    whole, last = spans_of([0], [0], [8192], table), spans_of([0], [8188], [4], table)
    last = dataclasses.replace(last, max_length=4)

    def step(keys: torch.Tensor, queries: torch.Tensor) -> Selection:
        backend.append(keys, whole)
        return backend.decode(queries, last, order="score", return_scores=True)

    slowly = []
    for batch in batches:
        slowly.append(step(*batch))
        torch.cuda.synchronize()
    for _ in range(5):
        for quick, slow in zip([step(*batch) for batch in batches], slowly, strict=True):
            assert_same(quick, slow)


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_spans_that_the_kernel_before_writes_late(key_dtype: Any, generator: torch.Generator) -> None:
    """What kernels fetch ahead, from numbers that are not there yet and may be any, neither fails nor is kept."""
    spec = IndexSpec(num_layers=2, key_dtype=key_dtype)
    runs = [random_run(generator, spec, length, 3, layer=1) for length in (9000, 5000, 700, 12_000)]
    backend = backend_for(spec, runs)
    spans = dataclasses.replace(load(backend, runs, generator), max_length=3)
    queries = torch.cat([run.queries for run in runs]).to(DEVICE)
    expected = backend.decode(queries, spans, order="ascending", return_scores=True)
    columns = (spans.layers, spans.starts, spans.lengths, spans.page_table.flatten())
    numbers = torch.cat(columns)
    written = torch.empty_like(numbers)
    layers, starts, lengths, table = torch.split(written, [len(column) for column in columns])
    late = dataclasses.replace(
        spans, layers=layers, starts=starts, lengths=lengths, page_table=table.view_as(spans.page_table)
    )

    for wild in (2**31 - 1, 2**20, 1000):
        written.copy_(torch.randint(-wild, wild, written.shape, generator=generator))
        torch.cuda.synchronize()
        _write_late_kernel[(1,)](numbers, written, len(numbers), 4000, WIDE=triton.next_power_of_2(len(numbers)))
        assert_same(backend.decode(queries, late, order="ascending", return_scores=True), expected)
