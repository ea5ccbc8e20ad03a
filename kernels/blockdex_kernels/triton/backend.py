"""Index-key pages on a GPU, and the Triton kernels over them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels import validate
from blockdex_kernels.casts import TORCH_DTYPES
from blockdex_kernels.interface import (
    FP8_FLIP_TOLERANCE,
    RUN_SELECTS,
    RUN_WANTS_SCORES,
    Backend,
    Fp8Scoring,
    Order,
    PrefillKernel,
    Selection,
    Spans,
)
from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.triton.append import append
from blockdex_kernels.triton.chip import Chip, Launch
from blockdex_kernels.triton.decode import score_decode
from blockdex_kernels.triton.pages import Pages
from blockdex_kernels.triton.prefill import (
    ITEM_FIELDS,
    cast_queries,
    cut,
    max_items,
    plan_run,
    score_prefill,
    split,
)
from blockdex_kernels.triton.prefill_sm90 import KeyTiles
from blockdex_kernels.triton.prefill_sm90 import score_prefill as score_prefill_sm90
from blockdex_kernels.triton.rank import Signals, rank
from blockdex_kernels.triton.runs import Runs

SCORE_BYTES = 512 << 20
"""Most that the scores of one launch take; longer calls are cut into slices."""

_WIDTH_STEP = 32
_RAW_TOKENS = 16


class TritonBackend(Backend):
    """Pages on one GPU. Calls are queued on the current stream and return before they are done.

    What the tensors of `Spans` hold is not checked: nobody waits for it. Numbers out of bounds read or write elsewhere.

    Args:
        spec: the indexer.
        num_pages: pages to allocate.
        device: a CUDA device; the CPU where Triton's interpreter is on.
        reason: why this backend was chosen.
        fp8_scoring: `native` or `upcast`; read for an fp8 cache only. A chip that cannot multiply e4m3 upcasts.
        prefill_kernel: `hopper` takes the kernel of `prefill_sm90`, where that is made for chip, pages and indexer.
        score_bytes: most that the scores of one launch take.
        pages: `[num_pages, L, block_size, D]` of someone else, each page dense, at any distance of each other; None:
            allocated here.

    Attributes:
        plans_on_device: whether `prefill_into` is to be asked for what `prefill` is.

    Raises:
        ValueError: the spec or the device is not one that the kernels are made for.
    """

    plans_on_device: bool = True

    def __init__(
        self,
        spec: IndexSpec,
        num_pages: int,
        device: torch.device,
        *,
        reason: str,
        fp8_scoring: Fp8Scoring = "native",
        prefill_kernel: PrefillKernel = "hopper",
        score_bytes: int = SCORE_BYTES,
        pages: torch.Tensor | None = None,
    ) -> None:
        self.spec = spec
        self.device = torch.empty(0, device=device).device  # with its number, where `device` has none
        self.chip = Chip.of(device)
        shape = (num_pages, spec.num_layers, spec.block_size, spec.head_dim)
        if pages is None:
            pages = torch.empty(shape, dtype=TORCH_DTYPES[spec.key_dtype], device=device)
        self.pages = pages
        fp8 = spec.key_dtype == "fp8_e4m3"
        upcast = fp8 and (fp8_scoring == "upcast" or not self.chip.native_fp8)
        self._native_fp8 = fp8 and not upcast
        self._scaled = self.rounds_queries = self._native_fp8
        self._bytes = self.pages.view(torch.uint8) if fp8 else self.pages
        if self._native_fp8 and device.type == "cuda":
            self.flip_tolerance = FP8_FLIP_TOLERANCE
        self._keys = Pages.of(self.pages, upcast=upcast, tma=self.chip.tma)
        hopper = self.chip.warpgroups and prefill_kernel == "hopper"
        self._key_tiles = KeyTiles.of(self._keys, spec) if hopper else None
        self._score_bytes = score_bytes
        self._captured: list[torch.Tensor] = []
        scoring = f"triton-{self.chip.name}" + ("-fp8" if self._scaled else "-upcast" if upcast else "")
        self.kernels = {
            "append": (f"triton-{self.chip.name}", reason),
            "decode": (scoring, reason),
            "prefill": (scoring.replace("triton-", "gluon-") if self._key_tiles else scoring, reason),
        }

    @torch.no_grad()
    def append(self, keys: torch.Tensor, spans: Spans) -> None:
        """See `Backend.append`."""
        validate.check_keys(keys, spans, self.spec, self.device)
        if len(keys):
            append(keys, spans, self._bytes, self.spec, pdl=self.chip.pdl)

    @torch.no_grad()
    def decode(
        self, queries: torch.Tensor, spans: Spans, *, order: Order, return_scores: bool, raw_scores: bool = False
    ) -> Selection:
        """See `Backend.decode`. Without raw scores and with `spans.max_length` it can be captured in a CUDA graph."""
        validate.check_queries(queries, spans, order, self.spec, self.device)
        if return_scores and raw_scores:
            return self._select_raw(queries, spans, order)
        selection = self._empty_selection(queries, return_scores)
        width = width_of(spans.width)
        if self._tokens_at_once(queries.shape[1], width) < len(queries):
            # More than the scores may take: what prefill cuts into slices.
            return self.prefill(queries, spans, order=order, return_scores=return_scores)
        if len(queries):
            self.decode_into(selection, queries, spans, order=order)
        return selection

    def decode_into(
        self,
        selection: Selection,
        queries: torch.Tensor,
        spans: Spans,
        *,
        order: Order,
        targets: torch.Tensor | None = None,
        signals: Signals | None = None,
    ) -> None:
        """As `decode`, unchecked, into tensors that may be pinned on the host; one launch must hold all scores.

        With `spans.flags` the order is ascending, and `selection.scores` gets those of the runs that want them, raw.
        `targets` is int64 `[T * H]`: see `blockdex_kernels.triton.rank.rank`, as for `signals`.
        """
        max_length = spans.max_length
        if max_length is None:
            max_length = int(Runs.of(spans).lengths.max())
        num_tokens, heads, _ = queries.shape
        scores, positions, unscales = self._score_buffers(num_tokens * heads, num_tokens, width_of(spans.width))
        wants = None if spans.flags is None else torch.empty_like(positions)
        wide = queries.shape[1] * max_length > 32
        fp8 = self.chip.decode_fp8_wide if wide else self.chip.decode_fp8
        launch = fp8 if self._native_fp8 else self.chip.decode
        score_decode(
            queries,
            spans,
            max_length,
            self._keys,
            self.spec,
            scores,
            positions,
            wants,
            unscales,
            every_block=wants is None and (selection.scores is not None or order == "score"),
            programs=self.chip.multiprocessors * launch.programs,
            warps=launch.warps,
            stages=launch.stages,
            pdl=self.chip.pdl,
        )
        self.rank(scores, positions, unscales, selection, order, wants, targets, signals)

    @torch.no_grad()
    def prefill(
        self, queries: torch.Tensor, spans: Spans, *, order: Order, return_scores: bool, raw_scores: bool = False
    ) -> Selection:
        """See `Backend.prefill`. Waits for the device unless `spans.columns` is given.

        Can be captured in a CUDA graph with the columns; what replays must not change then are the runs' numbers.
        """
        validate.check_queries(queries, spans, order, self.spec, self.device)
        if return_scores and raw_scores:
            return self._select_raw(queries, spans, order)
        selection = self._empty_selection(queries, return_scores)
        runs = Runs.of(spans)
        spans = replace(spans, columns=runs.columns)
        step = self._tokens_at_once(queries.shape[1], width_of(runs.blocks(self.spec.block_size)))
        every_block = return_scores or order == "score"
        for number, part in enumerate(runs.slices(step)):
            at = slice(number * step, number * step + step)
            own = Selection(selection.block_ids[at], None if selection.scores is None else selection.scores[at])
            own_spans = spans if step >= len(queries) else self._slice(spans, part)
            # The scores of a slice are let go before those of the next are asked for.
            self.rank(*self.score_prefill(queries[at], own_spans, every_block=every_block), own, order)
        return selection

    def _slice(self, spans: Spans, runs: Runs) -> Spans:
        """Spans of some of the tokens."""
        rows, layers, starts, lengths = self._sent(np.stack([runs.rows, runs.layers, runs.starts, runs.lengths]))
        return Spans(layers, starts, lengths, spans.own_tables()[rows], runs.columns)

    def _select_raw(self, queries: torch.Tensor, spans: Spans, order: Order) -> Selection:
        """A selection with raw scores, in pieces of a decode's length: too seldom for kernels of its own."""
        selection = self._empty_selection(queries, return_scores=True)
        runs = Runs.of(spans)
        for number, tokens in enumerate(runs.slices(_RAW_TOKENS)):
            at = slice(number * _RAW_TOKENS, (number + 1) * _RAW_TOKENS)
            assert selection.scores is not None
            own = Selection(selection.block_ids[at], selection.scores[at])
            part = self._slice(spans, tokens)
            flags = torch.full_like(part.layers, RUN_SELECTS | RUN_WANTS_SCORES)
            part = replace(part, max_length=int(tokens.lengths.max()), flags=flags)
            self.decode_into(own, queries[at], part, order="ascending")
        return selection if order == "ascending" else self._by_score(selection, runs)

    def _by_score(self, selection: Selection, runs: Runs) -> Selection:
        """A selection in ascending order with raw scores, in the order of these: init, local, then other blocks."""
        ids, scores = selection.block_ids, selection.scores
        assert scores is not None
        firsts = np.cumsum(runs.lengths) - runs.lengths
        positions = np.repeat(runs.starts - firsts, runs.lengths) + np.arange(runs.lengths.sum())
        own_blocks = torch.from_numpy(positions // self.spec.block_size).to(ids.device)[:, None, None]
        init, local = ids < self.spec.init_blocks, ids > own_blocks - self.spec.local_blocks
        group = torch.where(init, 0, torch.where(local, 1, 2)).masked_fill(ids < 0, 3)
        # Stable, so that equal scores, and forced blocks, stay in the order of their ids.
        falling = torch.sort(torch.where(group == 2, -scores, 0.0), dim=-1, stable=True).indices
        grouped = torch.sort(group.gather(-1, falling), dim=-1, stable=True).indices
        at = falling.gather(-1, grouped)
        return Selection(ids.gather(-1, at), scores.gather(-1, at))

    def score_prefill(
        self, queries: torch.Tensor, spans: Spans, *, every_block: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Scores of queries `[T, H, D]`: what `rank` reads, in buffers of its own."""
        num_tokens, heads, _ = queries.shape
        runs = Runs.of(spans)
        rows, width = num_tokens * heads, width_of(runs.blocks(self.spec.block_size))
        buffers = self._score_buffers(rows, rows, width)
        if self._key_tiles is not None:
            self._score_sm90(queries, spans, heads, *buffers, every_block=every_block)
        else:
            self._score(queries, spans.own_tables(), self._cut(runs, heads, every_block=every_block), *buffers)
        return buffers

    def _cut(self, runs: Runs, heads: int, *, every_block: bool) -> torch.Tensor:
        launch, programs = self._prefill_launch()
        return self._sent(cut(runs, heads, self.spec, tile=launch.tile, programs=programs, every_block=every_block))

    def _score_sm90(
        self,
        queries: torch.Tensor,
        spans: Spans,
        heads: int | torch.Tensor,
        scores: torch.Tensor,
        positions: torch.Tensor,
        unscales: torch.Tensor | None,
        *,
        every_block: bool,
    ) -> None:
        assert self._key_tiles is not None
        score_prefill_sm90(
            queries,
            spans,
            heads,
            self._key_tiles,
            self.spec,
            scores,
            positions,
            unscales,
            every_block=every_block,
            programs=self.chip.multiprocessors,
            pdl=self.chip.pdl,
        )

    def split(self, rows: int, blocks: int) -> tuple[int, int]:
        """Tiles of a run of so many rows, and ranges of the blocks that its last row sees: see `prefill_into`."""
        launch, programs = self._prefill_launch()
        return split(rows, blocks, tile=launch.tile, programs=programs)

    def prefill_into(
        self,
        block_ids: torch.Tensor,
        queries: torch.Tensor,
        numbers: torch.Tensor,
        page_table: torch.Tensor,
        width: int,
    ) -> None:
        """As `prefill` for one run, unchecked, planned on the device: what a CUDA graph holds, and replays for others.

        Args:
            block_ids: int32 `[N, topk]`, written; -1 beyond the run's rows, which are its tokens times its heads.
            queries: `[N, D]`, of at least as many rows as the run has.
            numbers: int32 `[RUN_NUMBERS]`: see `plan_run`.
            page_table: int32 `[1, max_blocks]`.
            width: blocks that the run does not exceed.
        """
        rows = len(queries)
        scores, positions, unscales = self._score_buffers(rows, rows, width_of(width))
        if self._key_tiles is not None:
            layer, start, length, heads = (numbers[at : at + 1] for at in (0, 1, 2, 5))
            run = Spans(layer, start, length, page_table)
            self._score_sm90(queries[:, None], run, heads, scores, positions, unscales, every_block=False)
        else:
            launch, programs = self._prefill_launch()
            count = max_items(rows, tile=launch.tile, programs=programs)
            items = torch.empty((count, ITEM_FIELDS.value), dtype=torch.int32, device=self.device)
            plan_run(numbers, items, positions, self.spec, tile=launch.tile, pdl=self.chip.pdl)
            self._score(queries[:, None], page_table, items, scores, positions, unscales)
        self.rank(scores, positions, unscales, Selection(block_ids, None), "ascending")

    def _prefill_launch(self) -> tuple[Launch, int]:
        """The shape of its launch, and how many programs run at once."""
        launch = self.chip.prefill_fp8 if self._native_fp8 else self.chip.prefill
        return launch, self.chip.multiprocessors * launch.programs

    def _score(
        self,
        queries: torch.Tensor,
        page_table: torch.Tensor,
        items: torch.Tensor,
        scores: torch.Tensor,
        positions: torch.Tensor,
        unscales: torch.Tensor | None,
    ) -> None:
        launch, _ = self._prefill_launch()
        score_prefill(
            self._rows(queries, unscales),
            page_table,
            self._keys,
            self.spec,
            items,
            scores,
            positions,
            tile=launch.tile,
            warps=launch.warps,
            stages=launch.stages,
            pdl=self.chip.pdl,
        )

    def rank(
        self,
        scores: torch.Tensor,
        positions: torch.Tensor,
        unscales: torch.Tensor | None,
        selection: Selection,
        order: Order,
        wants: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        signals: Signals | None = None,
    ) -> None:
        """Fills a selection from scores: see `blockdex_kernels.triton.rank.rank`."""
        rank(
            scores,
            positions,
            wants,
            unscales,
            selection.block_ids,
            selection.scores,
            self.spec,
            order=order,
            pdl=self.chip.pdl,
            targets=targets,
            signals=signals,
        )

    def copy_pages(self, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """See `Backend.copy_pages`."""
        validate.check_copies(sources, destinations, len(self.pages))
        for source, destination in zip(sources.tolist(), destinations.tolist(), strict=True):
            self._bytes[destination].copy_(self._bytes[source])

    def _sent(self, numbers: NDArray[np.int32]) -> torch.Tensor:
        return sent(numbers, self.device, self._captured)

    def _rows(self, queries: torch.Tensor, unscales: torch.Tensor | None) -> torch.Tensor:
        """`[T * H, D]` as they are scored; the queries themselves where nothing is to be done."""
        dtype = torch.bfloat16 if self._keys.upcast else self.pages.dtype
        if queries.dtype == dtype and unscales is None and queries.is_contiguous():
            return queries.view(-1, queries.shape[2])
        rows = torch.empty((queries.shape[0] * queries.shape[1], queries.shape[2]), dtype=dtype, device=self.device)
        cast_queries(queries, rows.view(torch.uint8) if unscales is not None else rows, unscales, pdl=self.chip.pdl)
        return rows

    def _score_buffers(
        self, rows: int, positions: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return (
            torch.empty((rows, width), dtype=torch.float32, device=self.device),
            torch.empty(positions, dtype=torch.int32, device=self.device),
            torch.empty(rows, dtype=torch.float32, device=self.device) if self._scaled else None,
        )

    def _empty_selection(self, queries: torch.Tensor, return_scores: bool) -> Selection:
        shape = (*queries.shape[:2], self.spec.topk)
        block_ids = torch.empty(shape, dtype=torch.int32, device=self.device)
        scores = torch.empty(shape, dtype=torch.float32, device=self.device) if return_scores else None
        return Selection(block_ids, scores)

    def _tokens_at_once(self, heads: int, width: int) -> int:
        return max(self._score_bytes // (4 * heads * width), 1)


def width_of(blocks: int) -> int:
    """Columns of a score buffer for so many blocks: rows begin where wide loads can."""
    return -(-blocks // _WIDTH_STEP) * _WIDTH_STEP


def sent(numbers: NDArray[np.int32], device: torch.device, captured: list[torch.Tensor]) -> torch.Tensor:
    """Int32 numbers on the device, for which nobody waits. What a graph that is being captured copies is `captured`."""
    there = torch.from_numpy(numbers)
    if device.type == "cpu":
        return there
    there = there.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        captured.append(there)  # A replay copies it again.
    return there.to(device, non_blocking=True)
