"""What every device offers: tensors in, tensors out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels.spec import IndexSpec

Order = Literal["ascending", "score"]
Fp8Scoring = Literal["native", "upcast"]
PrefillKernel = Literal["portable", "hopper"]

RUN_APPENDS, RUN_SELECTS, RUN_WANTS_SCORES = 1, 2, 4
"""What is to be done for a run of `Spans`."""

FP8_FLIP_TOLERANCE = 2.0**-8
"""`Backend.flip_tolerance` where tensor cores multiply e4m3; the names of such kernels end in `-fp8`."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Runs of consecutive tokens, one a request, on the device of the pages; R = runs.

    Attributes:
        layers: int32 `[R]`, the layer of each run.
        starts: int32 `[R]`, position of its first token.
        lengths: int32 `[R]`, its tokens, at least 1. T, the rows of a packed tensor beside it, is their sum.
        page_table: int32 `[R, max_blocks]`, page of each block of the run's sequence; places beyond block
            `(start + length - 1) // block_size` are not read and may hold anything. Its last dimension has stride 1, as
            the other tensors have. With `table_rows`, `[N, W]`, contiguous.
        columns: int32 `[3, R]` on the host: layers, starts and lengths again, where the caller has them there anyway.
            Kernels whose launch depends on them (prefill) otherwise copy them from the device, and wait for it.
        max_length: no run is longer; what a decode launch is sized by, so that it can be captured in a CUDA graph and
            replayed with other numbers in the tensors. None: read off the columns.
        table_rows: int32 `[R]`, the row in which each run's page table begins; it goes on in the rows behind, so that
            tables of all lengths lie in one tensor. None: run r's is row r, and no longer than that.
        max_blocks: beside `table_rows`: no run reaches more blocks.
        flags: int32 `[R]`, what is to be done for each run: `RUN_APPENDS`, `RUN_SELECTS`, `RUN_WANTS_SCORES`. Kernels
            of the others pass a run by; a decode gives it -1 throughout. None: everything that is called for.
    """

    layers: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    page_table: torch.Tensor
    columns: NDArray[np.int32] | None = None
    max_length: int | None = None
    table_rows: torch.Tensor | None = None
    max_blocks: int | None = None
    flags: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Blocks that no run exceeds."""
        return self.page_table.shape[1] if self.max_blocks is None else self.max_blocks

    def own_tables(self) -> torch.Tensor:
        """int32 `[R, width]`: the page table of each run, in a row of its own."""
        if self.table_rows is None:
            return self.page_table
        cells = self.page_table.reshape(-1)
        firsts = self.table_rows.long() * self.page_table.shape[1]
        places = firsts[:, None] + torch.arange(self.width, device=cells.device)
        return cells[places.clamp_(max=len(cells) - 1)]


@dataclass(frozen=True, slots=True)
class Selection:
    """The blocks that queries read.

    Attributes:
        block_ids: int32 `[T, H, topk]`, -1 in unused places, at the end of a row.
        scores: float32 `[T, H, topk]` times the spec's scale, +inf for forced blocks, -inf beside -1; or raw; or None.
    """

    block_ids: torch.Tensor
    scores: torch.Tensor | None


class Backend(ABC):
    """Pages of index keys on one device, and the kernels over them.

    Attributes:
        spec: the indexer.
        device: where the pages are.
        pages: `[num_pages, L, block_size, D]` in the spec's key dtype.
        kernels: phase (`append`, `decode`, `prefill`) to the kernel's name and why it was chosen.
        flip_tolerance: selections may differ from those in float64 between blocks whose scores lie within this times
            |query| times the greatest |key| of each other.
        rounds_queries: whether queries are rounded to fewer bits than bfloat16 has, scaled row by row.
    """

    spec: IndexSpec
    device: torch.device
    pages: torch.Tensor
    kernels: dict[str, tuple[str, str]]
    flip_tolerance: float = 2.0**-16
    rounds_queries: bool = False

    def use_device(self) -> None:
        """Makes the device the calling thread's: what every thread does before its first call."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def synchronize(self) -> None:
        """Waits until all calls are done.

        Raises:
            RuntimeError: the device has failed. Nothing that this process asks of it will be answered any more.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Compiles the kernels that calls will ask for, step by step, so that no call waits for it.

        Overwrites a page: before anything is appended. Steps may be taken by different threads, one after another.

        Yields:
            Steps done, and steps in all; nothing where nothing is compiled.
        """
        yield from ()

    @abstractmethod
    def append(self, keys: torch.Tensor, spans: Spans) -> None:
        """Writes keys into the pages, cast to the cache's dtype (fp8: saturating).

        Args:
            keys: `[T, D]`, bfloat16, float16, float32 or float8_e4m3fn, run after run.
            spans: where they go. No two runs may write the same page of the same layer.

        Raises:
            ValueError: a shape, dtype or device is not as said; the message names the argument.
        """

    @abstractmethod
    def decode(
        self, queries: torch.Tensor, spans: Spans, *, order: Order, return_scores: bool, raw_scores: bool = False
    ) -> Selection:
        """Selects blocks for runs of few queries.

        Args:
            queries: `[T, H, D]`, bfloat16, float16, float32 or float8_e4m3fn, run after run; H is any number of heads.
            spans: positions of the queries; the keys up to each run's last position must be in the pages.
            order: `ascending` (by block id) or `score` (init blocks, local blocks, then by falling score).
            return_scores: whether `Selection.scores` is filled.
            raw_scores: beside `return_scores`: whether they are as they rank, unscaled, and forced blocks have the
                score that they have.

        Raises:
            ValueError: a shape, dtype or device is not as said; the message names the argument.
        """

    @abstractmethod
    def prefill(
        self, queries: torch.Tensor, spans: Spans, *, order: Order, return_scores: bool, raw_scores: bool = False
    ) -> Selection:
        """Selects blocks for runs of many queries; as `decode` otherwise."""

    @abstractmethod
    def copy_pages(self, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """Copies whole pages, in order: a later copy sees what an earlier one wrote.

        Args:
            sources: int64 `[N]`, page ids, on the host.
            destinations: int64 `[N]`, page ids, on the host.

        Raises:
            ValueError: columns of different length, or a page id out of bounds; nothing is copied.
        """
