"""The CPU backend against the reference, on random and on adversarial input."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from blockdex_kernels import IndexSpec
from blockdex_kernels.cpu import CpuBackend
from blockdex_kernels.interface import Fp8Scoring, Order
from support.kernel_cases import TALLY, Run, check, load, pages_of, poison, random_run, spans_of

ORDERS: tuple[Order, ...] = ("ascending", "score")
CACHES: tuple[tuple[Any, Fp8Scoring], ...] = (("bf16", "native"), ("fp8_e4m3", "native"), ("fp8_e4m3", "upcast"))


def small_spec(**fields: Any) -> IndexSpec:
    """Many blocks of few keys."""
    return IndexSpec(**({"num_layers": 3, "num_index_heads": 2, "head_dim": 16, "block_size": 8, "topk": 6} | fields))


def backend_for(spec: IndexSpec, runs: list[Run], fp8_scoring: Fp8Scoring = "native") -> CpuBackend:
    """With more pages than the runs fill: the others stay poisoned."""
    return CpuBackend(spec, pages_of(runs, spec) + 7, reason="tested", fp8_scoring=fp8_scoring)


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 16 * 128, 16 * 128 + 1, 17 * 128, 3000])
def test_lengths_round_blocks_and_places(
    length: int, order: Order, cache: tuple[Any, Fp8Scoring], generator: torch.Generator
) -> None:
    spec = IndexSpec(num_layers=2, key_dtype=cache[0])
    runs = [random_run(generator, spec, length, min(length, 3), layer=1)]

    check(backend_for(spec, runs, cache[1]), runs, generator, order=order, fp8_scoring=cache[1])


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("forced", [(0, 1), (0, 0), (1, 0), (1, 2), (2, 3), (3, 3), (0, 6), (6, 0)])
def test_forced_blocks_from_the_first_position_on(
    forced: tuple[int, int], order: Order, cache: tuple[Any, Fp8Scoring], generator: torch.Generator
) -> None:
    spec = small_spec(init_blocks=forced[0], local_blocks=forced[1], key_dtype=cache[0])
    runs = [random_run(generator, spec, 100, 100), random_run(generator, spec, 150, 11, layer=2)]

    check(backend_for(spec, runs, cache[1]), runs, generator, order=order, fp8_scoring=cache[1])


@pytest.mark.parametrize("local_blocks", [0, 1])
def test_a_batch_of_uneven_runs_in_mixed_layers(local_blocks: int, generator: torch.Generator) -> None:
    spec = small_spec(local_blocks=local_blocks)
    shapes = [(1, 1), (300, 1), (299, 1), (8, 8), (9, 4), (640, 7), (77, 1), (513, 300), (40, 4), (16, 16), (1200, 1)]
    runs = [random_run(generator, spec, *shape, layer=row % 3) for row, shape in enumerate(shapes)]

    check(backend_for(spec, runs), runs, generator, plain=True)


def test_queries_in_the_middle_of_a_sequence(generator: torch.Generator) -> None:
    spec = small_spec()
    whole = random_run(generator, spec, 200, 200)
    runs = [Run(whole.keys, whole.queries[start : start + 5], 0, start) for start in (0, 3, 7, 8, 100, 195)]

    check(backend_for(spec, runs), runs, generator)


def test_prefill_cut_into_slices(generator: torch.Generator) -> None:
    spec = IndexSpec(num_layers=1, head_dim=16)
    runs = [random_run(generator, spec, 3000, 1300), random_run(generator, spec, 2600, 513)]

    check(backend_for(spec, runs), runs, generator)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 8])
def test_any_number_of_heads(num_heads: int, generator: torch.Generator) -> None:
    spec = small_spec(num_index_heads=num_heads)
    runs = [random_run(generator, spec, 130, 3), random_run(generator, spec, 90, 1)]

    check(backend_for(spec, runs), runs, generator)


def test_a_subset_of_the_heads_is_answered_alike(generator: torch.Generator) -> None:
    spec = small_spec(num_index_heads=4)
    runs = [random_run(generator, spec, 400, 5)]
    backend = backend_for(spec, runs)
    whole = check(backend, runs, generator)

    spans = load(backend, runs, generator)
    part = backend.decode(runs[0].queries[:, 1:3], spans, order="ascending", return_scores=True)

    assert torch.equal(part.block_ids, whole.block_ids[:, 1:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_every_input_dtype(dtype: torch.dtype, cache: tuple[Any, Fp8Scoring], generator: torch.Generator) -> None:
    spec = small_spec(key_dtype=cache[0])
    runs = [
        Run((run.keys * 3).to(dtype), run.queries.to(dtype), run.layer)
        for run in (random_run(generator, spec, 333, 4), random_run(generator, spec, 90, 1, layer=1))
    ]

    check(backend_for(spec, runs, cache[1]), runs, generator, fp8_scoring=cache[1])


@pytest.mark.parametrize(("head_dim", "block_size"), [(1, 1), (3, 5), (7, 16), (130, 3), (256, 64), (1, 600_000)])
def test_odd_sizes(head_dim: int, block_size: int, generator: torch.Generator) -> None:
    for key_dtype, local_blocks in itertools.product(("bf16", "fp8_e4m3"), (0, 1)):
        spec = small_spec(
            head_dim=head_dim, block_size=block_size, key_dtype=key_dtype, local_blocks=local_blocks, num_index_heads=3
        )
        num_blocks = 20 if block_size < 1000 else 1
        runs = [random_run(generator, spec, num_blocks * block_size + 1, 2), random_run(generator, spec, block_size, 1)]

        check(backend_for(spec, runs), runs, generator)


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
@pytest.mark.parametrize("local_blocks", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_ties_zeros_and_signs(
    order: Order, local_blocks: int, cache: tuple[Any, Fp8Scoring], generator: torch.Generator
) -> None:
    """Few different values: most blocks score the same, and zeros of either sign meet."""
    spec = small_spec(key_dtype=cache[0], local_blocks=local_blocks, head_dim=2)
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0])
    runs = []
    for length in (100, 241):
        keys = values[torch.randint(4, (length, 2), generator=generator)]
        queries = values[torch.randint(4, (20, 2, 2), generator=generator)]
        runs.append(Run(keys, queries))

    check(backend_for(spec, runs, cache[1]), runs, generator, order=order, fp8_scoring=cache[1])


def test_sums_that_only_rounding_tells_apart_are_flips(generator: torch.Generator) -> None:
    """Every key holds the same numbers in another order, so all blocks score the same, but for what fp32 rounds."""
    spec = small_spec(head_dim=128)
    numbers = torch.randn(128, generator=generator) * torch.logspace(-20, 0, 128, base=2.0)
    keys = torch.stack([numbers[torch.randperm(128, generator=generator)] for _ in range(200)])
    runs = [Run(keys, torch.ones(4, 2, 128))]
    before = TALLY.flips

    check(backend_for(spec, runs), runs, generator)

    assert TALLY.flips > before


def test_all_blocks_equal_select_the_first(generator: torch.Generator) -> None:
    spec = small_spec()
    runs = [Run(torch.ones(160, 16), torch.ones(1, 2, 16))]

    selection = check(backend_for(spec, runs), runs, generator)

    assert selection.block_ids[0].tolist() == [[0, 1, 2, 3, 4, 19]] * 2


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
@pytest.mark.parametrize("local_blocks", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("where", ["keys", "queries", "both"])
def test_nan_and_infinities(
    where: str, order: Order, local_blocks: int, cache: tuple[Any, Fp8Scoring], generator: torch.Generator
) -> None:
    spec = small_spec(key_dtype=cache[0], local_blocks=local_blocks, head_dim=3)
    odd = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0])
    runs = []
    for length, num_queries in ((97, 30), (250, 9)):
        run = random_run(generator, spec, length, num_queries)
        for tensor in (run.keys, run.queries):
            if where == "both" or tensor is getattr(run, where):
                spots = torch.rand(tensor.shape, generator=generator) < 0.1
                tensor[spots] = odd[torch.randint(6, (int(spots.sum()),), generator=generator)]
        run.keys[16:40] = math.nan
        runs.append(run)

    check(backend_for(spec, runs, cache[1]), runs, generator, order=order, fp8_scoring=cache[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_rows_of_one_odd_value(value: float, generator: torch.Generator) -> None:
    spec = small_spec()
    run = random_run(generator, spec, 170, 4)
    runs = [Run(run.keys, torch.full_like(run.queries, value)), Run(torch.full_like(run.keys, value), run.queries)]

    check(backend_for(spec, runs), runs, generator)


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_large_and_small_magnitudes(key_dtype: Any, generator: torch.Generator) -> None:
    spec = small_spec(key_dtype=key_dtype)
    run = random_run(generator, spec, 210, 6)
    runs = [
        Run(run.keys * key_scale, run.queries * query_scale)
        for key_scale, query_scale in ((1e3, 1e20), (1e-2, 1e-20), (100.0, 1e-30), (1.0, 1e30))
    ]

    check(backend_for(spec, runs), runs, generator)


@pytest.mark.parametrize("raw_scores", [False, True])
def test_scores_beyond_float32_are_infinite(raw_scores: bool, generator: torch.Generator) -> None:
    spec = small_spec(key_dtype="fp8_e4m3")
    run = Run(keys=torch.full((9, spec.head_dim), 400.0), queries=torch.full((1, 2, spec.head_dim), 3e38))
    backend = backend_for(spec, [run])
    spans = load(backend, [run], generator)
    selection = backend.decode(run.queries, spans, order="ascending", return_scores=True, raw_scores=raw_scores)
    assert selection.scores is not None
    assert selection.scores[0, :, :2].tolist() == [[math.inf] * 2] * 2


def test_every_e4m3_number_is_scored_as_it_is() -> None:
    spec = IndexSpec(
        num_layers=1,
        num_index_heads=1,
        head_dim=1,
        block_size=1,
        topk=256,
        local_blocks=0,
        scale=1.0,
        key_dtype="fp8_e4m3",
    )
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    backend = CpuBackend(spec, 256, reason="tested", fp8_scoring="upcast")
    table = torch.arange(256)[None]

    backend.append(codes[:, None], spans_of([0], [0], [256], table))
    last = spans_of([0], [255], [1], table)
    scores = backend.decode(torch.ones(1, 1, 1), last, order="ascending", return_scores=True).scores

    assert scores is not None
    assert torch.equal(scores.flatten(), codes.float().nan_to_num(nan=-math.inf))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_lone_fp8_nan_of_either_sign_counts_as_one(code: int, generator: torch.Generator) -> None:
    spec = small_spec(key_dtype="fp8_e4m3")
    run = random_run(generator, spec, 160, 4)
    keys = run.keys.to(torch.float8_e4m3fn)
    keys.view(torch.uint8)[20, 3] = code
    runs = [Run(keys, run.queries.to(torch.float8_e4m3fn))]

    check(backend_for(spec, runs), runs, generator)


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_a_row_is_answered_to_the_bit_alike_alone_and_in_a_batch(key_dtype: Any, generator: torch.Generator) -> None:
    spec = IndexSpec(num_layers=2, key_dtype=key_dtype)
    shapes = [(2900, 1), (3000, 2), (2560, 1), (2900, 9), (9000, 1), (2700, 3), (2304, 600)]
    runs = [random_run(generator, spec, *shape, layer=row % 2) for row, shape in enumerate(shapes)]
    backend = backend_for(spec, runs)
    spans = load(backend, runs, generator)
    together = backend.decode(torch.cat([run.queries for run in runs]), spans, order="score", return_scores=True)
    assert together.scores is not None

    rows = torch.split(together.block_ids, spans.lengths.tolist())
    scores = torch.split(together.scores, spans.lengths.tolist())
    for row, run in enumerate(runs):
        alone = spans_of([run.layer], [run.first], [len(run.queries)], spans.page_table[row : row + 1])
        for heads in (slice(0, 4), slice(1, 2), slice(2, 4)):
            answer = backend.decode(run.queries[:, heads], alone, order="score", return_scores=True)
            assert answer.scores is not None
            assert torch.equal(answer.block_ids, rows[row][:, heads])
            if heads == slice(0, 4):
                assert torch.equal(answer.scores, scores[row])
            else:
                # On some processors the BLAS sums products of fewer rows in another order.
                torch.testing.assert_close(answer.scores, scores[row][:, heads], rtol=2.0**-20, atol=2.0**-20)


def test_strided_input_is_read_as_it_is(generator: torch.Generator) -> None:
    spec = small_spec()
    run = random_run(generator, spec, 100, 4)
    wide_keys = torch.zeros(100, 32).normal_(generator=generator)
    wide_queries = torch.zeros(2, 16, 4).normal_(generator=generator)
    runs = [Run(wide_keys[:, ::2], wide_queries.permute(2, 0, 1), run.layer)]

    check(backend_for(spec, runs), runs, generator)


def test_no_gradient_is_recorded(generator: torch.Generator) -> None:
    spec = small_spec()
    run = random_run(generator, spec, 100, 4)
    runs = [Run(run.keys.requires_grad_(), run.queries.requires_grad_())]
    backend = backend_for(spec, runs)
    spans = load(backend, runs, generator)

    selection = backend.decode(runs[0].queries, spans, order="score", return_scores=True)

    assert selection.scores is not None
    assert not (backend.pages.requires_grad or selection.scores.requires_grad)


def test_append_writes_its_positions_and_nothing_else(generator: torch.Generator) -> None:
    spec = small_spec()
    backend = CpuBackend(spec, 9, reason="tested")
    backend.pages.zero_()
    spans = spans_of([0, 2], [6, 15], [11, 2], torch.tensor([[4, 7, 0], [2, 3, 8]]))
    keys = torch.randn(13, spec.head_dim, generator=generator).bfloat16()

    backend.append(keys, spans)

    expected = torch.zeros_like(backend.pages)
    expected[4, 0, 6:] = keys[:2]
    expected[7, 0] = keys[2:10]
    expected[0, 0, 0] = keys[10]
    expected[3, 2, 7] = keys[11]
    expected[8, 2, 0] = keys[12]
    assert torch.equal(backend.pages, expected)


def test_append_of_more_rows_than_are_cast_at_once(generator: torch.Generator) -> None:
    spec = small_spec(head_dim=130, block_size=64, num_layers=1)
    runs = [random_run(generator, spec, length, 1) for length in (33_000, 40_000)]

    check(backend_for(spec, runs), runs, generator)


def test_pages_are_copied_in_order_and_in_every_layer(generator: torch.Generator) -> None:
    spec = small_spec()
    backend = CpuBackend(spec, 4, reason="tested")
    backend.pages.copy_(torch.randn(backend.pages.shape, generator=generator))
    before = backend.pages.clone()

    backend.copy_pages(torch.tensor([0, 1]), torch.tensor([1, 3]))

    assert torch.equal(backend.pages, before[torch.tensor([0, 0, 2, 0])])


def test_an_empty_batch_is_answered_with_nothing() -> None:
    spec = small_spec()
    backend = CpuBackend(spec, 4, reason="tested")
    poison(backend)
    none = spans_of([], [], [], torch.zeros(0, 3))

    backend.append(torch.zeros(0, spec.head_dim), none)
    selection = backend.decode(torch.zeros(0, 2, spec.head_dim), none, order="ascending", return_scores=True)

    assert selection.block_ids.shape == (0, 2, spec.topk)
