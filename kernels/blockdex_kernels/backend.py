"""The one door to the kernels: what every device offers, and which kernels a device gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels.spec import IndexSpec

Order = Literal["ascending", "score"]
Fp8Scoring = Literal["native", "upcast"]

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
            `(start + length - 1) // block_size` are not read and may hold anything.
        columns: int32 `[3, R]` on the host: layers, starts and lengths again, where the caller has them there anyway.
            Kernels whose launch depends on them (prefill) otherwise copy them from the device, and wait for it.
        max_length: no run is longer; what a decode launch is sized by, so that it can be captured in a CUDA graph and
            replayed with other numbers in the tensors. None: read off the columns.
    """

    layers: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    page_table: torch.Tensor
    columns: NDArray[np.int32] | None = None
    max_length: int | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """The blocks that queries read.

    Attributes:
        block_ids: int32 `[T, H, topk]`, -1 in unused places, at the end of a row.
        scores: float32 `[T, H, topk]` times the spec's scale, +inf for forced blocks, -inf beside -1; or None.
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
    """

    spec: IndexSpec
    device: torch.device
    pages: torch.Tensor
    kernels: dict[str, tuple[str, str]]
    flip_tolerance: float = 2.0**-16

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
    def decode(self, queries: torch.Tensor, spans: Spans, *, order: Order, return_scores: bool) -> Selection:
        """Selects blocks for runs of few queries.

        Args:
            queries: `[T, H, D]`, bfloat16, float16, float32 or float8_e4m3fn, run after run; H is any number of heads.
            spans: positions of the queries; the keys up to each run's last position must be in the pages.
            order: `ascending` (by block id) or `score` (init blocks, local blocks, then by falling score).
            return_scores: whether `Selection.scores` is filled.

        Raises:
            ValueError: a shape, dtype or device is not as said; the message names the argument.
        """

    @abstractmethod
    def prefill(self, queries: torch.Tensor, spans: Spans, *, order: Order, return_scores: bool) -> Selection:
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


def choose_backend(device: str, spec: IndexSpec, num_pages: int, *, fp8_scoring: Fp8Scoring = "native") -> Backend:
    """The backend for a device, its pages allocated.

    Args:
        device: `auto`, `cpu`, or a CUDA device as torch writes it.
        spec: the indexer.
        num_pages: pages to allocate.
        fp8_scoring: how an fp8 cache is scored: `native` (queries scaled into the fp8 range and cast) or `upcast`
            (queries kept in bf16, keys upcast).

    Raises:
        ValueError: the device is not one that this build has kernels for.
    """
    from blockdex_kernels.cpu import CpuBackend  # noqa: PLC0415 - the door must not import what it chooses from

    if device not in {"auto", "cpu"}:
        raise ValueError(f"device must be auto or cpu, got {device!r}: this build has no GPU kernels")
    reason = "asked for" if device == "cpu" else "the only device that this build has kernels for"
    return CpuBackend(spec, num_pages, reason=reason, fp8_scoring=fp8_scoring)
