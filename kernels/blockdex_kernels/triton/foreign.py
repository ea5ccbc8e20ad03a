"""Index keys that lie in an engine's own cache: its pages, its block tables and its buffer of ids, nothing copied.

What is the same for all layers of one step (runs, tables, the cut of a prefill) is a `Batch`, planned once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels.casts import TORCH_DTYPES
from blockdex_kernels.interface import PrefillKernel, Selection, Spans
from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.triton.backend import SCORE_BYTES, TritonBackend, sent, width_of
from blockdex_kernels.triton.chip import Chip
from blockdex_kernels.triton.limits import unfit
from blockdex_kernels.triton.runs import Runs


@dataclass(slots=True)
class PrefillSlice:
    """Consecutive tokens whose scores fit in memory at once.

    Attributes:
        tokens: which of the batch's.
        runs: of these tokens, as the host knows them.
        spans: the same on the device.
        scores: float32 `[rows, width]`, room that every layer writes over, as every slice does.
        positions: int32 `[rows]`, likewise.
        items: int32 `[N, 9]` on the device: how the runs are cut, where a kernel needs that; the first layer does it.
    """

    tokens: slice
    runs: Runs
    spans: Spans
    scores: torch.Tensor
    positions: torch.Tensor
    items: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One step of an engine.

    Attributes:
        decode: the first runs, of few queries each, whose numbers only the device may know; None without any.
        num_decode_tokens: rows of queries that are theirs. Those behind the last run are padding, and get -1.
        prefill: the tokens behind them.
        num_tokens: all of them.
    """

    decode: Spans | None
    num_decode_tokens: int
    prefill: tuple[PrefillSlice, ...]
    num_tokens: int


class Planner:
    """Plans the batches of an engine's steps.

    Args:
        spec: the indexer; its heads are those that queries have.
        device: where its pages are.
        score_bytes: most that the scores of one prefill launch take.

    Raises:
        ValueError: the spec or the device is not one that the kernels are made for.
    """

    def __init__(self, spec: IndexSpec, device: torch.device, *, score_bytes: int = SCORE_BYTES) -> None:
        if obstacle := unfit(spec):
            raise ValueError(obstacle)
        Chip.of(device)  # refuses what is too old
        self._spec = spec
        self._device = device
        self._score_bytes = score_bytes

    def plan(
        self,
        decode: Spans | None,
        num_decode_tokens: int,
        starts: NDArray[np.int32],
        lengths: NDArray[np.int32],
        page_table: torch.Tensor,
    ) -> Batch:
        """Plans one step; waits for nothing.

        Args:
            decode: runs of at most `decode.max_length` queries, numbers on the device alone.
            num_decode_tokens: rows of queries that they take.
            starts: int32 `[R]`, first positions of the runs behind them.
            lengths: int32 `[R]`, their queries; runs of none are padding.
            page_table: int32 `[R, blocks]` on the device, of those runs.
        """
        heads = self._spec.num_index_heads
        rows = np.arange(len(starts), dtype=np.int32)
        runs = Runs(rows, np.zeros_like(rows), starts, lengths)
        width = width_of(runs.blocks(self._spec.block_size))
        step = max(self._score_bytes // (4 * heads * width), 1)
        most_rows = min(step, int(lengths.sum())) * heads
        scores = torch.empty((most_rows, width), dtype=torch.float32, device=self._device)
        positions = torch.empty(most_rows, dtype=torch.int32, device=self._device)
        slices = []
        end = num_decode_tokens
        for part in runs.slices(step):
            first, end = end, end + int(part.lengths.sum())
            own = slice((end - first) * heads)
            spans = self._spans(part, page_table)
            slices.append(PrefillSlice(slice(first, end), part, spans, scores[own], positions[own]))
        return Batch(decode, num_decode_tokens, tuple(slices), end)

    def _spans(self, runs: Runs, page_table: torch.Tensor) -> Spans:
        there = sent(np.concatenate([runs.columns, runs.rows[None]]), self._device, [])
        return Spans(there[0], there[1], there[2], page_table, runs.columns, table_rows=there[3])


class ForeignBackend(TritonBackend):
    """The pages of one layer in an engine's cache, which alone appends to them.

    Queries come in the dtype of the pages: an engine with e4m3 keys makes e4m3 queries, multiplied as they are.

    Args:
        spec: the indexer, of one layer.
        pages: `[num_pages, block_size, D]`, each page dense, at any distance of each other.
        prefill_kernel: see `TritonBackend`.

    Raises:
        ValueError: the pages, the spec or the device are not such that the kernels are made for.
    """

    def __init__(self, spec: IndexSpec, pages: torch.Tensor, *, prefill_kernel: PrefillKernel = "hopper") -> None:
        dtype = TORCH_DTYPES[spec.key_dtype]
        shape = (spec.block_size, spec.head_dim)
        if pages.ndim != 3 or tuple(pages.shape[1:]) != shape or pages.dtype != dtype:
            raise ValueError(f"pages: must be {dtype} [pages, {shape[0]}, {shape[1]}], got {_described(pages)}")
        super().__init__(
            spec,
            len(pages),
            pages.device,
            reason="an engine's own cache",
            prefill_kernel=prefill_kernel,
            pages=pages[:, None],
        )
        if self._keys.upcast:
            raise ValueError(f"device {pages.device}: {self.chip.name} cannot multiply {dtype}")
        self._scaled = self.rounds_queries = False

    @torch.no_grad()
    def select_into(self, block_ids: torch.Tensor, queries: torch.Tensor, batch: Batch) -> None:
        """Selects for one step. Batches without a prefill can be captured in a CUDA graph.

        Args:
            block_ids: int32 `[T, H, topk]`, contiguous; written, -1 where a token is padding.
            queries: `[T, H, D]`.
            batch: planned for them.

        Raises:
            ValueError: queries are not of the pages' dtype.
        """
        if queries.dtype != self.pages.dtype:
            raise ValueError(f"queries: dtype must be the pages' {self.pages.dtype}, got {queries.dtype}")
        if batch.decode is not None:
            own = slice(batch.num_decode_tokens)
            self.decode_into(Selection(block_ids[own], None), queries[own], batch.decode, order="ascending")
        for part in batch.prefill:
            self._score_slice(queries[part.tokens], part)
            self.rank(part.scores, part.positions, None, Selection(block_ids[part.tokens], None), "ascending")
        if batch.num_tokens < len(block_ids):
            block_ids[batch.num_tokens :].fill_(-1)

    def _score_slice(self, queries: torch.Tensor, part: PrefillSlice) -> None:
        heads = queries.shape[1]
        if self._key_tiles is not None:
            self._score_sm90(queries, part.spans, heads, part.scores, part.positions, None, every_block=False)
            return
        if part.items is None:
            part.items = self._cut(part.runs, heads, every_block=False)
        self._score(queries, part.spans.page_table, part.items, part.scores, part.positions, None)


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
