"""The Triton kernels against the reference, through their backend: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from blockdex_kernels import IndexSpec
from blockdex_kernels.casts import cast_keys
from blockdex_kernels.interface import Fp8Scoring, Order, Selection, Spans
from blockdex_kernels.reference import select
from blockdex_kernels.triton import TritonBackend
from blockdex_kernels.triton.prefill import max_items, split
from support.kernel_cases import Run, check, compare, load, poison, random_run, spans_of
from support.triton_device import DEVICE, backend_for

# numpy, in the interpreter, says so when infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CACHES: tuple[tuple[Any, Fp8Scoring], ...] = (("bf16", "native"), ("fp8_e4m3", "native"), ("fp8_e4m3", "upcast"))
ORDERS: tuple[Order, ...] = ("ascending", "score")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance() -> Iterator[None]:
    """Whatever torch allocates without filling it holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def small_spec(**fields: Any) -> IndexSpec:
    """Many blocks of few keys."""
    sizes = {"num_layers": 3, "num_index_heads": 1, "head_dim": 32, "block_size": 16, "topk": 6}
    return IndexSpec(**(sizes | fields))


def select_both(backend: TritonBackend, queries: torch.Tensor, spans: Spans, order: Order = "score") -> list[Selection]:
    """What decode and prefill answer, with scores."""
    phases = (backend.decode, backend.prefill)
    return [phase(queries.to(DEVICE), spans, order=order, return_scores=True) for phase in phases]


@pytest.mark.parametrize(
    ("forced", "cache", "order"),
    [
        ((0, 1), CACHES[0], "ascending"),
        ((0, 0), CACHES[1], "score"),
        ((0, 0), CACHES[0], "ascending"),
        ((1, 0), CACHES[2], "score"),
        ((1, 2), CACHES[0], "score"),
        ((2, 3), CACHES[1], "ascending"),
        ((3, 3), CACHES[0], "score"),
        ((0, 6), CACHES[1], "score"),
        ((6, 0), CACHES[2], "ascending"),
    ],
)
def test_forced_blocks_at_the_edges_of_blocks(
    forced: tuple[int, int], cache: tuple[Any, Fp8Scoring], order: Order, generator: torch.Generator
) -> None:
    spec = small_spec(init_blocks=forced[0], local_blocks=forced[1], key_dtype=cache[0])
    whole = random_run(generator, spec, 440, 440)
    shapes = ((0, 1), (15, 2), (95, 2), (399, 2))
    runs = [Run(whole.keys, whole.queries[start : start + length], 1, start) for start, length in shapes]

    check(backend_for(spec, runs, cache[1]), runs, generator, order=order, fp8_scoring=cache[1])


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_lengths_round_blocks_and_places_of_the_model(
    cache: tuple[Any, Fp8Scoring], generator: torch.Generator
) -> None:
    spec = IndexSpec(num_layers=2, num_index_heads=1, key_dtype=cache[0])
    runs = [random_run(generator, spec, length, 1, layer=1) for length in (1, 128, 129, 16 * 128, 17 * 128 + 1)]

    check(backend_for(spec, runs, cache[1]), runs, generator, fp8_scoring=cache[1])


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_a_batch_of_uneven_runs_in_mixed_layers(cache: tuple[Any, Fp8Scoring], generator: torch.Generator) -> None:
    spec = small_spec(key_dtype=cache[0])
    shapes = [(1, 1), (300, 1), (16, 3), (640, 2), (77, 1), (1200, 1)]
    runs = [random_run(generator, spec, *shape, layer=row % 3) for row, shape in enumerate(shapes)]

    check(backend_for(spec, runs, cache[1]), runs, generator, fp8_scoring=cache[1], plain=True)


@pytest.mark.parametrize(("num_heads", "num_queries"), [(1, 16), (3, 5), (4, 4), (8, 2)])
def test_any_number_of_heads_and_queries(num_heads: int, num_queries: int, generator: torch.Generator) -> None:
    """Few blocks: all are selected, so that every score is compared."""
    spec = small_spec(num_index_heads=num_heads)
    runs = [random_run(generator, spec, 95, num_queries), random_run(generator, spec, 33, 1, layer=2)]

    check(backend_for(spec, runs), runs, generator)


@pytest.mark.parametrize(("num_heads", "num_queries"), [(8, 19), (3, 45)])
def test_decode_of_more_rows_than_one_read_serves(num_heads: int, num_queries: int, generator: torch.Generator) -> None:
    spec = small_spec(num_index_heads=num_heads, local_blocks=0)
    runs = [random_run(generator, spec, 70, num_queries), random_run(generator, spec, 20, 2)]
    backend = backend_for(spec, runs)
    spans = load(backend, runs, generator)
    queries = torch.cat([run.queries for run in runs]).to(DEVICE)

    decoded = backend.decode(queries, spans, order="score", return_scores=True)

    compare(decoded, [select(run.keys, run.queries, run.first, spec, order="score") for run in runs], spec, "score")


@pytest.mark.parametrize("forced", [(0, 0), (0, 1), (1, 2)])
def test_prefill_of_runs_that_cross_tiles(forced: tuple[int, int], generator: torch.Generator) -> None:
    spec = small_spec(num_index_heads=3, init_blocks=forced[0], local_blocks=forced[1])
    runs = [random_run(generator, spec, length, num_queries) for length, num_queries in ((80, 25), (50, 3), (90, 12))]
    backend = backend_for(spec, runs)
    spans = load(backend, runs, generator)
    queries = torch.cat([run.queries for run in runs]).to(DEVICE)

    prefilled = backend.prefill(queries, spans, order="ascending", return_scores=True)

    compare(prefilled, [select(run.keys, run.queries, run.first, spec) for run in runs], spec, "ascending")


@pytest.mark.parametrize("num_tokens", [1, 3, 5])
def test_slices_of_what_the_scores_may_take(num_tokens: int, generator: torch.Generator) -> None:
    spec = small_spec(num_index_heads=2)
    runs = [
        random_run(generator, spec, 150, 2),
        random_run(generator, spec, 40, 4),
        random_run(generator, spec, 170, 1),
    ]
    width = 32 * 4 * 2

    check(backend_for(spec, runs, score_bytes=num_tokens * width), runs, generator, order="score")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_every_input_dtype_and_stride(
    dtype: torch.dtype, cache: tuple[Any, Fp8Scoring], generator: torch.Generator
) -> None:
    """Few blocks: all are selected, so that every score is compared."""
    spec = small_spec(key_dtype=cache[0], num_index_heads=2)
    keys = (torch.randn(85, 2, 64, generator=generator) * 3).to(dtype)[:, 1, ::2]
    queries = torch.randn(2, 64, 9, generator=generator).to(dtype).permute(2, 0, 1)[::3, :, :32]
    table = torch.arange(6, device=DEVICE).flip(0)[None]
    backend = backend_for(spec, [Run(keys, queries)], cache[1])
    poison(backend)

    backend.append(keys.to(DEVICE), spans_of([2], [0], [85], table))
    selections = select_both(backend, queries, spans_of([2], [82], [3], table), "ascending")

    tolerance = backend.flip_tolerance
    reference = select(keys, queries, 82, spec, fp8_scoring=cache[1], flip_tolerance=tolerance)
    for selection in selections:
        compare(selection, [reference], spec, "ascending")


@pytest.mark.parametrize(
    ("cache", "local_blocks", "order"),
    [(CACHES[0], 0, "ascending"), (CACHES[0], 1, "score"), (CACHES[1], 1, "ascending"), (CACHES[2], 0, "score")],
)
def test_ties_zeros_and_signs(
    cache: tuple[Any, Fp8Scoring], local_blocks: int, order: Order, generator: torch.Generator
) -> None:
    """Few different values: most blocks score the same, and zeros of either sign meet. All products are exact."""
    spec = small_spec(key_dtype=cache[0], local_blocks=local_blocks)
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0])
    runs = []
    for length in (100, 600):
        keys = values[torch.randint(4, (length, 32), generator=generator)]
        queries = values[torch.randint(4, (3, 1, 32), generator=generator)]
        keys[:, 2:], queries[..., 2:] = 0.0, -0.0
        runs.append(Run(keys, queries))

    check(backend_for(spec, runs, cache[1]), runs, generator, order=order, fp8_scoring=cache[1], flip_tolerance=0.0)


@pytest.mark.parametrize(
    ("where", "cache", "local_blocks", "order"),
    [
        ("keys", CACHES[0], 0, "ascending"),
        ("keys", CACHES[1], 1, "score"),
        ("keys", CACHES[2], 0, "score"),
        ("queries", CACHES[0], 1, "score"),
        ("queries", CACHES[1], 0, "ascending"),
        ("both", CACHES[0], 0, "score"),
        ("both", CACHES[1], 0, "score"),
        ("both", CACHES[2], 1, "ascending"),
    ],
)
def test_nan_and_infinities(
    where: str, cache: tuple[Any, Fp8Scoring], local_blocks: int, order: Order, generator: torch.Generator
) -> None:
    spec = small_spec(key_dtype=cache[0], local_blocks=local_blocks)
    odd = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0])
    runs = []
    for length, num_queries in ((97, 3), (390, 3)):
        run = random_run(generator, spec, length, num_queries)
        for tensor in (run.keys, run.queries):
            if where == "both" or tensor is getattr(run, where):
                spots = torch.rand(tensor.shape, generator=generator) < 0.03
                tensor[spots] = odd[torch.randint(6, (int(spots.sum()),), generator=generator)]
        run.keys[16:50] = math.nan
        runs.append(run)

    check(backend_for(spec, runs, cache[1]), runs, generator, order=order, fp8_scoring=cache[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1.0])
def test_rows_of_one_odd_value(value: float, generator: torch.Generator) -> None:
    spec = small_spec()
    run = random_run(generator, spec, 120, 1)
    runs = [Run(run.keys, torch.full_like(run.queries, value)), Run(torch.full_like(run.keys, value), run.queries)]

    check(backend_for(spec, runs), runs, generator)


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_large_and_small_magnitudes(key_dtype: Any, generator: torch.Generator) -> None:
    spec = small_spec(key_dtype=key_dtype)
    run = random_run(generator, spec, 90, 1)
    scales = ((1e3, 1e20), (1e-2, 1e-20), (100.0, 1e-30), (1.0, 1e30))
    runs = [Run(run.keys * key_scale, run.queries * query_scale) for key_scale, query_scale in scales]

    check(backend_for(spec, runs), runs, generator)


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_a_row_is_answered_to_the_bit_alike_however_it_comes(key_dtype: Any, generator: torch.Generator) -> None:
    """Alone or in a batch, some of its heads, or cut for other numbers of multiprocessors.

    All products are exact: the interpreter sums them in an order of its own.
    """
    spec = small_spec(key_dtype=key_dtype, num_index_heads=2)
    runs = [random_run(generator, spec, *shape, layer=row) for row, shape in enumerate([(333, 1), (50, 2), (410, 1)])]
    runs = [Run((run.keys * 2).round() / 2, (run.queries * 2).round() / 2, run.layer) for run in runs]
    backend = backend_for(spec, runs)
    spans = load(backend, runs, generator)
    together = select_both(backend, torch.cat([run.queries for run in runs]), spans)
    ends = spans.lengths.cumsum(0).tolist()

    for row, run, end, number in zip(range(3), runs, ends, (1, 5, 8), strict=True):
        backend.chip = dataclasses.replace(backend.chip, multiprocessors=number)
        alone = spans_of([run.layer], [run.first], [len(run.queries)], spans.page_table[row : row + 1])
        for heads in (slice(0, 2), slice(1, 2)):
            for batch, answer in zip(together, select_both(backend, run.queries[:, heads], alone), strict=True):
                rows = slice(end - len(run.queries), end)
                assert torch.equal(answer.block_ids, batch.block_ids[rows, heads])
                assert answer.scores is not None and batch.scores is not None
                assert torch.equal(answer.scores, batch.scores[rows, heads])


def test_padded_runs_and_rows_are_answered_with_nothing(generator: torch.Generator) -> None:
    """As in a CUDA graph that is replayed for fewer runs than it was captured for."""
    spec = small_spec(init_blocks=1)
    runs = [random_run(generator, spec, 200, 2, layer=1), random_run(generator, spec, 130, 1)]
    backend = backend_for(spec, runs)
    real = load(backend, runs, generator)
    unreadable = torch.full_like(real.page_table[:1], 2**31 - 1)
    table = torch.cat([unreadable, real.page_table[:1], unreadable, real.page_table[1:], unreadable])
    layers, starts = [9999, 1, -1, 0, 0], [-5, runs[0].first, 2**30, runs[1].first, 0]
    padded = dataclasses.replace(spans_of(layers, starts, [0, 2, 0, 1, 0], table), max_length=4)
    queries = torch.cat([runs[0].queries, runs[1].queries, torch.full((3, 1, 32), math.nan)]).to(DEVICE)

    for order in ORDERS:
        answer = backend.decode(queries, padded, order=order, return_scores=True)
        unpadded = backend.decode(queries[:3], real, order=order, return_scores=True)
        assert answer.scores is not None and unpadded.scores is not None
        assert torch.equal(answer.block_ids[:3], unpadded.block_ids)
        assert torch.equal(answer.scores[:3], unpadded.scores)
        assert (answer.block_ids[3:] == -1).all()
        assert (answer.scores[3:] == -math.inf).all()


def test_an_empty_batch_is_answered_with_nothing() -> None:
    spec = small_spec()
    backend = backend_for(spec, [])
    poison(backend)
    none = spans_of([], [], [], torch.zeros(0, 3, device=DEVICE))

    backend.append(torch.zeros(0, spec.head_dim, device=DEVICE), none)
    for selection in select_both(backend, torch.zeros(0, 2, spec.head_dim), none):
        assert selection.block_ids.shape == (0, 2, spec.topk)


def test_no_gradient_is_recorded(generator: torch.Generator) -> None:
    spec = small_spec()
    run = random_run(generator, spec, 40, 1)
    runs = [Run(run.keys.requires_grad_(), run.queries.requires_grad_())]
    backend = backend_for(spec, runs)

    for selection in select_both(backend, runs[0].queries, load(backend, runs, generator)):
        assert selection.scores is not None
        assert not (backend.pages.requires_grad or selection.scores.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_append_writes_its_positions_and_nothing_else(
    key_dtype: Any, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Zero-length runs among the others, tails of pages, several layers; keys that fp8 rounds and saturates."""
    spec = small_spec(key_dtype=key_dtype, block_size=16)
    backend = backend_for(spec, [], spare_pages=9)
    before = torch.randint(100, backend.pages.view(torch.uint8).shape, dtype=torch.uint8, generator=generator)
    backend.pages.view(torch.uint8).copy_(before)
    table = torch.tensor([[9, 9, 9], [4, 7, 0], [9, 9, 9], [2, 3, 8], [9, 9, 9]], device=DEVICE)
    keys = (torch.randn(23, spec.head_dim, generator=generator) * 200).to(dtype)
    keys[3, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0]).to(dtype)

    backend.append(keys.to(DEVICE), spans_of([7, 0, 1, 2, 0], [3, 14, 0, 31, 0], [0, 21, 0, 2, 0], table))

    expected = before.view(backend.pages.dtype)
    cast = cast_keys(keys, key_dtype)
    expected[4, 0, 14:] = cast[:2]
    expected[7, 0] = cast[2:18]
    expected[0, 0, :3] = cast[18:21]
    expected[3, 2, 15] = cast[21]
    expected[8, 2, 0] = cast[22]
    written = backend.pages.cpu()
    same = (written.view(torch.uint8) == expected.view(torch.uint8)).view(*written.shape, -1).all(dim=-1)
    assert (same | (written.float().isnan() & expected.float().isnan())).all()


def test_append_of_many_runs(generator: torch.Generator) -> None:
    spec = small_spec()
    lengths = torch.randint(0, 4, (70,), generator=generator).tolist()
    backend = backend_for(spec, [], spare_pages=140)
    poison(backend)
    table = torch.randperm(140, generator=generator).view(70, 2)
    starts = torch.randint(0, 29, (70,), generator=generator).tolist()
    layers = torch.randint(0, 3, (70,), generator=generator).tolist()
    keys = torch.randn(sum(lengths), spec.head_dim, generator=generator).bfloat16()

    backend.append(keys.to(DEVICE), spans_of(layers, starts, lengths, table.to(DEVICE)))

    expected = torch.full_like(backend.pages, math.nan, device="cpu")
    rows = iter(keys)
    for row, (layer, start, length) in enumerate(zip(layers, starts, lengths, strict=True)):
        for position in range(start, start + length):
            expected[table[row, position // 16], layer, position % 16] = next(rows)
    torch.testing.assert_close(backend.pages.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_pages_are_copied_in_order_and_in_every_layer(key_dtype: Any, generator: torch.Generator) -> None:
    backend = backend_for(small_spec(key_dtype=key_dtype), [], spare_pages=4)
    pages = backend.pages.view(torch.uint8)
    pages.copy_(torch.randint(256, pages.shape, dtype=torch.uint8, generator=generator))
    before = pages.clone()

    backend.copy_pages(torch.tensor([0, 1]), torch.tensor([1, 3]))

    assert torch.equal(pages, before[torch.tensor([0, 0, 2, 0])])


@pytest.mark.parametrize(
    ("forced", "cache", "length", "start"),
    [
        ((0, 1), CACHES[0], 16, 300),
        ((0, 0), CACHES[1], 11, 501),
        ((2, 1), CACHES[2], 3, 400),
        ((2, 0), CACHES[0], 15, 90),
        ((0, 1), CACHES[0], 1, 0),
    ],
)
def test_a_run_planned_on_the_device(
    forced: tuple[int, int], cache: tuple[Any, Fp8Scoring], length: int, start: int, generator: torch.Generator
) -> None:
    """As one planned on the host, bit for bit, and nothing for the rows that pad it."""
    spec = small_spec(num_index_heads=3, key_dtype=cache[0], init_blocks=forced[0], local_blocks=forced[1])
    runs = [random_run(generator, spec, start + length, length, layer=2)]
    backend = backend_for(spec, runs, cache[1])
    spans = load(backend, runs, generator)
    expected = backend.prefill(runs[0].queries.to(DEVICE), spans, order="ascending", return_scores=False)
    rows = 3 * length
    queries = torch.zeros(50, spec.head_dim, dtype=runs[0].queries.dtype, device=DEVICE)
    queries[:rows] = runs[0].queries.to(DEVICE).flatten(0, 1)
    plan = backend.split(rows, -(-(start + length) // spec.block_size))
    numbers = torch.tensor([2, start, length, *plan, 3, 0, 0], dtype=torch.int32, device=DEVICE)
    block_ids = torch.full((50, spec.topk), 12345, dtype=torch.int32, device=DEVICE)

    backend.prefill_into(block_ids, queries, numbers, spans.page_table, 96)

    assert torch.equal(block_ids[:rows].view_as(expected.block_ids), expected.block_ids)
    assert (block_ids[rows:] == -1).all()


@pytest.mark.parametrize("blocks", [1, 40, 1000, 8192])
def test_the_last_round_of_a_split_keeps_most_programs_busy(blocks: int) -> None:
    for rows in range(256, 32_769, 256):
        tiles, ranges = split(rows, blocks, tile=256, programs=132)
        items = tiles * ranges
        assert items <= max_items(rows, tile=256, programs=132)
        assert ranges == 1 or blocks // ranges >= 16
        if blocks >= 1000 and tiles > 1:
            assert items / (132 * -(-items // 132)) > 0.85, (tiles, ranges)
