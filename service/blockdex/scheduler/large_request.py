"""Requests that fit no step of the core: entered in the cache already, run from their columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex.executor.interface import Answer, Bytes, Packed, Target
from blockdex.ring import layout
from blockdex.ring.regions import Region
from blockdex_kernels import IndexSpec
from blockdex_kernels.interface import Order

Chosen = slice | NDArray[np.intp]
"""Tokens of a packed tensor: one behind the other, or some."""

ALL_TOKENS = slice(None)

TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,
}


class Rows(NamedTuple):
    """The spans of a request, row by row `[N]`.

    Attributes:
        ids: uint64, the sequences.
        entries: uint32, where the cache has them.
        starts: int64, position of each span's first token.
        lengths: int64, its tokens.
        applies: bool, whether its keys are to be written; not where they were before.
    """

    ids: NDArray[np.uint64]
    entries: NDArray[np.uint32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    applies: NDArray[np.bool_]

    @classmethod
    def of(cls, parts: Sequence[bytes]) -> Rows:
        """Rows as the core hands them over."""
        ids, entries, starts, lengths, applies = parts
        return cls(
            np.frombuffer(ids, np.uint64),
            np.frombuffer(entries, np.uint32),
            np.frombuffer(starts, np.int64),
            np.frombuffer(lengths, np.int64),
            np.frombuffer(applies, np.bool_),
        )

    def tokens_of(self, chosen: NDArray[np.bool_]) -> NDArray[np.intp]:
        """The tokens of the packed tensors beside them that belong to the chosen rows."""
        return np.flatnonzero(np.repeat(chosen, self.lengths))

    def subset(self, chosen: NDArray[np.bool_]) -> Rows:
        """The chosen rows."""
        return Rows(
            self.ids[chosen], self.entries[chosen], self.starts[chosen], self.lengths[chosen], self.applies[chosen]
        )


class Tensor(NamedTuple):
    """A packed tensor as it came: bytes in the arena, or a tensor of bytes in a region."""

    dtype: torch.dtype
    data: memoryview | torch.Tensor

    def take(self, token_bytes: int, tokens: Chosen) -> Bytes:
        """The bytes of some tokens; those received, not copied, where they lie together."""
        if isinstance(tokens, slice):
            return (
                self.data if tokens is ALL_TOKENS else self.data[tokens.start * token_bytes : tokens.stop * token_bytes]
            )
        return self.rows(token_bytes)[torch.from_numpy(tokens)].reshape(-1)

    def rows(self, token_bytes: int) -> torch.Tensor:
        """uint8 `[T, token_bytes]`, where it lies."""
        data = self.data if isinstance(self.data, torch.Tensor) else torch.frombuffer(self.data, dtype=torch.uint8)
        return data.view(-1, token_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class LargeRequest:
    """A request that fits no step: its number in the core, what it names, and what it brings.

    Attributes:
        number: by which the core is told its answer.
        layer: where it appends and selects.
        rows: its spans.
        tenant: number of whose it is.
        keys: `[T, D]`, or None.
        queries: `[T, num_heads, D]`, of heads `first_head` on, or None.
        order, return_scores, raw_scores: of the selection.
        pages: whether page numbers of its pool stand for block ids in its answer.
        block_ids, scores: bytes of the regions where they go, or None.
    """

    number: int
    layer: int
    rows: Rows
    tenant: int
    keys: Tensor | None
    queries: Tensor | None
    first_head: int
    num_heads: int
    order: Order
    return_scores: bool
    raw_scores: bool
    pages: bool = False
    block_ids: torch.Tensor | None = None
    scores: torch.Tensor | None = None

    @classmethod
    def of(cls, item: tuple[Any, ...]) -> LargeRequest:
        """The request of an item as `Core.take` hands it over."""
        number, _, layer, parts, tenant, link, keys_dtype, keys, queries_dtype, queries, *rest = item
        block_ids, scores, first_head, num_heads, order, flags = rest
        return cls(
            number,
            layer,
            Rows.of(parts),
            tenant,
            _tensor(link.memory, keys_dtype, keys),
            _tensor(link.memory, queries_dtype, queries),
            first_head,
            num_heads,
            layout.ORDERS[order - 1] if queries_dtype else "ascending",
            bool(flags & (layout.RETURN_SCORES | layout.RAW_SCORES)),
            bool(flags & layout.RAW_SCORES),
            bool(flags & layout.PAGES),
            None if block_ids is None else _in_region(*block_ids),
            None if scores is None else _in_region(*scores),
        )

    @property
    def is_answered_in_regions(self) -> bool:
        """Whether kernels can write its selection where it goes: nothing of it is in its answer, or becomes another."""
        return not self.pages and self.block_ids is not None and (self.scores is not None or not self.return_scores)


def _tensor(memory: memoryview, dtype: int, place: tuple[Region | None, int, int]) -> Tensor | None:
    region, begin, num_bytes = place
    if not dtype:
        return None
    data = memory[begin : begin + num_bytes] if region is None else _in_region(region, begin, num_bytes)
    return Tensor(TORCH_DTYPES[layout.DTYPES[dtype - 1]], data)


def _in_region(region: Region, begin: int, num_bytes: int) -> torch.Tensor:
    """uint8 of a region, which it holds."""
    every = torch.as_tensor(region if region.on_device else np.asarray(region))
    return every[begin : begin + num_bytes]


class Reading:
    """Selections of the same tokens of one layer, by one caller or by several that hold different heads.

    Attributes:
        first: the first caller; layer, rows and what is asked for are the same for all.
        callers: who still waits for the answer, each with its own heads.
        heads: of all callers, side by side.
        num_tokens: of the spans.
        longest: tokens of the longest span.
        unread: tokens that no kernel has answered yet.
        is_direct: whether kernels write the answer where its callers want it.
    """

    def __init__(self, callers: Sequence[LargeRequest], spec: IndexSpec) -> None:
        self.first = first = callers[0]
        self.callers: list[tuple[LargeRequest, slice]] = []
        self.heads = 0
        tensors: list[Tensor] = []
        for caller in callers:
            assert caller.queries is not None
            tensors.append(caller.queries)
            self.callers.append((caller, slice(self.heads, self.heads + caller.num_heads)))
            self.heads += caller.num_heads
        self.longest = int(first.rows.lengths.max())
        self.num_tokens = self.unread = int(first.rows.lengths.sum())
        self.is_direct = False
        self._topk = spec.topk
        self._token_bytes = self.heads * spec.head_dim * tensors[0].dtype.itemsize
        self._queries = tensors[0] if len(tensors) == 1 else _side_by_side(tensors, self.num_tokens)
        self._answer: Answer | None = None

    @property
    def alike(self) -> tuple[object, ...]:
        """What selections of one launch have in common."""
        first = self.first
        return self.heads, self._queries.dtype, first.order, first.return_scores, first.raw_scores

    def lies_on(self, device: torch.device) -> bool:
        """Whether its queries are where a device reads them."""
        data = self._queries.data
        return device.type == (data.device.type if isinstance(data, torch.Tensor) else "cpu")

    def queries(self, tokens: Chosen) -> Bytes:
        """Bytes of `[tokens, heads, D]`."""
        return self._queries.take(self._token_bytes, tokens)

    def packed(self, parts: Sequence[Bytes]) -> Packed:
        """Tokens of this reading, or of others like it, as kernels take them."""
        return Packed(self._queries.dtype, self.heads, parts)

    def targets(self, tokens: slice) -> list[Target]:
        """Where its callers want their shares of some tokens, if it is direct."""
        if not self.is_direct:
            return []
        made: list[Target] = []
        for caller, heads in self.callers:
            shape = (self.num_tokens, caller.num_heads, self._topk)
            assert caller.block_ids is not None
            ids = caller.block_ids.view(torch.int32).view(shape)[tokens]
            scores = None if caller.scores is None else caller.scores.view(torch.float32).view(shape)[tokens]
            made.append(Target(heads, ids, scores))
        return made

    def write(self, tokens: Chosen, count: int, answer: Answer | None) -> None:
        """Takes a kernel's answer for some of the tokens; None where it was written to its targets."""
        self.unread -= count
        if answer is None:
            return
        if tokens is ALL_TOKENS:
            self._answer = answer
            return
        if self._answer is None:
            shape = (self.num_tokens, self.heads, self._topk)
            self._answer = Answer(
                np.empty(shape, np.int32), np.empty(shape, np.float32) if self.first.return_scores else None
            )
        self._answer.block_ids[tokens] = answer.block_ids
        if self._answer.scores is not None:
            self._answer.scores[tokens] = answer.scores

    def shares(self) -> Iterable[tuple[LargeRequest, Answer | None]]:
        """Every caller's share of the answer, None where it has it; to be called once nothing is unread."""
        if self._answer is None:
            yield from ((caller, None) for caller, _ in self.callers)
            return
        block_ids, scores = self._answer.block_ids, self._answer.scores
        for caller, heads in self.callers:
            own = None if scores is None else np.ascontiguousarray(scores[:, heads])
            yield caller, Answer(np.ascontiguousarray(block_ids[:, heads]), own)


@dataclass(slots=True)
class _Group:
    """Callers that share a read, and their heads as the bits of a number."""

    callers: list[LargeRequest] = field(default_factory=list)
    heads: int = 0


def readings(selections: Iterable[LargeRequest], spec: IndexSpec) -> list[Reading]:
    """Groups selections whose tokens, order and dtype are the same, so that they share one read of the keys.

    A group holds each head once at most: whoever asks for the same again is another engine, and no kernel is made ready
    for more heads than the indexer has.
    """
    groups: dict[tuple[object, ...], list[_Group]] = {}
    for caller in selections:
        assert caller.queries is not None
        what = (caller.layer, caller.order, caller.return_scores, caller.raw_scores, caller.queries.dtype)
        where = tuple(column.tobytes() for column in caller.rows[1:4])
        alike, heads = groups.setdefault((*what, *where), []), (1 << caller.num_heads) - 1 << caller.first_head
        group = next((group for group in alike if not group.heads & heads), None)
        if group is None:
            alike.append(group := _Group())
        group.callers.append(caller)
        group.heads |= heads
    return [Reading(group.callers, spec) for alike in groups.values() for group in alike]


def _side_by_side(tensors: Sequence[Tensor], num_tokens: int) -> Tensor:
    """`[T, heads, D]` of several callers as one tensor, on the device where one of them lies there."""
    parts = [tensor.rows(len(tensor.data) // num_tokens) for tensor in tensors]
    device = next((part.device for part in parts if part.is_cuda), parts[0].device)
    joined = torch.cat([part.to(device) for part in parts], dim=1).view(-1)
    return Tensor(tensors[0].dtype, joined if joined.is_cuda else joined.numpy().data)
