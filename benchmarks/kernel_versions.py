"""What is timed: blockdex, through its door, in the form in which a peer is timed too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from benchmarks.kernel_inputs import LAYER, LAYERS, Batch, fill
from blockdex_kernels import IndexSpec
from blockdex_kernels.dispatch import choose_backend
from blockdex_kernels.interface import Fp8Scoring, Selection
from blockdex_kernels.reference import FLIP_TOLERANCE
from blockdex_kernels.spec import KeyDtype
from blockdex_kernels.triton.backend import TritonBackend


class Version(ABC):
    """One set of kernels over one cache. Calls queue their work on the device and answer with what it will write.

    Attributes:
        spec: the indexer, with the dtype of the cache.
        fp8_scoring: how queries meet an fp8 cache.
        flip_tolerance: as `Backend.flip_tolerance`.
        pages: `[pages, block_size, D]`, the keys.
        has_stages: whether scoring and top-k can be called alone.
    """

    spec: IndexSpec
    fp8_scoring: Fp8Scoring = "native"
    flip_tolerance: float = FLIP_TOLERANCE
    pages: torch.Tensor
    has_stages: bool

    @abstractmethod
    def decode(self, batch: Batch) -> torch.Tensor:
        """Block ids, int32 `[T, H, topk]`."""

    @abstractmethod
    def prefill(self, batch: Batch) -> torch.Tensor:
        """Block ids, int32 `[T, H, topk]`."""

    @abstractmethod
    def score(self, batch: Batch) -> Any:
        """Scoring of a prefill alone: what `rank` takes, in memory of its own."""

    @abstractmethod
    def rank(self, scores: Any, batch: Batch) -> torch.Tensor:
        """Top-k of a prefill alone: block ids, int32 `[T, H, topk]`."""


class Blockdex(Version):
    """Ours. An fp8 cache is scored natively, on a chip that can.

    Args:
        device: the device.
        key_dtype: of the cache.
        pages: of the cache.
    """

    def __init__(self, device: str, key_dtype: KeyDtype, pages: int) -> None:
        self.spec = IndexSpec(num_layers=LAYERS, key_dtype=key_dtype)
        self.backend = choose_backend(device, self.spec, pages)
        self.flip_tolerance = self.backend.flip_tolerance
        if "upcast" in self.backend.kernels["prefill"][0]:
            self.fp8_scoring = "upcast"
        self.pages = self.backend.pages[:, LAYER]
        self.has_stages = isinstance(self.backend, TritonBackend)
        fill(pages, self.backend.device, self.backend.append)

    def decode(self, batch: Batch) -> torch.Tensor:
        """See `Version.decode`."""
        return self.backend.decode(batch.queries, batch.spans, order="ascending", return_scores=False).block_ids

    def prefill(self, batch: Batch) -> torch.Tensor:
        """See `Version.prefill`."""
        return self.backend.prefill(batch.queries, batch.spans, order="ascending", return_scores=False).block_ids

    def score(self, batch: Batch) -> Any:
        """See `Version.score`."""
        return self._staged.score_prefill(batch.queries, batch.spans, every_block=False)

    def rank(self, scores: Any, batch: Batch) -> torch.Tensor:
        """See `Version.rank`."""
        block_ids = torch.empty((*batch.queries.shape[:2], self.spec.topk), dtype=torch.int32, device=self.pages.device)
        values, positions, unscales = scores
        self._staged.rank(values, positions, unscales, Selection(block_ids, None), "ascending")
        return block_ids

    @property
    def _staged(self) -> TritonBackend:
        assert isinstance(self.backend, TritonBackend)
        return self.backend
