"""The backend that a server has on a GPU: prefill through fmha_sm100 where it is ready, every kernel called before."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blockdex_kernels import IndexSpec
from blockdex_kernels.fmha_sm100 import Package
from blockdex_kernels.spec import KeyDtype
from blockdex_kernels.triton import warm_up
from blockdex_kernels.triton.gpu import GpuBackend
from support.kernel_cases import Run, check, load, pages_of, random_run
from support.triton_device import DEVICE

# numpy, in the interpreter, says so when infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

STAND_IN = Path(__file__).resolve().parent.parent / "fmha_stand_in"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Package]:
    """The fmha_sm100 that stands in, newly imported, on what says that it is a chip for it."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.setenv("MINFER_FMHA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    _forget()
    modules = (importlib.import_module(f"fmha_sm100.{name}") for name in ("api", "jit", "msa_warmup"))
    yield Package("fmha_sm100", *modules)
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "fmha_sm100"]:
        del sys.modules[name]


def compiled(package: Package, spec: IndexSpec) -> None:
    package.jit.prebuild_fmha_variants(sorted(package.variants(spec.key_dtype, spec.num_index_heads)))
    package.jit.prebuild_modules(("plan",))


def small(key_dtype: KeyDtype = "bf16", **fields: Any) -> IndexSpec:
    return IndexSpec(**({"num_layers": 2, "num_index_heads": 2, "topk": 3, "key_dtype": key_dtype} | fields))


def backend_for(spec: IndexSpec, runs: list[Run], **options: Any) -> GpuBackend:
    return GpuBackend(spec, pages_of(runs, spec) + 3, DEVICE, reason="tested", **options)


def uneven(spec: IndexSpec, generator: torch.Generator) -> list[Run]:
    lengths = [(900, 12), (140, 20), (640, 1), (128, 6)]
    return [random_run(generator, spec, *each, layer=row % 2) for row, each in enumerate(lengths)]


class Counted:
    """Counts the scores that a package was asked for, and how many of them at once."""

    def __init__(self, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[int] = []
        run = package.api._fmha_sm100

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(kwargs["max_score"].numel())
            return run(*args, **kwargs)

        monkeypatch.setattr(package.api, "_fmha_sm100", counted)


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_prefill_by_fmha(
    key_dtype: KeyDtype, package: Package, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small(key_dtype)
    compiled(package, spec)
    runs = uneven(spec, generator)
    backend = backend_for(spec, runs)
    counted = Counted(package, monkeypatch)

    check(backend, runs, generator, plain=True)

    assert len(counted.calls) == 2, "with scores and without"
    name = "fmha_sm100-fp8" if key_dtype == "fp8_e4m3" else "fmha_sm100"
    assert backend.kernels["prefill"] == (name, "tested; fmha_sm100 is compiled")
    assert backend.kernels["decode"][1] == "tested"


def test_slices_keep_the_bound_of_the_scores(
    package: Package, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are 128 blocks wide, however short the sequences are."""
    spec = small()
    compiled(package, spec)
    runs = uneven(spec, generator)
    backend = backend_for(spec, runs, score_bytes=10 * 2 * 128 * 4)
    counted = Counted(package, monkeypatch)

    check(backend, runs, generator, plain=False)

    # Decode needs more than that too, and is sliced likewise: two selections of 39 queries, 10 at once.
    assert len(counted.calls) == 2 * 4
    assert max(counted.calls) == 10 * 2 * 128


def test_more_heads_than_are_compiled(
    package: Package, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What several callers ask of the same tokens is one call, with the heads of them all."""
    spec = small()
    compiled(package, spec)
    (run,) = runs = [random_run(generator, dataclasses.replace(spec, num_index_heads=5), 600, 30)]
    backend = backend_for(spec, runs)
    counted = Counted(package, monkeypatch)
    spans = load(backend, runs, generator)

    queries = run.queries.to(DEVICE)
    selection = backend.prefill(queries, spans, order="ascending", return_scores=False)

    assert not counted.calls
    two = backend.prefill(queries[:, 3:].contiguous(), spans, order="ascending", return_scores=False)
    assert len(counted.calls) == 1
    assert torch.equal(selection.block_ids[:, 3:], two.block_ids)


@pytest.mark.parametrize(
    ("key_dtype", "fp8_scoring", "why"),
    [
        ("bf16", "native", "tested; fmha_sm100: 5 kernels are not compiled"),
        ("fp8_e4m3", "upcast", "tested; fmha_sm100 does not upcast keys"),
    ],
)
def test_why_it_is_not_fmha(key_dtype: KeyDtype, fp8_scoring: Any, why: str, package: Package) -> None:
    backend = GpuBackend(small(key_dtype), 3, DEVICE, reason="tested", fp8_scoring=fp8_scoring)

    name, reason = backend.kernels["prefill"]
    assert name == backend.kernels["decode"][0]
    assert reason == why


def test_other_chips_do_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    assert GpuBackend(small(), 3, DEVICE, reason="tested").kernels["prefill"][1] == "tested"


def test_warm_up_calls_everything_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the smallest cache there is: what it reads and writes is one page."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(warm_up, "NUM_RUNS", (1, 4))
    monkeypatch.setattr(warm_up, "LENGTHS", (1, 2))
    monkeypatch.setattr(warm_up, "PREFILL_TOKENS", (8, 9))
    spec = small("fp8_e4m3", head_dim=32, block_size=16, max_sequence_tokens=16 * 200)
    backend = GpuBackend(spec, 1, DEVICE, reason="tested")
    asked: set[tuple[Any, ...]] = set()

    def noted(phase: str) -> Any:
        call = getattr(backend, phase)

        def note(tensor: torch.Tensor, spans: Any, **how: Any) -> Any:
            asked.add((phase, *tensor.shape[1:-1], len(spans.layers), spans.max_length, tensor.dtype, *how.values()))
            assert (spans.page_table == 0).all()
            return call(tensor, spans, **how)

        return note

    for phase in ("append", "decode", "prefill"):
        monkeypatch.setattr(backend, phase, noted(phase))

    steps = list(backend.warm_up())

    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert {total for _, total in steps} == {len(steps)}
    bf16 = torch.bfloat16
    assert {dtype for phase, *_, dtype in asked if phase == "append"} == set(warm_up.KEY_DTYPES)
    for runs in (1, 4):
        assert ("append", runs, 1, bf16) in asked
        for length in (1, 2):
            assert ("decode", 2, runs, length, bf16, "ascending", False) in asked
    for order, scores in warm_up.ANSWERS:
        assert ("decode", 2, 1, 1, bf16, order, scores) in asked
    for length in warm_up.PREFILL_TOKENS:
        assert ("prefill", 2, 1, length, bf16, "ascending", False) in asked
