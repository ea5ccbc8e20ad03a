"""What the kernels refuse at the door: the message names the argument, and the pages stay as they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from blockdex_kernels import IndexSpec
from blockdex_kernels.backend import Backend, Spans, choose_backend
from blockdex_kernels.cpu import CpuBackend
from kernel_cases import spans_of

SPEC = IndexSpec(num_layers=2, num_index_heads=2, head_dim=4, block_size=8, topk=3, max_sequence_tokens=40)
NUM_PAGES = 5
META = torch.device("meta")


@pytest.fixture
def backend() -> CpuBackend:
    backend = CpuBackend(SPEC, NUM_PAGES, reason="tested")
    backend.pages.zero_()
    return backend


def good_spans() -> Spans:
    """Positions 0 to 19 of one sequence, 8 to 10 of another."""
    return spans_of([0, 1], [0, 8], [20, 3], torch.tensor([[0, 1, 2], [3, 4, 3]]))


def changed(**columns: torch.Tensor) -> Spans:
    return dataclasses.replace(good_spans(), **columns)


def column(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


SPANS = [
    (changed(layers=column(0, 2)), "spans.layers: run 1: must be 0 to 1, got 2"),
    (changed(layers=column(-1, 0)), "spans.layers: run 0: must be 0 to 1, got -1"),
    (changed(starts=column(0, -1)), "spans.starts: run 1: must be at least 0, got -1"),
    (changed(lengths=column(23, 0)), "spans.lengths: run 1: must be at least 1, got 0"),
    (changed(lengths=column(20, 4)), "spans.lengths: must sum to the 23 rows beside them, got 24"),
    (changed(starts=column(5, 8)), "spans.lengths: run 0: start + length must be at most 24, got 5 + 20"),
    (
        changed(starts=column(21, 8), page_table=torch.zeros(2, 6, dtype=torch.int32)),
        "spans.lengths: run 0: start + length must be at most 40, got 21 + 20",
    ),
    (changed(page_table=torch.tensor([[0, 1, 5], [3, 4, 3]]).int()), "run 0, block 2: must be 0 to 4, got 5"),
    (changed(page_table=torch.tensor([[0, 1, 2], [3, -1, 3]]).int()), "run 1, block 1: must be 0 to 4, got -1"),
    (changed(layers=column(0, 1).long()), "spans.layers: dtype must be one of int32, got int64"),
    (changed(starts=column(0)), "spans.starts: shape must be [2], got [1]"),
    (changed(lengths=column(20, 3)[:, None]), "spans.lengths: shape must be [2], got [2, 1]"),
    (changed(layers=torch.tensor(0, dtype=torch.int32)), "spans.layers: shape must be [runs], got []"),
    (
        changed(page_table=torch.zeros(3, 3, dtype=torch.int32)),
        "spans.page_table: shape must be [2, blocks], got [3, 3]",
    ),
    (changed(page_table=torch.zeros(2, 3)), "spans.page_table: dtype must be one of int32, got float32"),
    (changed(starts=column(0, 8).to(META)), "spans.starts: must be on cpu, got meta"),
]
KEYS = [
    (torch.ones(23, 5), "keys: shape must be [tokens, 4], got [23, 5]"),
    (torch.ones(23, 4, 1), "keys: shape must be [tokens, 4], got [23, 4, 1]"),
    (torch.ones(23, 4).double(), "keys: dtype must be one of bfloat16, float16, float32, float8_e4m3fn, got float64"),
    (torch.ones(23, 4, device=META), "keys: must be on cpu, got meta"),
    (torch.ones(22, 4), "spans.lengths: must sum to the 22 rows beside them, got 23"),
]
QUERIES = [
    (torch.ones(23, 2, 5), "queries: shape must be [tokens, heads, 4], got [23, 2, 5]"),
    (torch.ones(23, 4), "queries: shape must be [tokens, heads, 4], got [23, 4]"),
    (torch.ones(23, 0, 4), "queries: shape must be [tokens, heads, 4], got [23, 0, 4]"),
    (torch.ones(23, 2, 4).int(), "queries: dtype must be one of bfloat16, float16, float32, float8_e4m3fn, got int32"),
    (torch.ones(23, 2, 4, device=META), "queries: must be on cpu, got meta"),
    (torch.ones(24, 2, 4), "spans.lengths: must sum to the 24 rows beside them, got 23"),
]


def refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        call()
    assert message in str(refusal.value)


def test_the_good_spans_are_taken(backend: Backend) -> None:
    backend.append(torch.ones(23, 4), good_spans())

    assert int(backend.pages.count_nonzero()) == 23 * 4


@pytest.mark.parametrize(("spans", "message"), SPANS, ids=[message for _, message in SPANS])
def test_spans(spans: Spans, message: str, backend: CpuBackend) -> None:
    refused(lambda: backend.append(torch.ones(23, 4), spans), message)
    for phase in (backend.decode, backend.prefill):
        refused(partial(phase, torch.ones(23, 2, 4), spans, order="ascending", return_scores=False), message)
    assert not backend.pages.any()


@pytest.mark.parametrize(("keys", "message"), KEYS, ids=[message for _, message in KEYS])
def test_keys(keys: torch.Tensor, message: str, backend: CpuBackend) -> None:
    refused(lambda: backend.append(keys, good_spans()), message)
    assert not backend.pages.any()


@pytest.mark.parametrize(("queries", "message"), QUERIES, ids=[message for _, message in QUERIES])
def test_queries(queries: torch.Tensor, message: str, backend: CpuBackend) -> None:
    refused(lambda: backend.decode(queries, good_spans(), order="ascending", return_scores=False), message)


def test_an_unknown_order(backend: CpuBackend) -> None:
    order: Any = "falling"

    refused(
        lambda: backend.decode(torch.ones(23, 2, 4), good_spans(), order=order, return_scores=False),
        "order: must be ascending or score, got 'falling'",
    )


def test_pages_beyond_the_run_may_hold_anything(backend: CpuBackend) -> None:
    table = torch.tensor([[0, 1, -7], [99, 4, 3]])

    backend.append(torch.ones(3, 4), spans_of([0, 1], [0, 8], [2, 1], table))

    assert int(backend.pages.count_nonzero()) == 3 * 4
    refused(
        lambda: backend.decode(
            torch.ones(3, 2, 4), spans_of([0, 1], [0, 8], [2, 1], table), order="ascending", return_scores=False
        ),
        "spans.page_table: run 1, block 0: must be 0 to 4, got 99",
    )


@pytest.mark.parametrize(
    ("sources", "destinations", "message"),
    [
        ([0, 1], [2], "destinations: must be as many as sources, got 1 and 2"),
        ([5], [0], "sources: page must be 0 to 4, got 5"),
        ([0, 1], [2, -1], "destinations: page must be 0 to 4, got -1"),
        ([[0]], [[1]], "sources: shape must be [pages], got [1, 1]"),
        ([0.0], [1], "sources: dtype must be one of int64, got float32"),
    ],
)
def test_copies(sources: Any, destinations: Any, message: str, backend: CpuBackend) -> None:
    backend.pages[0] = 1
    before = backend.pages.clone()

    refused(lambda: backend.copy_pages(torch.tensor(sources), torch.tensor(destinations)), message)

    assert torch.equal(backend.pages, before)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_the_door_opens_to_the_cpu_and_says_why(device: str) -> None:
    backend = choose_backend(device, SPEC, NUM_PAGES)

    assert isinstance(backend, CpuBackend)
    assert (backend.device, backend.spec, len(backend.pages)) == (torch.device("cpu"), SPEC, NUM_PAGES)
    assert set(backend.kernels) == {"append", "decode", "prefill"}
    assert all(name and reason for name, reason in backend.kernels.values())


def test_a_device_without_kernels_is_refused() -> None:
    refused(lambda: choose_backend("tpu", SPEC, NUM_PAGES), "device must be auto or cpu, got 'tpu'")


def test_a_cache_that_cannot_be() -> None:
    scoring: Any = "slow"

    refused(lambda: CpuBackend(SPEC, 0, reason=""), "num_pages: must be at least 1, got 0")
    refused(lambda: CpuBackend(SPEC, 1, reason="", fp8_scoring=scoring), "must be native or upcast, got 'slow'")
