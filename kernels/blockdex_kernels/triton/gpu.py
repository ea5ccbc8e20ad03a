"""The Triton backend as a server runs it: compiled before it serves, prefill by fmha_sm100 where that is ready."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels.fmha_sm100 import BLOCK_SIZE, CAPABILITIES, FmhaScorer, buffer_width, find_scorer
from blockdex_kernels.interface import Fp8Scoring, Spans
from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.triton.backend import TritonBackend
from blockdex_kernels.triton.runs import Runs
from blockdex_kernels.triton.warm_up import warm_up


class GpuBackend(TritonBackend):
    """Pages on one GPU, scored for prefill by fmha_sm100 on a chip that it is for, if it is found ready.

    Args:
        spec: the indexer.
        num_pages: pages to allocate.
        device: a CUDA device.
        reason: why this backend was chosen.
        fp8_scoring: `native` or `upcast`; read for an fp8 cache only.
        options: as for `TritonBackend`.

    Raises:
        ValueError: as `TritonBackend` does.
    """

    def __init__(
        self,
        spec: IndexSpec,
        num_pages: int,
        device: torch.device,
        *,
        reason: str,
        fp8_scoring: Fp8Scoring = "native",
        **options: Any,
    ) -> None:
        super().__init__(spec, num_pages, device, reason=reason, fp8_scoring=fp8_scoring, **options)
        self._scorer: FmhaScorer | None = None
        if torch.cuda.get_device_capability(device) in CAPABILITIES:
            kernel, _ = self.kernels["prefill"]
            found = "fmha_sm100 does not upcast keys" if self._keys.upcast else find_scorer(self.pages, spec)
            if isinstance(found, FmhaScorer):
                self._scorer = found
                self.plans_on_device = False
                kernel, found = "fmha_sm100" + ("-fp8" if self._scaled else ""), f"{found.package.name} is compiled"
            self.kernels["prefill"] = (kernel, f"{reason}; {found}")

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """See `Backend.warm_up`."""
        return warm_up(self)

    def score_prefill(
        self, queries: torch.Tensor, spans: Spans, *, every_block: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """See `TritonBackend.score_prefill`."""
        scorer = self._scorer
        # Callers that ask for the same tokens share a call, and may bring more heads than the indexer has.
        if scorer is None or queries.shape[1] > scorer.max_heads:
            return super().score_prefill(queries, spans, every_block=every_block)
        runs = Runs.of(spans)
        num_tokens, heads, _ = queries.shape
        width = buffer_width(runs.blocks(BLOCK_SIZE))
        scores, positions, unscales = self._score_buffers(num_tokens * heads, num_tokens, width)
        positions.copy_(self._sent(_positions(runs)))
        scorer.score(
            self._rows(queries, unscales).view(queries.shape),
            runs.columns,
            spans.own_tables(),
            scores.view(*queries.shape[:2], -1),
        )
        return scores, positions, unscales

    def _tokens_at_once(self, heads: int, width: int) -> int:
        return super()._tokens_at_once(heads, width if self._scorer is None else buffer_width(width))


def _positions(runs: Runs) -> NDArray[np.int32]:
    """int32 `[T]`: the position of each token."""
    firsts = np.cumsum(runs.lengths) - runs.lengths
    return (np.repeat(runs.starts - firsts, runs.lengths) + np.arange(runs.lengths.sum())).astype(np.int32)
