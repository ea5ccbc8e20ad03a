"""What only Python decides of single requests: the life of sequences and pools, and the pages that appends need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockdex._native import Core
from blockdex.cache import IndexCache, PageCopy, Sequence
from blockdex.contract.errors import BlockdexError
from blockdex.ring import layout
from blockdex.scheduler.large_request import Rows


class SequenceKeeper:
    """Grants pages and does what requests ask of sequences, one request after another.

    Args:
        core: has the requests, and is told what becomes of them.
        cache: where the sequences are.
    """

    def __init__(self, core: Core, cache: IndexCache) -> None:
        self._core = core
        self._cache = cache

    def handle(self, items: Iterable[tuple[Any, ...]]) -> list[PageCopy]:
        """Answers or grants what the core has handed over; the copies to make, in order, before any key is written."""
        copies: list[PageCopy] = []
        for item in items:
            number, kind, *rest = item
            try:
                copies += self._grant(number, *rest) if kind == "pages" else self._do(number, kind, *rest)
            except BlockdexError as refused:
                refuse(self._core, number, refused)
        return copies

    def trim(self) -> None:
        """Gives back the pages of what was cut."""
        for entry in np.frombuffer(self._core.take_cut(), np.uint32).tolist():
            self._cache.trim(entry)

    def _grant(self, number: int, layer: int, parts: tuple[bytes, ...]) -> list[PageCopy]:
        all_rows = Rows.of(parts)
        rows = all_rows.subset(all_rows.applies)
        entries, ends = rows.entries.astype(np.intp), rows.starts + rows.lengths
        if self._cache.moves_readers(entries, rows.starts, ends):
            return []  # The core asks again when the prefill is done.
        subject = f"sequence {all_rows.ids[0]}" if len(all_rows.ids) == 1 else f"{len(all_rows.ids)} sequences"
        named = all_rows.entries.astype(np.intp)
        copies = self._cache.allocate_pages(f"{subject}, layer {layer}: append", named, entries, rows.starts, ends)
        self._core.grant(number)
        return copies

    def _do(self, number: int, kind: str, tenant: str, *rest: Any) -> list[PageCopy]:
        cache = self._cache
        copies: list[PageCopy] = []
        state: Sequence | None = None
        match kind, rest:
            case "open", (ids, leases):
                cache.open_sequences(tenant, dict(zip(_words(ids), _words(leases), strict=True)))
            case "close", (ids, _):
                cache.close_sequences(tenant, _words(ids))
            case "get", (sequence_id, _, _):
                state = cache.get_sequence(tenant, sequence_id)
            case "fork", (parent_id, child_id, length):
                state, copies = cache.fork_sequence(tenant, parent_id, child_id, length)
            case "truncate", (sequence_id, _, length):
                state = cache.truncate_sequence(tenant, sequence_id, length)
            case "create_pool", (pool_id, num_pages, num_rows, max_blocks):
                cache.create_pool(tenant, pool_id, num_pages, num_rows, max_blocks)
            case "close_pool", (pool_id, _, _):
                cache.close_pool(tenant, pool_id)
        if state is None:
            self._core.answer(number, layout.IS_STATE, 0, 0, 0, 0, None, None)
        else:
            flags = layout.IS_STATE | layout.HAS_LENGTHS
            self._core.answer(number, flags, 0, 0, 0, len(state.lengths), state.lengths, state.revisions)
        if kind not in {"open", "get", "create_pool"}:
            self._core.try_again()
        return copies


def named_by(items: Iterable[tuple[Any, ...]]) -> NDArray[np.intp]:
    """Entries `[N]` of the sequences that requests for pages name, among what the core has handed over.

    Each was found when its request was checked, and is to be the same sequence's when its pages are granted.
    """
    parts = [Rows.of(item[3]).entries for item in items if item[1] == "pages"]
    return np.concatenate([*parts, np.zeros(0, np.uint32)]).astype(np.intp)


def refuse(core: Core, number: int, error: BlockdexError) -> None:
    """Answers a request with an error, and the numbers that it names."""
    numbers = (f"{name}={value}" for name, value in error.metadata.items())
    core.refuse(number, error.code, error.reason, "\x1f".join((error.message, *numbers)))


def _words(column: bytes) -> list[int]:
    words: list[int] = np.frombuffer(column, np.uint64).tolist()
    return words
