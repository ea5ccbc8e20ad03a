"""Prefill scoring through fmha_sm100, the attention kernels of MiniMax MSA, on compute capability 10.0 and 10.3.

The package comes by itself or inside vLLM. It is looked for when a device asks, so this module imports anywhere. It
compiles its kernels at first use, a minute each: `find_scorer` takes it only where nothing is left to compile, and
`warm_up`, or `python -m blockdex_kernels.fmha_sm100` while an image is built, compiles them. docs/kernels.md lists what
the kernels ask of their caller.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels.casts import TORCH_DTYPES
from blockdex_kernels.reference import FLIP_TOLERANCE
from blockdex_kernels.spec import IndexSpec, KeyDtype

PACKAGES = ("fmha_sm100", "vllm.third_party.fmha_sm100")
"""Where the kernels are looked for, in this order."""
CAPABILITIES = ((10, 0), (10, 3))
BLOCK_SIZE = HEAD_DIM = 128
WIDTH_QUANTUM = 128
"""Blocks; the planner rounds up to it, and a kernel may write -inf one block behind a run's last."""
MAX_ELEMENTS = 2**31
"""Scores of one call stay below it: the kernels' offsets have 32 bits, and the planner gives up beyond."""

_MAX_WORK_ITEMS = 131_072  # StepBuffer for (tile, head) pairs in a plan, which the planner does not check.
_DTYPE_NAMES: dict[KeyDtype, str] = {"bf16": "bf16", "fp8_e4m3": "fp8"}
# The package's staging buffers and workspaces belong to the process: one call at a time, whatever the device.
_TURN = threading.Lock()


def buffer_width(num_blocks: int) -> int:
    """The narrowest score buffer, in blocks, for runs of so many blocks."""
    return -(-num_blocks // WIDTH_QUANTUM) * WIDTH_QUANTUM


@dataclass(frozen=True, slots=True)
class Package:
    """An importable fmha_sm100: its name and the modules used of it."""

    name: str
    api: ModuleType
    jit: ModuleType
    warmup: ModuleType

    def variants(self, key_dtype: KeyDtype, max_heads: int) -> set[str]:
        """Names of the kernels that score up to so many heads; which one runs depends on the longest run of a call."""
        dtype = _DTYPE_NAMES[key_dtype]
        items = [
            item
            for num_heads in range(1, max_heads + 1)
            for item in self.warmup.plan_warmup(
                dtype,
                dtype,
                num_heads,
                1,
                16,
                num_index_heads=num_heads,
                page_size=BLOCK_SIZE,
                sparse_decode=False,
                sparse_prefill=False,
            )
        ]
        return {item.fmha_variant for item in items if item.fmha_variant is not None}

    def missing(self, key_dtype: KeyDtype, max_heads: int) -> list[str]:
        """Those of the kernels, and the planner, that would have to be compiled first."""
        variants = sorted(self.variants(key_dtype, max_heads))
        missing = [name for name in variants if not self.jit._variant_manager.is_cached(name)]
        planner, *_ = self.jit._module_recipe("plan")
        return missing if planner.lookup() is not None else [*missing, "plan"]


class FmhaScorer:
    """Scores blocks of one cache for prefill. Calls come on one stream, and cannot be captured in a CUDA graph.

    Args:
        package: the kernels, compiled.
        pages: `[num_pages, L, 128, 128]`, bfloat16 or float8_e4m3fn, on the device.
        max_heads: the most heads that kernels are compiled for.
        max_elements: a call of the kernels covers fewer scores.

    Raises:
        ValueError: the pages are not as said.
    """

    def __init__(
        self, package: Package, pages: torch.Tensor, *, max_heads: int, max_elements: int = MAX_ELEMENTS
    ) -> None:
        if pages.ndim != 4 or pages.shape[2:] != (BLOCK_SIZE, HEAD_DIM) or not pages.is_contiguous():
            expected = f"[pages, layers, {BLOCK_SIZE}, {HEAD_DIM}]"
            raise ValueError(f"pages: shape must be {expected}, contiguous, got {list(pages.shape)}")
        if pages.dtype not in TORCH_DTYPES.values():
            raise ValueError(f"pages: dtype must be torch.bfloat16 or torch.float8_e4m3fn, got {pages.dtype}")
        if len(pages) * pages.shape[1] >= 2**31:
            raise ValueError(f"pages: pages * layers must be below 2^31, got {len(pages)} * {pages.shape[1]}")
        self.package = package
        self.max_heads = max_heads
        self._max_elements = max_elements
        self._num_layers = pages.shape[1]
        # A (page, layer) is a page to the kernels, so that one call serves runs of all layers.
        self._cells = pages.view(-1, 1, BLOCK_SIZE, HEAD_DIM)

    @torch.no_grad()
    def score(
        self, queries: torch.Tensor, columns: NDArray[np.int32], page_table: torch.Tensor, scores: torch.Tensor
    ) -> None:
        """Writes the unscaled score of every visible block, and -inf everywhere else; a NaN product counts as -inf.

        Args:
            queries: `[T, H, 128]`, contiguous, run after run, in the dtype of the pages; e4m3 rows as `scale_to_fp8`
                makes them.
            columns: int32 `[3, R]` on the host: layers, starts and lengths of the runs. A run's last query is the last
                key that it sees.
            page_table: int32 `[R, W]`; places behind a run's last block are not read.
            scores: float32 `[T, H, K]`, contiguous; K is at least `buffer_width` of the longest run's blocks.

        Raises:
            ValueError: a shape, dtype or device is not as said; the message names the argument.
            RuntimeError: the planner dropped the scores.
        """
        self._check(queries, columns, page_table, scores)
        scores.fill_(-math.inf)
        num_heads, width = scores.shape[1:]
        longest = int((columns[1] + columns[2]).max(initial=1))
        # Half the work items are for the tiles that runs end with, half for full ones, of which 2^31 scores hold fewer.
        max_pieces = min(_MAX_WORK_ITEMS // 2 // num_heads, (2**31 - 1) // longest)
        first = 0
        with torch.cuda.device(scores.get_device()), _TURN:
            for pieces in _calls(columns, (self._max_elements - 1) // (num_heads * width), max_pieces):
                last = first + int(pieces[2].sum())
                self._score_pieces(queries[first:last], pieces, columns[0], page_table, scores[first:last])
                first = last

    def _score_pieces(
        self,
        queries: torch.Tensor,
        pieces: NDArray[np.int32],
        layers: NDArray[np.int32],
        page_table: torch.Tensor,
        scores: torch.Tensor,
    ) -> None:
        """One call of the kernels, for pieces of runs: int32 `[3, P]`, their runs, starts and lengths."""
        runs, starts, lengths = pieces
        ends = starts + lengths
        plan = self.package.api._fmha_sm100_plan(
            torch.from_numpy(lengths),
            torch.from_numpy(ends),
            scores.shape[1],
            num_kv_heads=1,
            qo_offset=torch.from_numpy(starts),
            page_size=BLOCK_SIZE,
            output_maxscore=True,
            causal=True,
            num_kv_splits=1,
        )
        width = scores.shape[2]
        if not 0 < plan["max_k_tiles"] <= width:
            raise RuntimeError(
                f"{self.package.name}: planned {plan['max_k_tiles']} blocks a row, the buffer has {width}"
            )
        plan["max_k_tiles"] = width
        self.package.api._fmha_sm100(
            queries,
            self._cells,
            self._cells,  # In place of values, which are not read.
            plan,
            kv_indices=self._cell_ids(runs, layers[runs], -(-ends // BLOCK_SIZE), page_table),
            output_o=False,
            output_maxscore=True,
            sm_scale=1.0,
            max_score=scores,
        )

    def _cell_ids(
        self,
        runs: NDArray[np.int32],
        layers: NDArray[np.int32],
        num_blocks: NDArray[np.int32],
        page_table: torch.Tensor,
    ) -> torch.Tensor:
        """int32 `[sum of num_blocks]`: the cells of each piece's blocks, piece after piece."""
        columns = torch.from_numpy(np.stack([runs, layers, num_blocks])).to(page_table.device)
        total = int(num_blocks.sum())
        owners = torch.repeat_interleave(columns[2], output_size=total)
        begins = columns[2].cumsum(0) - columns[2]
        blocks = torch.arange(total, device=page_table.device) - begins[owners]
        return page_table[columns[0][owners], blocks] * self._num_layers + columns[1][owners]

    def _check(
        self, queries: torch.Tensor, columns: NDArray[np.int32], page_table: torch.Tensor, scores: torch.Tensor
    ) -> None:
        # The kernels go by the dtype of the queries alone, and misread pages of another.
        dtypes = {"queries": self._cells.dtype, "page_table": torch.int32, "scores": torch.float32}
        for name, tensor in (("queries", queries), ("page_table", page_table), ("scores", scores)):
            if tensor.device != self._cells.device:
                raise ValueError(f"{name}: must be on {self._cells.device}, got {tensor.device}")
            if tensor.dtype != dtypes[name]:
                raise ValueError(f"{name}: dtype must be {dtypes[name]}, got {tensor.dtype}")
        if columns.dtype != np.int32 or columns.ndim != 2 or len(columns) != 3:
            raise ValueError(f"columns: must be int32 [3, runs], got {columns.dtype} {list(columns.shape)}")
        layers, starts, lengths = columns
        if layers.min(initial=0) < 0 or layers.max(initial=0) >= self._num_layers:
            raise ValueError(
                f"columns: layers must be 0 to {self._num_layers - 1}, got {layers.min()} to {layers.max()}"
            )
        if starts.min(initial=0) < 0 or lengths.min(initial=1) < 1:
            least = f"{starts.min()} and {lengths.min()}"
            raise ValueError(f"columns: starts must be at least 0 and lengths at least 1, got {least}")
        num_blocks = -(-int((starts + lengths).max(initial=0)) // BLOCK_SIZE)
        if page_table.ndim != 2 or len(page_table) != len(layers) or page_table.shape[1] < num_blocks:
            expected = f"[{len(layers)}, at least {num_blocks}]"
            raise ValueError(f"page_table: shape must be {expected}, got {list(page_table.shape)}")
        tokens = int(lengths.sum())
        if queries.ndim != 3 or len(queries) != tokens or queries.shape[2] != HEAD_DIM or not queries.is_contiguous():
            expected = f"[{tokens}, heads, {HEAD_DIM}]"
            raise ValueError(f"queries: shape must be {expected}, contiguous, got {list(queries.shape)}")
        num_heads = queries.shape[1]
        if not 1 <= num_heads <= self.max_heads:
            raise ValueError(f"queries: kernels are compiled for 1 to {self.max_heads} heads, got {num_heads}")
        width = buffer_width(num_blocks)
        if scores.ndim != 3 or scores.shape[:2] != queries.shape[:2] or scores.shape[2] < width:
            expected = f"[{tokens}, {num_heads}, at least {width}]"
            raise ValueError(f"scores: shape must be {expected}, got {list(scores.shape)}")
        if not scores.is_contiguous() or num_heads * scores.shape[2] >= self._max_elements:
            bound = f"contiguous and below {self._max_elements} scores a query"
            raise ValueError(f"scores: must be {bound}, got shape {list(scores.shape)}, strides {scores.stride()}")


def _calls(columns: NDArray[np.int32], max_tokens: int, max_pieces: int) -> Iterator[NDArray[np.int32]]:
    """Runs cut into pieces, and the pieces of each call: int32 `[3, P]`, runs, starts and lengths."""
    pieces: list[tuple[int, int, int]] = []
    room = max_tokens
    for run, (start, length) in enumerate(columns[1:].T.tolist()):
        done = 0
        while done < length:
            taken = min(length - done, room)
            pieces.append((run, start + done, taken))
            done += taken
            room -= taken
            if not room or len(pieces) == max_pieces:
                yield np.array(pieces, np.int32).T.copy()
                pieces, room = [], max_tokens
    if pieces:
        yield np.array(pieces, np.int32).T.copy()


def find_scorer(pages: torch.Tensor, spec: IndexSpec) -> FmhaScorer | str:
    """A scorer that has nothing left to compile and whose first answers were right, or why there is none.

    Runs every kernel once on a few pages of its own, so that all are loaded, and compares with float64.

    Args:
        pages: `[num_pages, L, block_size, D]` in the spec's key dtype, on a CUDA device.
        spec: the indexer.

    Returns:
        The scorer, or one line for `Backend.kernels`.
    """
    reason = _unfit(torch.cuda.get_device_capability(pages.device), spec)
    if reason is not None:
        return reason
    package = _import_package()
    if isinstance(package, str):
        return package
    try:
        missing = package.missing(spec.key_dtype, spec.num_index_heads)
        if missing:
            return f"{package.name}: {len(missing)} kernels are not compiled"
        wrong = _first_wrong(package, spec, pages.device)
    except Exception as error:  # Whatever a foreign package raises, there are other kernels to serve with.
        return f"{package.name}: {_line(error)}"
    if wrong is not None:
        return f"{package.name}: scores of {wrong} differ from float64"
    return FmhaScorer(package, pages, max_heads=spec.num_index_heads)


def _unfit(capability: tuple[int, int], spec: IndexSpec) -> str | None:
    if capability not in CAPABILITIES:
        return f"fmha_sm100 is for compute capability 10.0 and 10.3, the device has {capability[0]}.{capability[1]}"
    if (spec.block_size, spec.head_dim) != (BLOCK_SIZE, HEAD_DIM):
        return f"fmha_sm100 takes blocks of 128 tokens and head_dim 128, not {spec.block_size} and {spec.head_dim}"
    return None


def _import_package() -> Package | str:
    reasons = []
    for name in PACKAGES:
        try:
            api, jit, warmup = (importlib.import_module(f"{name}.{module}") for module in ("api", "jit", "msa_warmup"))
        except Exception as error:  # As above.
            reasons.append(f"{name}: {_line(error)}")
        else:
            return Package(name, api, jit, warmup)
    return "; ".join(reasons)


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _first_wrong(package: Package, spec: IndexSpec, device: torch.device) -> str | None:
    """Scores a few pages with every kernel; the first case that is further from float64 than rounding explains."""
    generator = torch.Generator().manual_seed(0)
    dtype = TORCH_DTYPES[spec.key_dtype]
    pages = torch.randn(8, 2, BLOCK_SIZE, HEAD_DIM, generator=generator).to(dtype).to(device)
    page_table = torch.randperm(8, generator=generator).to(device, torch.int32).view(2, 4)
    scorer = FmhaScorer(package, pages, max_heads=spec.num_index_heads)
    for num_heads in range(1, spec.num_index_heads + 1):
        # The longest run of a call decides on the kernel: heads packed up to 32 queries, narrow tiles up to 128 rows.
        for longest in (4, 8, 16, 32, 64, 128, 200):
            columns = np.array([[1, 0], [300, 130], [longest, 1]], np.int32)
            queries = torch.randn(longest + 1, num_heads, HEAD_DIM, generator=generator).to(dtype).to(device)
            scores = torch.empty(longest + 1, num_heads, buffer_width(4), device=device)
            scorer.score(queries, columns, page_table, scores)
            if not _is_right(scores, pages, queries, columns, page_table):
                return f"{longest} queries x {num_heads} heads"
    return None


def _is_right(
    scores: torch.Tensor,
    pages: torch.Tensor,
    queries: torch.Tensor,
    columns: NDArray[np.int32],
    page_table: torch.Tensor,
) -> bool:
    expected = torch.full_like(scores, -math.inf, dtype=torch.float64)
    first = 0
    for row, (layer, start, length) in enumerate(columns.T.tolist()):
        keys = pages.double()[page_table[row].long(), layer].flatten(0, 1)
        products = queries.double()[first : first + length] @ keys.T
        position = torch.arange(start, start + length, device=pages.device)
        later = torch.arange(len(keys), device=pages.device) > position[:, None]
        products.masked_fill_(later[:, None], -math.inf)
        expected[first : first + length, :, : page_table.shape[1]] = products.view(
            length, queries.shape[1], -1, BLOCK_SIZE
        ).amax(3)
        first += length
    # The bound of the contract; fp8 products may be summed in fewer bits.
    relative = FLIP_TOLERANCE if pages.dtype == torch.bfloat16 else 2.0**-9
    norms = [tensor.double().square().sum(-1).sqrt().max().item() for tensor in (queries, pages)]
    return torch.allclose(scores.double(), expected, rtol=0.0, atol=relative * norms[0] * norms[1])


def warm_up(spec: IndexSpec, *, timeout_s: float) -> float:
    """Compiles what `find_scorer` found missing, in a process of its own; about a minute a kernel, on all cores.

    Args:
        spec: the indexer.
        timeout_s: seconds, after which the compilers are killed. What they finished stays in the package's cache.

    Returns:
        Seconds that it took.

    Raises:
        TimeoutError: it took longer.
        RuntimeError: no package, or a compiler failed; the message is the last line of what it said.
    """
    started = time.monotonic()
    command = [sys.executable, "-m", __name__, "--key-dtype", spec.key_dtype, "--heads", str(spec.num_index_heads)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, said = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"fmha_sm100: kernels were not compiled within {timeout_s:.0f} s") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(f"fmha_sm100: {(said.strip().splitlines() or [f'exit {process.returncode}'])[-1]}")
    return time.monotonic() - started


def main() -> None:
    """Compiles the kernels of one configuration into the package's cache; needs nvcc, and no GPU."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=main.__doc__)
    parser.add_argument("--key-dtype", choices=get_args(KeyDtype), default="bf16", help="dtype of the cache")
    parser.add_argument("--heads", type=int, default=4, help="the most heads of a selection")
    arguments = parser.parse_args()
    package = _import_package()
    if isinstance(package, str):
        sys.exit(package)
    built = package.jit.prebuild_fmha_variants(sorted(package.variants(arguments.key_dtype, arguments.heads)))
    built += package.jit.prebuild_modules(("plan",))
    print(f"{package.name}: {len(built)} kernels compiled")


if __name__ == "__main__":
    main()
