"""Decode and prefill against the float64 reference, in the sizes of the model, on random and on adversarial input."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from blockdex_kernels import IndexSpec
from blockdex_kernels.interface import Fp8Scoring, Order, Selection
from support.kernel_cases import Run, check, compare, load, poison, spans_of
from support.triton_device import DEVICE, backend_for
from support.vectorised_reference import select

# Determinism is asked for only so that memory is filled.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
    pytest.mark.usefixtures("prefill_kernel"),
]

CACHES: tuple[tuple[Any, Fp8Scoring], ...] = (("bf16", "native"), ("fp8_e4m3", "native"), ("fp8_e4m3", "upcast"))
MODEL: dict[str, Any] = {"num_layers": 2}
NO_LOCAL: dict[str, Any] = {"num_layers": 3, "num_index_heads": 1, "local_blocks": 0}
FORCED: dict[str, Any] = {"num_layers": 2, "num_index_heads": 8, "init_blocks": 1, "local_blocks": 2, "topk": 12}
MANY_PLACES: dict[str, Any] = {"num_layers": 1, "num_index_heads": 3, "topk": 40}

LONGEST = 60_001
"""Of every random batch: so that few different kernels are compiled."""


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance() -> Iterator[None]:
    """Whatever torch allocates without filling it holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run_of(generator: torch.Generator, spec: IndexSpec, length: int, num_queries: int, layer: int = 0) -> Run:
    """Normally distributed keys and queries in bf16, on the device of the generator."""
    sizes = ((length, spec.head_dim), (num_queries, spec.num_index_heads, spec.head_dim))
    keys, queries = (torch.randn(size, generator=generator, device=generator.device).bfloat16() for size in sizes)
    return Run(keys, queries, layer)


@pytest.fixture
def device_generator() -> torch.Generator:
    """The same numbers in every run, where they are needed."""
    return torch.Generator(DEVICE).manual_seed(20261125)


def random_shapes(generator: torch.Generator, num_queries: int) -> list[tuple[int, int]]:
    """Lengths and queries of seven runs, the first with most queries, the last the longest; rows are odd in number."""
    shapes = []
    for number in range(7):
        length = int(2.0 ** (torch.rand((), generator=generator) * 15.5)) + 1
        queries = int(torch.randint(1, min(length, num_queries) + 1, (), generator=generator))
        shapes.append((length + num_queries, num_queries) if number == 0 else (length, queries))
    queries = shapes.pop()[1]
    if (sum(own for _, own in shapes) + queries) % 2 == 0:
        queries += 1 if queries < num_queries else -1
    return [*shapes, (LONGEST, queries)]


@pytest.mark.parametrize("num_queries", [1, 16, 300])
@pytest.mark.parametrize(
    ("fields", "cache"),
    [(fields, cache) for fields in (MODEL, FORCED) for cache in CACHES]
    + [(NO_LOCAL, CACHES[0]), (NO_LOCAL, CACHES[1]), (MANY_PLACES, CACHES[0]), (MANY_PLACES, CACHES[2])],
)
def test_random_batches(
    fields: dict[str, Any],
    cache: tuple[Any, Fp8Scoring],
    num_queries: int,
    generator: torch.Generator,
    device_generator: torch.Generator,
) -> None:
    spec = IndexSpec(**fields, key_dtype=cache[0])
    for number in range(3 if num_queries == 300 else 10):
        shapes = random_shapes(generator, num_queries)
        runs = [run_of(device_generator, spec, *shape, layer=row % spec.num_layers) for row, shape in enumerate(shapes)]
        order: Order = "score" if number == 0 else "ascending"
        backend = backend_for(spec, runs, cache[1])
        check(backend, runs, generator, order=order, fp8_scoring=cache[1], oracle=select)


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
@pytest.mark.parametrize("fields", [MODEL, NO_LOCAL], ids=["local", "no local"])
def test_edges_of_blocks(
    fields: dict[str, Any],
    cache: tuple[Any, Fp8Scoring],
    generator: torch.Generator,
    device_generator: torch.Generator,
) -> None:
    spec = IndexSpec(**fields, key_dtype=cache[0])
    whole = run_of(device_generator, spec, 4096, 4096)
    starts = (0, 1, 126, 127, 128, 129, 15 * 128 - 1, 16 * 128 - 1, 16 * 128, 17 * 128 - 1, 17 * 128, 3500)
    runs = [Run(whole.keys, whole.queries[start : start + 3], 0, start) for start in starts]

    check(backend_for(spec, runs, cache[1]), runs, generator, fp8_scoring=cache[1], oracle=select)


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
@pytest.mark.parametrize("fields", [MODEL, NO_LOCAL], ids=["local", "no local"])
def test_ties_zeros_and_signs(
    fields: dict[str, Any],
    cache: tuple[Any, Fp8Scoring],
    generator: torch.Generator,
    device_generator: torch.Generator,
) -> None:
    """Few different values, all products exact: nothing may be exchanged."""
    spec = IndexSpec(**fields, key_dtype=cache[0])
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0], device=DEVICE)
    runs = []
    for length, num_queries in ((5000, 3), (20_000, 16), (9000, 200)):
        run = run_of(device_generator, spec, length, num_queries)
        for tensor in (run.keys, run.queries):
            tensor.copy_(values[torch.randint(4, tensor.shape, generator=device_generator, device=DEVICE)])
            tensor[..., 3:] = -0.0
        runs.append(run)

    backend = backend_for(spec, runs, cache[1])
    check(backend, runs, generator, fp8_scoring=cache[1], flip_tolerance=0.0, oracle=select)


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
@pytest.mark.parametrize(("fields", "share"), [(MODEL, 0.0005), (NO_LOCAL, 0.02)], ids=["local", "no local"])
def test_nan_and_infinities(
    fields: dict[str, Any],
    share: float,
    cache: tuple[Any, Fp8Scoring],
    generator: torch.Generator,
    device_generator: torch.Generator,
) -> None:
    spec = IndexSpec(**fields, key_dtype=cache[0])
    odd = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0], device=DEVICE, dtype=torch.bfloat16)
    runs = []
    for length, num_queries in ((5000, 3), (12_000, 16), (9000, 200)):
        run = run_of(device_generator, spec, length, num_queries)
        for tensor in (run.keys, run.queries):
            spots = torch.rand(tensor.shape, generator=device_generator, device=DEVICE) < share
            numbers = torch.randint(6, tensor.shape, generator=device_generator, device=DEVICE)
            tensor.copy_(torch.where(spots, odd[numbers], tensor))
        run.keys[1000:1500] = math.nan
        run.queries[0] = math.inf
        runs.append(run)

    check(backend_for(spec, runs, cache[1]), runs, generator, fp8_scoring=cache[1], oracle=select)


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_a_million_tokens(
    cache: tuple[Any, Fp8Scoring], generator: torch.Generator, device_generator: torch.Generator
) -> None:
    spec = IndexSpec(num_layers=1, key_dtype=cache[0])
    length = spec.max_sequence_tokens
    runs = [run_of(device_generator, spec, length, 40), run_of(device_generator, spec, length - 77, 1)]

    check(backend_for(spec, runs, cache[1]), runs, generator, fp8_scoring=cache[1], oracle=select)


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_uneven_runs_side_by_side(
    cache: tuple[Any, Fp8Scoring], generator: torch.Generator, device_generator: torch.Generator
) -> None:
    """1 to 8,192 blocks, 1 to 8,192 rows, some with nothing to rank, and keys of which one is like no other."""
    spec = IndexSpec(num_layers=2, key_dtype=cache[0])
    shapes = [(5, 5), (102_272, 700), (2048, 2048), (1, 1), (spec.max_sequence_tokens, 3), (40_003, 131), (2049, 1)]
    runs = [run_of(device_generator, spec, *shape, layer=row % 2) for row, shape in enumerate(shapes)]
    runs[1].keys[:, ::32] *= 30  # channels that stand out
    runs[4].keys[:] = runs[4].keys[:128].repeat(len(runs[4].keys) // 128, 1)  # equal blocks
    runs[5].keys.mul_(2.0**-7)  # e4m3's numbers below the normal ones

    backend = backend_for(spec, runs, cache[1])
    check(backend, runs, generator, fp8_scoring=cache[1], oracle=select)
    check(backend, runs[::-1], generator, fp8_scoring=cache[1], oracle=select)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_every_input_dtype_and_stride(
    dtype: torch.dtype, cache: tuple[Any, Fp8Scoring], device_generator: torch.Generator
) -> None:
    spec = IndexSpec(num_layers=2, key_dtype=cache[0])
    keys = (torch.randn(3000, 2, 256, generator=device_generator, device=DEVICE) * 3).to(dtype)[:, 1, ::2]
    queries = torch.randn(4, 256, 27, generator=device_generator, device=DEVICE).to(dtype)
    queries = queries.permute(2, 0, 1)[::3, :, 128:]
    table = torch.arange(96, device=DEVICE).int().view(2, 48).flip(1)[::2, :24]
    backend = backend_for(spec, [], cache[1], spare_pages=48)
    poison(backend)

    backend.append(keys, spans_of([1], [0], [3000], table))
    spans = dataclasses.replace(spans_of([1], [2991], [9], table), page_table=table)

    tolerance = backend.flip_tolerance
    reference = select(keys, queries, 2991, spec, fp8_scoring=cache[1], flip_tolerance=tolerance)
    for phase in (backend.decode, backend.prefill):
        compare(phase(queries, spans, order="ascending", return_scores=True), [reference], spec, "ascending")


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_a_row_is_answered_to_the_bit_alike_however_it_comes(
    cache: tuple[Any, Fp8Scoring], generator: torch.Generator, device_generator: torch.Generator
) -> None:
    """Alone or in a batch, at another place of it, some of its heads, or cut for other numbers of multiprocessors."""
    spec = IndexSpec(num_layers=2, key_dtype=cache[0])
    shapes = [(2900, 1), (30_000, 2), (256, 1), (2900, 9), (90_000, 1), (2700, 3), (23_040, 600), (5, 5), (70_000, 16)]
    runs = [run_of(device_generator, spec, *shape, layer=row % 2) for row, shape in enumerate(shapes)]
    backend = backend_for(spec, runs, cache[1])
    spans = load(backend, runs, generator)
    chip = backend.chip

    def answers(rows: list[int], heads: slice, multiprocessors: int) -> Iterator[tuple[int, int, Selection]]:
        """Row, phase and what it was answered in a batch of some rows."""
        backend.chip = dataclasses.replace(chip, multiprocessors=multiprocessors)
        layers, starts = [runs[row].layer for row in rows], [runs[row].first for row in rows]
        lengths = [len(runs[row].queries) for row in rows]
        batch = spans_of(layers, starts, lengths, spans.page_table[rows])
        queries = torch.cat([runs[row].queries[:, heads] for row in rows])
        for number, phase in enumerate((backend.decode, backend.prefill)):
            selection = phase(queries, batch, order="score", return_scores=True)
            assert selection.scores is not None
            ids, scores = torch.split(selection.block_ids, lengths), torch.split(selection.scores, lengths)
            for row, own_ids, own_scores in zip(rows, ids, scores, strict=True):
                yield row, number, Selection(own_ids, own_scores)

    everything = list(range(len(runs)))
    together = {
        (row, number): selection for row, number, selection in answers(everything, slice(0, 4), chip.multiprocessors)
    }
    batches = [
        ([row], slice(0, 4), count) for row, count in zip(everything, (1, 3, 7, 13, 50, 131, 132, 200, 9), strict=True)
    ]
    batches += [(everything[::-1], slice(0, 4), 33), (everything[3:], slice(1, 3), 132), ([8, 0, 6], slice(3, 4), 5)]
    for rows, heads, multiprocessors in batches:
        for row, number, selection in answers(rows, heads, multiprocessors):
            expected = together[row, number]
            assert selection.scores is not None and expected.scores is not None
            assert torch.equal(selection.block_ids, expected.block_ids[:, heads]), (rows, heads, row, number)
            assert torch.equal(selection.scores, expected.scores[:, heads]), (rows, heads, row, number)
