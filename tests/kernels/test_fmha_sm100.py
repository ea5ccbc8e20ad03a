"""Prefill scoring through fmha_sm100: against the reference with a package that stands in, and the call by its source.

`BLOCKDEX_VLLM_SOURCE`, a folder with an unpacked vLLM wheel, or an installed vLLM gives the source.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from blockdex_kernels import IndexSpec, fmha_sm100
from blockdex_kernels.casts import TORCH_DTYPES, scale_to_fp8
from blockdex_kernels.cpu import CpuBackend
from blockdex_kernels.fmha_sm100 import FmhaScorer, Package, buffer_width, find_scorer, warm_up
from blockdex_kernels.reference import select
from blockdex_kernels.spec import KeyDtype
from support.kernel_cases import TALLY, Run, load, pages_of, random_run

STAND_IN = Path(__file__).resolve().parent.parent / "fmha_stand_in"
MODULES = ("api", "jit", "msa_warmup")
DTYPES: tuple[KeyDtype, ...] = ("bf16", "fp8_e4m3")
Columns = NDArray[np.int32]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products are small here: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "fmha_sm100"]:
        del sys.modules[name]


def imported() -> Package:
    return Package("fmha_sm100", *(importlib.import_module(f"fmha_sm100.{name}") for name in MODULES))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Package]:
    """The package that stands in, newly imported, nothing compiled; on the path of child processes too."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MINFER_FMHA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    forget()
    yield imported()
    forget()


def compile_all(package: Package, spec: IndexSpec) -> list[str]:
    variants = sorted(package.variants(spec.key_dtype, spec.num_index_heads))
    return [*package.jit.prebuild_fmha_variants(variants), *package.jit.prebuild_modules(("plan",))]


def small_spec(key_dtype: KeyDtype = "bf16", **fields: Any) -> IndexSpec:
    return IndexSpec(num_layers=3, key_dtype=key_dtype, **fields)


def cast(queries: torch.Tensor, key_dtype: KeyDtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries as the scorer takes them, and what undoes the scale of their rows."""
    return (queries.bfloat16(), torch.ones(1)) if key_dtype == "bf16" else scale_to_fp8(queries)


class Case:
    """Runs in the pages of a cache, and everything that scores them."""

    def __init__(self, package: Package, runs: list[Run], spec: IndexSpec, generator: torch.Generator, **limits: int):
        backend = CpuBackend(spec, pages_of(runs, spec) + 3, reason="tested")
        spans = load(backend, runs, generator)
        self.spec, self.runs, self.pages, self.page_table = spec, runs, backend.pages, spans.page_table
        self.columns: Columns = torch.stack([spans.layers, spans.starts, spans.lengths]).numpy()
        self.queries, self.unscale = cast(torch.cat([run.queries for run in runs]), spec.key_dtype)
        self.scorer = FmhaScorer(package, backend.pages, max_heads=spec.num_index_heads, **limits)

    def buffer(self, extra: int = 0) -> torch.Tensor:
        """Full of what no score is."""
        width = buffer_width(-(-max(len(run.keys) for run in self.runs) // 128)) + extra
        return torch.full((*self.queries.shape[:2], width), 1e30)

    def score(self, extra: int = 0) -> torch.Tensor:
        scores = self.buffer(extra)
        self.scorer.score(self.queries, self.columns, self.page_table, scores)
        return scores

    def check(self, scores: torch.Tensor) -> None:
        """Every visible block has the reference's score, and every other place -inf."""
        first = 0
        for run in self.runs:
            rows = slice(first, first + len(run.queries))
            reference = select(run.keys, run.queries, run.first, self.spec)
            expected = reference.block_scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
            num_blocks = expected.shape[2]
            got = scores[rows].double() * (self.unscale[rows] if len(self.unscale) > 1 else 1.0)
            close = (got[..., :num_blocks] - expected).abs() <= reference.tolerance[..., None]
            assert ((got[..., :num_blocks] == expected) | close).all()
            assert (got[..., num_blocks:] == -math.inf).all()
            TALLY.rows += len(run.queries) * self.queries.shape[1]
            first = rows.stop


def spied(package: Package, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[inspect.BoundArguments]]:
    """The arguments of every call, by function."""
    calls: dict[str, list[inspect.BoundArguments]] = {"_fmha_sm100_plan": [], "_fmha_sm100": []}
    for name, seen in calls.items():
        function: Callable[..., Any] = getattr(package.api, name)

        def spy(
            *args: Any,
            _function: Callable[..., Any] = function,
            _seen: list[inspect.BoundArguments] = seen,
            **kwargs: Any,
        ) -> Any:
            _seen.append(inspect.signature(_function).bind(*args, **kwargs))
            return _function(*args, **kwargs)

        monkeypatch.setattr(package.api, name, spy)
    return calls


UNEVEN = [(1, 1), (128, 128), (129, 2), (256, 256), (385, 30), (257, 257), (700, 90), (640, 1), (513, 300)]


@pytest.mark.parametrize("key_dtype", DTYPES)
def test_uneven_runs_of_mixed_layers(key_dtype: KeyDtype, stand_in: Package, generator: torch.Generator) -> None:
    spec = small_spec(key_dtype)
    runs = [random_run(generator, spec, *shape, layer=row % 3) for row, shape in enumerate(UNEVEN)]
    case = Case(stand_in, runs, spec, generator)

    case.check(case.score())


@pytest.mark.parametrize("key_dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("num_queries", [1, 16, 17, 32, 33, 64, 65, 128, 129])
def test_every_kernel(
    num_queries: int, num_heads: int, key_dtype: KeyDtype, stand_in: Package, generator: torch.Generator
) -> None:
    spec = small_spec(key_dtype, num_index_heads=num_heads)
    runs = [random_run(generator, spec, num_queries + 130, num_queries, layer=1), random_run(generator, spec, 3, 1)]
    case = Case(stand_in, runs, spec, generator)

    case.check(case.score())


@pytest.mark.parametrize("key_dtype", DTYPES)
def test_nan_and_infinities(key_dtype: KeyDtype, stand_in: Package, generator: torch.Generator) -> None:
    spec = small_spec(key_dtype)
    runs = [random_run(generator, spec, 700, 70), random_run(generator, spec, 300, 5, layer=2)]
    runs[0].keys[[3, 250]] = math.nan
    runs[0].keys[500, 7] = math.inf
    runs[0].keys[640:, 5] = -math.inf
    runs[1].queries[2] = math.nan
    runs[1].queries[3, :, 0] = math.inf
    case = Case(stand_in, runs, spec, generator)

    case.check(case.score())


def test_a_buffer_wider_than_the_plan(stand_in: Package, generator: torch.Generator) -> None:
    spec = small_spec()
    case = Case(stand_in, [random_run(generator, spec, 600, 40)], spec, generator)

    scores = case.score(extra=37)

    assert scores.shape[2] == 165
    case.check(scores)


def test_no_runs(stand_in: Package, generator: torch.Generator) -> None:
    case = Case(stand_in, [random_run(generator, small_spec(), 5, 5)], small_spec(), generator)
    none = np.zeros((3, 0), np.int32)

    case.scorer.score(case.queries[:0], none, case.page_table[:0], case.buffer()[:0])


def test_slices_stay_below_the_limit(
    stand_in: Package, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in fails, or drops the scores, where a call is larger."""
    spec = small_spec()
    runs = [random_run(generator, spec, *shape, layer=row % 3) for row, shape in enumerate(UNEVEN)]
    limit = 4 * 128 * 50
    whole = Case(stand_in, runs, spec, generator).score()
    monkeypatch.setattr(stand_in.api, "MAX_ELEMENTS", limit)
    calls = spied(stand_in, monkeypatch)
    case = Case(stand_in, runs, spec, generator, max_elements=limit)

    scores = case.score()

    case.check(scores)
    torch.testing.assert_close(scores, whole)
    sizes = [call.arguments["max_score"].numel() for call in calls["_fmha_sm100"]]
    assert len(sizes) == math.ceil(len(case.queries) / 49)
    assert max(sizes) == limit - 4 * 128


@pytest.mark.parametrize(
    ("lengths", "num_heads", "num_blocks", "num_calls"),
    [
        ([16_384], 8, 32_768, 3),
        ([1000] * 1000, 4, 8192, 16),
        ([3, 2**20], 4, 8192, 17),
        ([1] * 10_000, 8, 8192, 5),  # Their keys sum to more than 2^31.
        ([1] * 10_000, 8, 128, 2),  # More tiles than a plan has room for.
    ],
)
def test_full_size_calls(
    lengths: list[int],
    num_heads: int,
    num_blocks: int,
    num_calls: int,
    stand_in: Package,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shapes alone, on the meta device: scores and keys by the terabyte."""
    calls = spied(stand_in, monkeypatch)
    with torch.device("meta"):
        pages = torch.empty(100_000, 57, 128, 128, dtype=torch.bfloat16)
        queries = torch.empty(sum(lengths), num_heads, 128, dtype=torch.bfloat16)
        page_table = torch.empty(len(lengths), num_blocks, dtype=torch.int32)
        scores = torch.empty(sum(lengths), num_heads, buffer_width(num_blocks))
    starts = [num_blocks * 128 - length for length in lengths]
    columns = np.array([[0] * len(lengths), starts, lengths], np.int32)

    FmhaScorer(stand_in, pages, max_heads=8).score(queries, columns, page_table, scores)

    sizes = [call.arguments["max_score"].numel() for call in calls["_fmha_sm100"]]
    assert sum(sizes) == scores.numel() > max(sizes)
    assert max(sizes) < 2**31
    assert len(sizes) == num_calls


def test_a_plan_that_drops_the_scores_is_an_error(
    stand_in: Package, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stand_in.api, "MAX_ELEMENTS", 1000)
    case = Case(stand_in, [random_run(generator, small_spec(), 600, 40)], small_spec(), generator)

    with pytest.raises(RuntimeError, match="planned -1 blocks a row, the buffer has 128"):
        case.score()
    assert "Too huge" in capsys.readouterr().out


Change = Callable[[Case, dict[str, Any]], None]


def _set(name: str, change: Callable[[Any], Any]) -> Change:
    def apply(case: Case, arguments: dict[str, Any]) -> None:
        arguments[name] = change(arguments[name])

    return apply


def _column(row: int, value: int) -> Callable[[Columns], Columns]:
    def change(columns: Columns) -> Columns:
        changed = columns.copy()
        changed[row, 0] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("queries", lambda queries: queries.float()), r"queries: dtype must be torch.bfloat16, got torch.float32"),
        (
            _set("queries", lambda queries: queries.to(torch.float8_e4m3fn)),
            "queries: dtype must be torch.bfloat16, got",
        ),
        (_set("queries", lambda queries: queries.to("meta")), "queries: must be on cpu, got meta"),
        (
            _set("queries", lambda queries: queries[:-1]),
            r"queries: shape must be \[41, heads, 128\].*got \[40, 4, 128\]",
        ),
        (_set("queries", lambda queries: queries[..., :64]), r"queries: shape must be .*got \[41, 4, 64\]"),
        (_set("queries", lambda queries: queries[:, 0]), r"queries: shape must be .*got \[41, 128\]"),
        (_set("queries", lambda queries: queries[:, :2]), r"queries: shape must be .*contiguous"),
        (_set("queries", lambda queries: queries.repeat(1, 2, 1)), "compiled for 1 to 4 heads, got 8"),
        (_set("columns", lambda columns: columns.astype(np.int64)), r"columns: must be int32 \[3, runs\], got int64"),
        (_set("columns", lambda columns: columns[:2]), r"columns: must be int32 \[3, runs\], got int32 \[2, 2\]"),
        (_set("columns", _column(0, 3)), "columns: layers must be 0 to 2, got 0 to 3"),
        (_set("columns", _column(0, -1)), "columns: layers must be 0 to 2, got -1 to 0"),
        (_set("columns", _column(1, -1)), "columns: starts must be at least 0 and lengths at least 1, got -1 and 1"),
        (_set("columns", _column(2, 0)), "columns: starts must be at least 0 and lengths at least 1, got 0 and 0"),
        (_set("columns", _column(2, 39)), r"queries: shape must be \[40, heads, 128\]"),
        (_set("page_table", lambda table: table.long()), "page_table: dtype must be torch.int32, got torch.int64"),
        (_set("page_table", lambda table: table[:1]), r"page_table: shape must be \[2, at least 5\], got \[1, 6\]"),
        (_set("page_table", lambda table: table[:, :4]), r"page_table: shape must be \[2, at least 5\], got \[2, 4\]"),
        (_set("scores", lambda scores: scores.double()), "scores: dtype must be torch.float32, got torch.float64"),
        (
            _set("scores", lambda scores: scores[:40]),
            r"scores: shape must be \[41, 4, at least 128\], got \[40, 4, 128\]",
        ),
        (_set("scores", lambda scores: scores[:, :3]), r"scores: shape must be .*, got \[41, 3, 128\]"),
        (_set("scores", lambda scores: scores[..., :5]), r"scores: shape must be .*at least 128\], got \[41, 4, 5\]"),
        (_set("scores", lambda scores: scores.mT.contiguous().mT), "scores: must be contiguous"),
    ],
)
def test_what_the_door_refuses(change: Change, message: str, stand_in: Package, generator: torch.Generator) -> None:
    spec = small_spec()
    case = Case(stand_in, [random_run(generator, spec, 600, 40), random_run(generator, spec, 1, 1)], spec, generator)
    arguments: dict[str, Any] = {
        "queries": case.queries,
        "columns": case.columns,
        "page_table": case.page_table,
        "scores": case.buffer(),
    }
    change(case, arguments)

    with pytest.raises(ValueError, match=message):
        case.scorer.score(**arguments)


def test_one_query_beyond_the_limit_is_refused(stand_in: Package, generator: torch.Generator) -> None:
    run = random_run(generator, small_spec(), 600, 40)
    case = Case(stand_in, [run], small_spec(), generator, max_elements=4 * 128)

    with pytest.raises(ValueError, match="scores: must be contiguous and below 512 scores a query"):
        case.score()


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        (torch.empty(2, 3, 64, 128, dtype=torch.bfloat16), r"pages: shape must be \[pages, layers, 128, 128\]"),
        (torch.empty(2, 3, 128, 64, dtype=torch.bfloat16), "pages: shape"),
        (torch.empty(2, 128, 128, dtype=torch.bfloat16), "pages: shape"),
        (torch.empty(2, 3, 128, 128, dtype=torch.bfloat16).mT, "pages: shape .*contiguous"),
        (torch.empty(2, 3, 128, 128, dtype=torch.float16), "pages: dtype must be .*, got torch.float16"),
        (
            torch.empty(2**27, 16, 128, 128, dtype=torch.bfloat16, device="meta"),
            r"pages \* layers must be below 2\^31, got 134217728 \* 16",
        ),
    ],
)
def test_pages_that_the_kernels_cannot_read(pages: torch.Tensor, message: str, stand_in: Package) -> None:
    with pytest.raises(ValueError, match=message):
        FmhaScorer(stand_in, pages, max_heads=4)


def test_threads_take_turns(stand_in: Package, generator: torch.Generator) -> None:
    """Two scorers too: the stand-in fails where two threads are in it, as the package's buffers are the process's."""
    spec = small_spec()
    cases = [Case(stand_in, [random_run(generator, spec, 300, 20)], spec, generator) for _ in range(2)]
    failures: list[BaseException] = []

    def work(case: Case) -> None:
        try:
            for _ in range(20):
                case.check(case.score())
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert not failures, failures


def test_the_stand_in_has_the_traps(stand_in: Package, generator: torch.Generator) -> None:
    """What the scorer keeps out of is there: called without its care, the stand-in answers wrongly without a word."""
    spec = small_spec("fp8_e4m3")
    case = Case(stand_in, [random_run(generator, spec, 600, 40)], spec, generator)
    cells = case.pages.view(-1, 1, 128, 128)
    ids = case.page_table[0, :5] * spec.num_layers
    counts, ends, offsets = (torch.tensor([number], dtype=torch.int32) for number in (40, 600, 560))

    def run(queries: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        plan = stand_in.api._fmha_sm100_plan(
            counts, ends, 4, num_kv_heads=1, qo_offset=offsets, page_size=128, output_maxscore=True, num_kv_splits=1
        )
        plan["max_k_tiles"] = scores.shape[2]
        stand_in.api._fmha_sm100(queries, cells, cells, plan, kv_indices=ids, output_o=False, max_score=scores)
        return scores

    case.check(run(case.queries, torch.full((40, 4, 128), -math.inf)))
    unfilled = run(case.queries, case.buffer())
    misread = run(case.runs[0].queries.bfloat16(), torch.full((40, 4, 128), -math.inf))
    for scores in (unfilled, misread):
        with pytest.raises(AssertionError):
            case.check(scores)
    with pytest.raises(AssertionError, match="into the next row"):
        run(case.queries, torch.full((40, 4, 5), -math.inf))


@pytest.mark.parametrize("key_dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [1, 4, 16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_a_scorer_is_found(device: str, num_heads: int, key_dtype: KeyDtype, stand_in: Package) -> None:
    spec = small_spec(key_dtype, num_index_heads=num_heads)
    pages = torch.zeros(4, 3, 128, 128).to(device, TORCH_DTYPES[key_dtype])
    compiled = compile_all(stand_in, spec)

    scorer = find_scorer(pages, spec)

    assert isinstance(scorer, FmhaScorer), scorer
    assert (scorer.package.name, scorer.max_heads) == ("fmha_sm100", num_heads)
    assert stand_in.jit.compiled_in_a_call == []
    assert {*stand_in.jit.used, "plan"} == set(compiled), "each was loaded and checked"


def test_the_package_inside_vllm_is_the_second_choice(stand_in: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_all(stand_in, small_spec())
    inside = {f"vllm.third_party.fmha_sm100.{name}": sys.modules[f"fmha_sm100.{name}"] for name in ("api", "jit")}
    inside["vllm.third_party.fmha_sm100.msa_warmup"] = stand_in.warmup
    for name in ("vllm", "vllm.third_party", "vllm.third_party.fmha_sm100"):
        inside[name] = ModuleType(name)
    for name, module in inside.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "fmha_sm100.api", None)

    scorer = find_scorer(torch.zeros(4, 3, 128, 128, dtype=torch.bfloat16), small_spec())

    assert isinstance(scorer, FmhaScorer), scorer
    assert scorer.package.name == "vllm.third_party.fmha_sm100"


def _of_another_chip(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def _not_installed(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmha_sm100, "PACKAGES", ("fmha_sm10", "nowhere.fmha_sm100"))


def _broken(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmha_sm100, "PACKAGES", ("fmha_sm100",))
    monkeypatch.setitem(sys.modules, "fmha_sm100.jit", None)


def _half_compiled(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(os.environ["MINFER_FMHA_CACHE_DIR"]) / "plan.so").unlink()
    (Path(os.environ["MINFER_FMHA_CACHE_DIR"]) / "bfloat16_256_double_1.so").unlink()


def _of_another_version(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(package.jit, "_variant_manager")


def _wrong(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    right = package.api._block_scores
    monkeypatch.setattr(package.api, "_block_scores", lambda q, *others: right(q, *others) * (1 + 0.01 * (len(q) > 64)))


def _failing(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("FMHA variant failed:\nno kernel image")

    monkeypatch.setattr(package.api, "_score", fail)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_of_another_chip, "fmha_sm100 is for compute capability 10.0 and 10.3, the device has 9.0"),
        (_not_installed, "fmha_sm10: No module named 'fmha_sm10'; nowhere.fmha_sm100: No module named 'nowhere'"),
        (_broken, "fmha_sm100: import of fmha_sm100.jit halted; None in sys.modules"),
        (_half_compiled, "fmha_sm100: 2 kernels are not compiled"),
        (_of_another_version, "fmha_sm100: module 'fmha_sm100.jit' has no attribute '_variant_manager'"),
        (_wrong, "fmha_sm100: scores of 128 queries x 1 heads differ from float64"),
        (_failing, "fmha_sm100: FMHA variant failed:"),
    ],
)
def test_why_there_is_none(
    change: Callable[[Package, pytest.MonkeyPatch], None],
    reason: str,
    stand_in: Package,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_all(stand_in, small_spec())
    change(stand_in, monkeypatch)

    assert find_scorer(torch.zeros(4, 3, 128, 128, dtype=torch.bfloat16), small_spec()) == reason
    assert stand_in.jit.compiled_in_a_call == []


@pytest.mark.parametrize("fields", [{"head_dim": 64}, {"block_size": 64}])
def test_other_sizes_are_not_its(fields: dict[str, Any], stand_in: Package) -> None:
    spec = small_spec(**fields)
    pages = torch.zeros(4, 3, spec.block_size, spec.head_dim, dtype=torch.bfloat16)

    assert "takes blocks of 128 tokens and head_dim 128, not" in str(find_scorer(pages, spec))


def test_warmed_up_it_is_found(stand_in: Package) -> None:
    spec = small_spec("fp8_e4m3", num_index_heads=2)
    pages = torch.zeros(4, 3, 128, 128).to(torch.float8_e4m3fn)
    assert find_scorer(pages, spec) == "fmha_sm100: 5 kernels are not compiled"

    seconds = warm_up(spec, timeout_s=60)

    assert 0 < seconds < 60
    assert isinstance(find_scorer(pages, spec), FmhaScorer)


def test_compilers_are_killed_in_time(stand_in: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds = f"{time.time():.6f}"  # What no other process is told to sleep.
    monkeypatch.setenv("STAND_IN_COMPILE_S", seconds)
    started = time.monotonic()

    with pytest.raises(TimeoutError, match="fmha_sm100: kernels were not compiled within 5 s"):
        warm_up(small_spec(), timeout_s=5)

    assert time.monotonic() - started < 20
    assert (tmp_path / "compiling").is_file(), "so a compiler was running"
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if seconds in _read(path)]


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):  # It ended meanwhile.
        return path.read_text("utf-8", errors="replace")
    return ""


def test_a_compiler_that_fails(stand_in: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "1")

    with pytest.raises(RuntimeError, match="fmha_sm100: nvcc: no such thing"):
        warm_up(small_spec(), timeout_s=60)


def _vllm_source() -> Path | None:
    """The package inside vLLM, found without importing it."""
    if "BLOCKDEX_VLLM_SOURCE" in os.environ:
        return Path(os.environ["BLOCKDEX_VLLM_SOURCE"]) / "vllm" / "third_party" / "fmha_sm100"
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "third_party" / "fmha_sm100"


class Source:
    """Modules of the real package, read and not imported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.texts = {name: (folder / f"{name}.py").read_text("utf-8") for name in MODULES}
        self.trees = {name: ast.parse(text) for name, text in self.texts.items()}

    def defined(self, module: str, kind: type[ast.AST]) -> dict[str, Any]:
        return {node.name: node for node in ast.walk(self.trees[module]) if isinstance(node, kind)}  # type: ignore[attr-defined]

    def signature(self, module: str, name: str) -> inspect.Signature:
        """Names, kinds and which have defaults."""
        arguments: ast.arguments = self.defined(module, ast.FunctionDef)[name].args
        plain = [*arguments.posonlyargs, *arguments.args]
        defaults = [inspect.Parameter.empty] * (len(plain) - len(arguments.defaults)) + [None] * len(arguments.defaults)
        parameters = [
            inspect.Parameter(argument.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
            for argument, default in zip(plain, defaults, strict=True)
        ]
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            empty = inspect.Parameter.empty if default is None else None
            parameters.append(inspect.Parameter(argument.arg, inspect.Parameter.KEYWORD_ONLY, default=empty))
        return inspect.Signature(parameters)


@pytest.fixture
def source() -> Source:
    folder = _vllm_source()
    if folder is None:
        pytest.skip("no vLLM here: BLOCKDEX_VLLM_SOURCE names a folder with its unpacked wheel")
    return Source(folder)


def test_our_calls_fit_the_real_signatures(
    source: Source, stand_in: Package, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spied(stand_in, monkeypatch)
    plan_warmup = stand_in.warmup.plan_warmup
    warmups: list[inspect.BoundArguments] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        warmups.append(inspect.signature(plan_warmup).bind(*args, **kwargs))
        return plan_warmup(*args, **kwargs)

    monkeypatch.setattr(stand_in.warmup, "plan_warmup", spy)
    compile_all(stand_in, small_spec())
    case = Case(stand_in, [random_run(generator, small_spec(), 300, 200)], small_spec(), generator)
    case.check(case.score())

    seen = {("api", name): bound for name, bound in calls.items()} | {("msa_warmup", "plan_warmup"): warmups}
    for (module, name), bound in seen.items():
        signature = source.signature(module, name)
        assert bound, name
        for call in bound:
            real = signature.bind(*call.args, **call.kwargs)
            assert list(real.arguments) == list(call.arguments), f"{name}: every argument arrives where it is meant to"


def test_what_the_cache_is_asked_exists(source: Source) -> None:
    jit = source.trees["jit"]
    manager = source.defined("jit", ast.ClassDef)["FMHAVariantManager"]
    (is_cached,) = [
        node for node in ast.walk(manager) if isinstance(node, ast.FunctionDef) and node.name == "is_cached"
    ]
    assert [argument.arg for argument in is_cached.args.args] == ["self", "variant_name"]
    assert any(
        isinstance(node, ast.Assign) and ast.unparse(node).startswith("_variant_manager = ") for node in jit.body
    )
    for name in ("_module_recipe", "prebuild_fmha_variants", "prebuild_modules"):
        source.signature("jit", name).bind(("plan",))
    assert '"plan": (' in source.texts["jit"]
    item = source.defined("msa_warmup", ast.ClassDef)["WarmupItem"]
    assert "fmha_variant" in {ast.unparse(node.target) for node in item.body if isinstance(node, ast.AnnAssign)}


def test_the_traps_are_where_we_know_them(source: Source) -> None:
    """What the scorer relies on beyond signatures: a change here asks for reading, not for a new number."""
    api = re.sub(r"\s+", " ", source.texts["api"])
    for line in (
        "max_k_tiles = math.ceil(math.ceil(max_kv_len / 128) / 128) * 128 if output_maxscore else -1",
        "if output_maxscore and maxscore_elems > (1 << 31):",
        '"max_k_tiles": max_k_tiles,',
        'max_k_tiles = plan_info["max_k_tiles"]',
        "if not output_maxscore or max_k_tiles == -1: max_score = None output_o = True",
        "(unpacked_t, unpacked_h, max_k_tiles)",
        "dtype_code = _dlpack_dtype_code(q.dtype)",
        "max_work_items = 131072 * max(num_kv_splits, 1)",
        "return 1 h_r = num_qo_heads // num_kv_heads if h_r <= 1 or max_qo_len <= 0 or max_qo_len > 32: return 1",
        "qo_tile_size = 128 if max_qo_len <= 128 else 256",
        "dtype_code, qo_tile_size, (max_qo_len <= 64),",
    ):
        assert line in api, line
    assert "_PACK_FACTORS = [1,2,4,6,8,16]" in source.texts["jit"].replace(", ", ",")


@pytest.fixture
def real(source: Source, stand_in: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Package:
    """The real Python with the stand-in's kernels: for what is compiled, and for the chip, there is something else."""
    forget()
    spec = importlib.util.spec_from_file_location(
        "fmha_sm100", source.folder / "__init__.py", submodule_search_locations=[str(source.folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["fmha_sm100"] = importlib.util.module_from_spec(spec)
    adapter = ModuleType("fmha_sm100.sparse_fmha_adapter")  # Of sparse attention, which needs CUTLASS's Python.
    monkeypatch.setattr(adapter, "sparse_fmha", None, raising=False)
    monkeypatch.setattr(adapter, "sparse_fmha_plan", None, raising=False)
    sys.modules[adapter.__name__] = adapter
    spec.loader.exec_module(sys.modules["fmha_sm100"])
    package = imported()

    def plan(offsets: torch.Tensor, lens: torch.Tensor, keys: torch.Tensor, *others: Any) -> None:
        assert {offsets.dtype, lens.dtype, keys.dtype} == {torch.int32}

    def run(workspace: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> None:
        lens, keys, out, offsets = others[0], others[1], others[6], others[13]
        tile, ids, _, max_score, width, blocks, pack = others[21:28]
        assert out is blocks is None and width == max_score.shape[2]
        queries = [count // pack for count in lens.tolist()]
        info = {"queries": queries, "keys": keys.tolist(), "offsets": offsets.tolist(), "pack": pack, "tile": tile}
        stand_in.api._score(q, k[:, 0], info, ids, max_score)

    monkeypatch.setattr(package.api, "get_plan_fn", lambda: SimpleNamespace(plan=plan))
    monkeypatch.setattr(package.api, "get_fmha_variant", lambda *_, **__: SimpleNamespace(run=run))
    monkeypatch.setattr(package.api, "_get_num_cta", lambda device: 148)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu:0")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(package.jit, "_get_tvm_ffi_include", lambda: "")
    return package


@pytest.mark.parametrize("key_dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [16, 32, 128, 300])
def test_the_real_python_takes_our_calls(
    num_queries: int, key_dtype: KeyDtype, real: Package, generator: torch.Generator
) -> None:
    spec = small_spec(key_dtype)
    runs = [random_run(generator, spec, num_queries + 400, num_queries, layer=2), random_run(generator, spec, 129, 3)]
    case = Case(real, runs, spec, generator, max_elements=4 * 256 * 290)

    case.check(case.score(extra=128))


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 8])
def test_the_real_names_of_kernels(num_heads: int, real: Package, stand_in: Package) -> None:
    for key_dtype in DTYPES:
        assert len(real.variants(key_dtype, num_heads)) == len(stand_in.variants(key_dtype, num_heads))


def test_the_real_cache_says_what_is_compiled(real: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    names = real.variants("bf16", 4)
    assert real.missing("bf16", 4) == [*sorted(names), "plan"]
    manager = real.jit._variant_manager
    recipes = [manager._recipe(name, real.jit._variant_params_from_name(name))[0] for name in names]
    for recipe in [*recipes, real.jit._module_recipe("plan")[0]]:
        recipe.dir.mkdir(parents=True)
        (recipe.dir / "kernel.so").touch()
        record = {"schema": 2, "recipe": recipe.recipe, "records": [{"library": "kernel.so", "inputs": {}}]}
        (recipe.dir / "entry.json").write_text(json.dumps(record), "utf-8")

    assert real.missing("bf16", 4) == []
    assert real.missing("fp8_e4m3", 4) == sorted(real.variants("fp8_e4m3", 4))


def test_the_real_package_compiles_what_is_missing(
    real: Package, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(real.jit._variant_manager, "compile_locked", lambda name, params: compiled.append(name))
    monkeypatch.setattr(real.jit, "build_module", compiled.append)
    monkeypatch.setattr(sys, "argv", ["fmha_sm100", "--key-dtype", "fp8_e4m3", "--heads", "2"])

    fmha_sm100.main()

    assert sorted(compiled) == [*sorted(real.variants("fp8_e4m3", 2)), "plan"]
    assert capsys.readouterr().out == "fmha_sm100: 5 kernels compiled\n"
