"""Appends and selections of a cache that no engine has: the core admits them, and no keys are written."""

from __future__ import annotations

import os
import weakref

import numpy as np

from benchmarks.ring_messages import TokenRequest
from blockdex import _native as native
from blockdex.cache import IndexCache, PageCopy
from blockdex.contract.errors import BlockdexError
from blockdex.executor.interface import step_buffer_bytes
from blockdex.ring.handshake import new_link
from blockdex.ring.segment import Sizes
from blockdex.scheduler.sequences import SequenceKeeper
from support.foreign_frontend import ForeignFrontend
from support.running_engine import tokens

_SIZES = Sizes(slots=8, request_bytes=1 << 20, answer_bytes=1 << 20)
_MAX_RUNS = 8
_LAST: list[Admission] = []

Row = tuple[int, ...]
"""Sequence id, start, length[, revision]."""


class Admission:
    """A core that shares a cache, and a client that asks one request at a time."""

    def __init__(self, cache: IndexCache) -> None:
        spec = cache.spec
        self.nudge = os.eventfd(0, os.EFD_NONBLOCK)
        self.core = native.Core(
            layers=spec.num_layers,
            heads=spec.num_index_heads,
            head_dim=spec.head_dim,
            topk=spec.topk,
            init_blocks=spec.init_blocks,
            local_blocks=spec.local_blocks,
            block_size=spec.block_size,
            longest=_MAX_RUNS,
            max_sequence_tokens=spec.max_sequence_tokens,
            max_spans=64,
            max_queued=8,
            max_queue_seconds=1.0,
            max_message_bytes=1 << 20,
            scale=1.0,
            odd_keys=False,
            odd_queries=False,
            nudge=self.nudge,
            spin_seconds=0.0,
            hold_seconds=0.0,
            seconds_bounds=(1.0,),
            size_bounds=(1.0,),
        )
        ids = native.MAX_TOKENS * spec.num_index_heads * spec.topk
        self._ids = [np.zeros(ids, np.int32) for _ in range(native.STEPS)]
        for number, block_ids in enumerate(self._ids):
            self.core.set_step(
                number, np.zeros(step_buffer_bytes(spec), np.uint8), block_ids, np.zeros(ids, np.float32)
            )
        self.core.set_run_step(lambda number, runs, count: self._ids[number].fill(0))
        self.core.set_epoch(cache.epoch)
        engine, client = new_link(_SIZES, epoch=1)
        self.client = ForeignFrontend(client)
        self.core.add(native.ServerLink(engine.segment, engine.client_bell, engine.engine_bell))
        self._cache, self._sides = weakref.ref(cache), (engine, client)

    def serves(self, cache: IndexCache) -> bool:
        """Whether it is that cache's."""
        return self._cache() is cache

    def close(self) -> None:
        """Gives its files back."""
        for side in self._sides:
            side.close()
        os.close(self.nudge)

    def ask(self, cache: IndexCache, request: TokenRequest) -> list[PageCopy]:
        """Asks as an engine's thread does, and answers the copies that are to be made before any key is written.

        Raises:
            BlockdexError: the request is refused.
        """
        keeper, copies = SequenceKeeper(self.core, cache), list[PageCopy]()
        self.core.set_sequence_columns(*cache.sequence_columns)
        called = cache._sequences.last_calls.copy()
        self.client.told.clear()
        self.client.send(request)
        while not self.client.read():
            self.core.run(0.0)
            keeper.trim()
            for item in iter(self.core.take, None):
                if item[1] == "large":
                    self.core.answer(item[0], 0, 0, 0, 0, 0, None, None)
                else:
                    copies += keeper.handle([item])
            self.core.set_sequence_columns(*cache.sequence_columns)
        # The core's clock is another one than the test's.
        calls = cache._sequences.last_calls
        calls[: len(called)][calls[: len(called)] != called] = cache._clock()
        answer = self.client.told[0].answer
        if isinstance(answer, BlockdexError):
            raise answer
        return copies


def ask(cache: IndexCache, request: TokenRequest) -> list[PageCopy]:
    """As `Admission.ask`. The last cache's core is kept: what it knows is in the cache, so another one can go on."""
    if not _LAST or not _LAST[0].serves(cache):
        while _LAST:
            _LAST.pop().close()
        _LAST.append(Admission(cache))
    return _LAST[0].ask(cache, request)


def append(
    cache: IndexCache, tenant: str, layer: int, *rows: Row, rollback: bool = True, select: bool = False
) -> list[PageCopy]:
    """Appends to rows, and selects for them if so told; the copies to make first."""
    count, spec = sum(row[2] for row in rows), cache.spec
    keys = np.zeros((count, spec.head_dim), np.float32)
    queries = np.zeros((count, spec.num_index_heads, spec.head_dim), np.float32) if select else None
    return ask(cache, tokens(layer, rows, keys=keys, queries=queries, rollback=rollback, tenant=tenant))


def select(cache: IndexCache, tenant: str, layer: int, *rows: Row) -> None:
    """Selects for rows."""
    count, spec = sum(row[2] for row in rows), cache.spec
    queries = np.zeros((count, spec.num_index_heads, spec.head_dim), np.float32)
    ask(cache, tokens(layer, rows, queries=queries, tenant=tenant))
