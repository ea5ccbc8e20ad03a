"""What the kernels refuse before they write anything: the message names the argument, the pages stay as they were."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from blockdex_kernels import IndexSpec
from blockdex_kernels.cpu import CpuBackend
from blockdex_kernels.dispatch import Choice, choose_backend, choose_device
from blockdex_kernels.interface import Backend, Spans
from blockdex_kernels.reference import FLIP_TOLERANCE
from support.kernel_cases import spans_of

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


def changed(**columns: Any) -> Spans:
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
    (changed(starts=column(0, 0, 8)[::2]), "spans.starts: stride of the last dimension must be 1, got 2"),
    (
        changed(page_table=torch.tensor([[0, 9, 1, 9, 2], [3, 9, 4, 9, 3]]).int()[:, ::2]),
        "spans.page_table: stride of the last dimension must be 1, got 2",
    ),
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
def test_the_door_opens_to_the_cpu_and_says_why(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    backend = choose_backend(device, SPEC, NUM_PAGES)

    assert isinstance(backend, CpuBackend)
    assert (backend.device, backend.spec, len(backend.pages)) == (torch.device("cpu"), SPEC, NUM_PAGES)
    reason = {"auto": "no GPU: torch is built without CUDA", "cpu": "asked for"}[device]
    assert backend.kernels == dict.fromkeys(("append", "decode", "prefill"), ("torch-cpu", reason))


GPU_SPEC = dataclasses.replace(SPEC, head_dim=64, block_size=16)


def gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Has torch say that the machine has GPUs of these compute capabilities."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capabilities[gpu])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"GPU {gpu}")


@pytest.mark.parametrize(
    ("device", "number", "reason"),
    [
        ("auto", 1, "found: GPU 1, compute capability 8.0"),
        ("cuda:1", 1, "asked for: GPU 1, compute capability 8.0"),
        ("cuda:2", 2, "asked for: GPU 2, compute capability 12.0"),
    ],
)
def test_a_gpu_is_chosen(device: str, number: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, (7, 5), (8, 0), (12, 0))

    assert choose_device(device, GPU_SPEC) == Choice(torch.device("cuda", number), reason)


TOO_OLD = "kernels are for compute capability 8.0 and later, got GPU 0, compute capability 7.5"


@pytest.mark.parametrize(
    ("capabilities", "fields", "obstacle"),
    [
        ([], {}, "there is no CUDA device"),
        ([(7, 5)], {}, TOO_OLD),
        ([(9, 0)], {"head_dim": 8}, "kernels are for head_dim 16, 32, 64, 128, 256, got 8"),
        ([(9, 0)], {"head_dim": 16, "key_dtype": "fp8_e4m3"}, "an fp8 cache are for head_dim 32 and more, got 16"),
        ([(9, 0)], {"block_size": 24}, "kernels are for block_size 16, 32, 64, 128, got 24"),
        ([(9, 0)], {"max_sequence_tokens": 2**21 + 1}, "sequences of at most 131072 blocks, got 131073"),
        ([(9, 0)], {"topk": 65}, "topk of at most 64, got 65"),
    ],
)
def test_what_no_gpu_can_have_goes_to_the_cpu_or_is_refused(
    capabilities: list[tuple[int, int]], fields: dict[str, Any], obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, *capabilities)
    spec = dataclasses.replace(GPU_SPEC, **fields)

    chosen = choose_device("auto", spec)

    assert chosen.device == torch.device("cpu")
    assert chosen.reason.startswith("no GPU: ")
    assert chosen.reason.endswith(obstacle)
    for device in ("cuda", "cuda:0"):
        refused(partial(choose_device, device, spec), obstacle)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, (9, 0), (9, 0))

    refused(lambda: choose_device("cuda:2", GPU_SPEC), "device cuda:2: there are only 2, counted from 0")


def test_a_machine_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "blockdex_kernels.triton.limits", None)

    refused(lambda: choose_device("cuda", GPU_SPEC), "device cuda: Triton cannot be imported: ")
    assert choose_device("auto", GPU_SPEC).device == torch.device("cpu")


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:-1", "cuda0", ""])
def test_a_device_without_kernels_is_refused(device: str) -> None:
    refused(lambda: choose_device(device, SPEC), f"device: must be auto, cpu, cuda or cuda:N, got '{device}'")


def test_backends_say_how_far_from_float64_they_may_be() -> None:
    assert CpuBackend.flip_tolerance == FLIP_TOLERANCE


def test_a_cache_that_cannot_be() -> None:
    scoring: Any = "slow"

    refused(lambda: CpuBackend(SPEC, 0, reason=""), "num_pages: must be at least 1, got 0")
    refused(lambda: CpuBackend(SPEC, 1, reason="", fp8_scoring=scoring), "must be native or upcast, got 'slow'")
