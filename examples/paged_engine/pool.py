"""The engine's index keys as a pool of the server: a page for each of its blocks, a table row for each request."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

import blockdex
from examples.paged_engine.cache import Batch


class IndexPool:
    """A pool and the ranks that ask it.

    A rank stands for a process of a tensor-parallel group, with a client and index heads of its own. The first one sets
    the tables and appends the keys, which all have alike; the others wait for its append by the number of the step.
    """

    def __init__(
        self, ranks: Sequence[blockdex.Client], pool_id: int, *, num_blocks: int, max_rows: int, max_blocks: int
    ) -> None:
        """Creates the pool; `max_blocks` is the length of the longest block table."""
        first, *others = ranks
        pool = first.create_pool(pool_id, num_pages=num_blocks, num_rows=max_rows, max_blocks=max_blocks)
        self._ranks = [pool, *(client.pool(pool_id) for client in others)]
        self._threads = ThreadPoolExecutor(len(ranks))
        self._tables: list[list[int]] = [[] for _ in range(max_rows)]

    def close(self) -> None:
        """Gives the pages back."""
        self._threads.shutdown()
        self._ranks[0].close()

    def set_tables(self, batch: Batch) -> None:
        """Sends the cells of a step's rows that differ from what was sent before.

        What is left behind a shorter table than the row's last one stays there: no query reads so far.
        """
        rows, first_blocks, counts, page_ids = [], [], [], []
        for row, table in zip(batch.rows, batch.block_tables, strict=True):
            sent = self._tables[row]
            first = next((block for block, page in enumerate(table) if sent[block : block + 1] != [page]), len(table))
            if first < len(table):
                rows.append(row)
                first_blocks.append(first)
                counts.append(len(table) - first)
                page_ids += table[first:]
                self._tables[row] = table
        if rows:
            self._ranks[0].set_page_tables(rows, page_ids, first_blocks=first_blocks, counts=counts)

    def append_and_select(self, layer: int, batch: Batch, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """A layer's step: keys `[T, head_dim]` and queries `[T, heads, head_dim]` in, int32 `[T, heads, topk]` out."""
        num_heads = queries.shape[1] // len(self._ranks)

        def ask(rank: int) -> torch.Tensor:
            pool, first_head = self._ranks[rank], rank * num_heads
            own = queries[:, first_head : first_head + num_heads]
            call = pool.select_blocks if rank else partial(pool.append_and_select, keys=keys)
            return call(
                layer,
                rows=batch.rows,
                starts=batch.starts,
                lengths=batch.lengths,
                queries=own,
                first_head=first_head,
                num_heads=num_heads,
                revision=batch.step,
            )

        # The last rank first, so that the others do wait for the first one's keys.
        answers = list(self._threads.map(ask, reversed(range(len(self._ranks)))))
        return torch.cat(answers[::-1], dim=1)
