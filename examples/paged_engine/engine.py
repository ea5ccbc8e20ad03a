"""The engine: a step takes chunks of requests through the model, verifies drafts and keeps what was generated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM

from examples.paged_engine.attention import use_paged_attention
from examples.paged_engine.blocks import BlockManager
from examples.paged_engine.cache import Batch, PagedCache
from examples.paged_engine.drafts import Drafter
from examples.paged_engine.pool import IndexPool
from examples.paged_engine.request import Chunk, Request
from examples.paged_engine.scheduler import Scheduler


class Engine:
    """Continuous batching over a paged cache.

    Attributes:
        counts: what happened so far, by name.
    """

    def __init__(
        self,
        model: MiniMaxM3VLForCausalLM,
        cache: PagedCache,
        blocks: BlockManager,
        *,
        max_rows: int,
        max_tokens: int,
        max_drafts: int,
        pool: IndexPool | None = None,
    ) -> None:
        """Runs `model`, whose indexers are those that it is to run with.

        Args:
            model: the model.
            cache: its keys and values.
            blocks: the cache's blocks.
            max_rows: requests that run at once.
            max_tokens: tokens of a step.
            max_drafts: draft tokens of a request.
            pool: what the indexers ask, told of block tables before each step; None if they keep keys themselves.
        """
        self.counts: Counter[str] = Counter()
        self._model = model
        self._cache = cache
        self._blocks = blocks
        self._scheduler = Scheduler(blocks, max_rows, max_tokens, self.counts)
        self._drafter = Drafter()
        self._max_drafts = max_drafts
        self._pool = pool
        use_paged_attention(model)

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Serves requests that come at once; returns what was generated for each."""
        for request in requests:
            self._scheduler.add(request)
        while self._scheduler.waiting or self._scheduler.running:
            self.step()
        return [request.generated for request in requests]

    @torch.inference_mode()
    def step(self) -> None:
        """Runs one step."""
        chunks = self._scheduler.schedule()
        self.counts["steps"] += 1
        batch = Batch(self.counts["steps"], chunks, self._blocks.block_size, self._model.device)
        self.counts["steps of chunks that differ in length"] += len(set(batch.lengths)) > 1
        if self._pool is not None:
            self._pool.set_tables(batch)
        self._cache.batch = batch
        logits = self._model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            past_key_values=self._cache,
            use_cache=True,
            paged_cache=self._cache,
        ).logits
        following: list[int] = logits[0].argmax(dim=-1).tolist()
        for chunk, (span, _, _) in zip(chunks, batch, strict=True):
            self._take(chunk, following[span])

    def _take(self, chunk: Chunk, following: Sequence[int]) -> None:
        """Moves a request on; `following` is what the model puts after each of the chunk's tokens."""
        request = chunk.request
        last = chunk.end - chunk.start - 1
        if chunk.end < len(request.tokens):
            self.counts["chunks before the end of a prompt"] += 1
            request.num_computed = chunk.end
        else:
            # A right draft is computed already. Behind it the slots hold wrong ones, until they are written over.
            right = next(
                (place for place, draft in enumerate(chunk.drafts) if draft != following[last + place]),
                len(chunk.drafts),
            )
            self.counts["drafts accepted"] += right
            self.counts["drafts rejected"] += len(chunk.drafts) - right
            request.num_computed = chunk.end + right
            request.tokens += following[last : last + right + 1]
            self._drafter.learn(request.tokens, len(request.tokens) - right - 1)
        self._blocks.remember(request)
        if request.num_missing == 0:
            self._scheduler.finish(request)
        else:
            request.drafts = self._drafter.guess(request.tokens, min(self._max_drafts, request.num_missing - 1))
