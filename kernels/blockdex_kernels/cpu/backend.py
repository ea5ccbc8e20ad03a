"""Index-key pages in host memory, and the kernels over them in torch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels import validate
from blockdex_kernels.casts import TORCH_DTYPES, cast_keys, scale_to_fp8
from blockdex_kernels.cpu import ranking, tiles
from blockdex_kernels.cpu.scoring import BlockScorer
from blockdex_kernels.interface import Backend, Fp8Scoring, Order, Selection, Spans
from blockdex_kernels.spec import IndexSpec

TEMPORARY_BYTES = 64 << 20
"""Most that a call holds beside its arguments and its answer, however long the sequences."""

_APPEND_ELEMENTS = 1 << 21  # Cast at once.


class CpuBackend(Backend):
    """Pages in host memory, of which the system commits only what is written. Calls must not overlap.

    Keys are gathered and upcast to fp32 in chunks that stay in the processor's cache; one batched product scores a
    chunk for all heads of a run. Decode and prefill are the same code.

    Args:
        spec: the indexer.
        num_pages: pages to reserve.
        reason: why this backend was chosen.
        fp8_scoring: `native` or `upcast`; read for an fp8 cache only.

    Raises:
        ValueError: `num_pages` is below 1, or `fp8_scoring` is unknown.
    """

    def __init__(self, spec: IndexSpec, num_pages: int, *, reason: str, fp8_scoring: Fp8Scoring = "native") -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages: must be at least 1, got {num_pages}")
        if fp8_scoring not in {"native", "upcast"}:
            raise ValueError(f"fp8_scoring: must be native or upcast, got {fp8_scoring!r}")
        self.spec = spec
        self.device = torch.device("cpu")
        self.pages = torch.empty(
            (num_pages, spec.num_layers, spec.block_size, spec.head_dim), dtype=TORCH_DTYPES[spec.key_dtype]
        )
        self.kernels = dict.fromkeys(("append", "decode", "prefill"), ("torch-cpu", reason))
        fp8 = spec.key_dtype == "fp8_e4m3"
        self._open_places = spec.topk - spec.init_blocks - spec.local_blocks
        self.rounds_queries = fp8 and fp8_scoring == "native"
        # Copies and gathers move bytes: not every torch build indexes fp8.
        self._bytes = self.pages.view(torch.uint8) if fp8 else self.pages
        self._scorer = BlockScorer(self._bytes.view(num_pages * spec.num_layers, -1), spec)

    @torch.no_grad()
    def append(self, keys: torch.Tensor, spans: Spans) -> None:
        """See `Backend.append`; page ids and positions out of bounds are a ValueError too."""
        validate.check_keys(keys, spans, self.spec, self.device)
        runs, page_table = validate.read_runs(
            spans, self.spec, num_pages=len(self.pages), num_tokens=len(keys), writing=True
        )
        layers, starts, lengths = np.array(runs, np.int64).reshape(-1, 3).T
        ends = np.cumsum(lengths)
        shifts = starts + lengths - ends
        cache = self._bytes.view(-1, self.spec.head_dim)
        step = max(1, _APPEND_ELEMENTS // self.spec.head_dim)
        for top in range(0, len(keys), step):
            token = np.arange(top, min(top + step, len(keys)))
            run = np.searchsorted(ends, token, side="right")
            block, offset = np.divmod(token + shifts[run], self.spec.block_size)
            cell = page_table[run, block].astype(np.int64) * self.spec.num_layers + layers[run]
            cast = cast_keys(keys[top : top + len(token)], self.spec.key_dtype)
            cache.index_copy_(0, torch.from_numpy(cell * self.spec.block_size + offset), cast.view(cache.dtype))

    @torch.no_grad()
    def decode(
        self, queries: torch.Tensor, spans: Spans, *, order: Order, return_scores: bool, raw_scores: bool = False
    ) -> Selection:
        """See `Backend.decode`; page ids and positions out of bounds are a ValueError too."""
        return self._select(queries, spans, order, return_scores, raw_scores)

    @torch.no_grad()
    def prefill(
        self, queries: torch.Tensor, spans: Spans, *, order: Order, return_scores: bool, raw_scores: bool = False
    ) -> Selection:
        """See `Backend.prefill`; page ids and positions out of bounds are a ValueError too."""
        return self._select(queries, spans, order, return_scores, raw_scores)

    def copy_pages(self, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """See `Backend.copy_pages`.

        Raises:
            ValueError: columns of different length, or a page id out of bounds; nothing is copied.
        """
        validate.check_copies(sources, destinations, len(self.pages))
        for source, destination in zip(sources.tolist(), destinations.tolist(), strict=True):
            self._bytes[destination] = self._bytes[source]

    def _select(
        self, queries: torch.Tensor, spans: Spans, order: Order, return_scores: bool, raw_scores: bool
    ) -> Selection:
        validate.check_queries(queries, spans, order, self.spec, self.device)
        num_tokens, num_heads, head_dim = queries.shape
        runs, page_table = validate.read_runs(
            spans, self.spec, num_pages=len(self.pages), num_tokens=num_tokens, writing=False
        )
        rows = queries.reshape(-1, head_dim)
        block_ids = np.empty((len(rows), self.spec.topk), np.int32)
        scores = np.empty(block_ids.shape, np.float32) if return_scores else None
        # Where all candidates find a place, only their order and their scores can ask for a product.
        unscored = 0 if return_scores or order == "score" else self._open_places
        for batch in tiles.cut(runs, self.spec, num_heads):
            batch_queries, unscale = self._cast_queries(rows[torch.from_numpy(batch.rows)])
            best = np.empty((*batch.rows.shape, 0), np.int64)
            last_blocks = batch.positions // self.spec.block_size
            limits = last_blocks + (1 - self.spec.local_blocks)
            for segment in tiles.segments(batch, runs, page_table, self.spec, unscored=unscored):
                maxima = self._scorer.maxima(batch_queries, batch, segment)
                best = ranking.merge(best, maxima, segment.block_ids, limits, self._open_places)
            ids, values = ranking.arrange(best, last_blocks, self.spec, order, return_scores=return_scores)
            block_ids[batch.rows] = ids
            if scores is not None and values is not None:
                scale = unscale if raw_scores else unscale * np.float32(self.spec.score_scale)
                scores[batch.rows] = _scaled(values, scale)
        if scores is not None and raw_scores:
            self._score_forced(rows, runs, page_table, num_heads, block_ids, scores)
        shape = (num_tokens, num_heads, self.spec.topk)
        return Selection(
            torch.from_numpy(block_ids).view(shape), None if scores is None else torch.from_numpy(scores).view(shape)
        )

    def _score_forced(
        self,
        rows: torch.Tensor,
        runs: list[validate.Run],
        page_table: NDArray[np.int32],
        num_heads: int,
        block_ids: NDArray[np.int32],
        scores: NDArray[np.float32],
    ) -> None:
        """Gives forced blocks, of rows (token, head) `[N, topk]`, the unscaled scores that they have."""
        size = self.spec.block_size
        run_of = np.repeat(np.arange(len(runs)), [run.length * num_heads for run in runs])
        positions = np.concatenate([run.start + np.arange(run.length * num_heads) // num_heads for run in runs])
        layers = np.array([run.layer for run in runs])
        local = block_ids > (positions // size - self.spec.local_blocks)[:, None]
        forced, places = np.nonzero((block_ids >= 0) & (local | (block_ids < self.spec.init_blocks)))
        cells = self._bytes.view(-1, size, self.spec.head_dim)
        step = max(1, _APPEND_ELEMENTS // (size * self.spec.head_dim))
        for top in range(0, len(forced), step):
            row, place = forced[top : top + step], places[top : top + step]
            block = block_ids[row, place].astype(np.int64)
            pages = page_table[run_of[row], block].astype(np.int64)
            keys = cells[torch.from_numpy(pages * self.spec.num_layers + layers[run_of[row]])]
            queries, unscale = self._cast_queries(rows[torch.from_numpy(row)][None])
            products = torch.einsum("nd,nkd->nk", queries[0], keys.view(self.pages.dtype).float())
            later = block[:, None] * size + np.arange(size) > positions[row, None]
            products.masked_fill_(torch.from_numpy(later) | products.isnan(), -np.inf)
            scores[row, place] = _scaled(products.amax(dim=1).numpy(), unscale.reshape(-1))

    def _cast_queries(self, queries: torch.Tensor) -> tuple[torch.Tensor, NDArray[np.float32]]:
        """fp32 `[G, M, D]`: the queries as they are scored, and what undoes the scale of their rows."""
        if not self.rounds_queries:
            return queries.bfloat16().float(), np.ones(1, np.float32)
        scaled, unscale = scale_to_fp8(queries)
        return scaled.float(), unscale.numpy()


def _scaled(scores: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Times a scale; what is beyond float32 is infinite, as it is on a GPU."""
    with np.errstate(over="ignore"):
        return scores * scale
