"""One sequence over several servers, each of which keeps every k-th block of it.

Server i of k keeps blocks i, i + k, i + 2k, ... as its own blocks 0, 1, 2, ... So that each query has a position on
every server that sees exactly the keys before it, the tokens of the k - 1 blocks behind a server's own block are
written there too: padding, which the server's next block overwrites. A padding block outranks an own one only where, as
a block of its own server, it outranks it in the whole sequence too: scores are the same, and both ids are the higher
ones. What is forced in the whole sequence is forced where it lies, padding or not. So a block that is among the best
of the whole sequence is among the candidates of its server; merging them by score and block id, without padding, gives
the ids of one server. Padding whose keys are not at hand any more is NaN, which ranks last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from blockdex.client.client import Client
from blockdex.client.tensors import array_like, host_array
from blockdex.cluster.merge import merge
from blockdex.contract.errors import FailedPreconditionError, InvalidArgumentError, OutOfRangeError, Reason
from blockdex.contract.messages import Order
from blockdex_kernels import IndexSpec

_UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens as one server takes them.

    Attributes:
        first, last: tokens of the call, from the first up to, but without, the last.
        start: position of the first on the server.
        own: how many of them, from the first on, are of the server's own block; what follows is padding.
    """

    first: int
    last: int
    start: int
    own: int


@dataclass(frozen=True, slots=True)
class Shard:
    """What one server keeps.

    Attributes:
        index, count: it keeps blocks b with b mod count = index.
        block_size: tokens of a block.
    """

    index: int
    count: int
    block_size: int

    def runs(self, start: int, length: int) -> Iterator[Run]:
        """Tokens `start` to `start + length`, each run within one own block and the padding behind it."""
        before, size = self.index * self.block_size, self.count * self.block_size
        position, end = max(start, before), start + length
        while position < end:
            number, offset = divmod(position - before, size)
            last = min(end, before + (number + 1) * size)
            own = max(0, min(last - position, self.block_size - offset))
            yield Run(position - start, last - start, number * self.block_size + offset, own)
            position = last

    def block_ids(self, local: NDArray[np.int32]) -> NDArray[np.int32]:
        """Ids in the whole sequence of blocks of the server; -1 stays."""
        return np.where(local < 0, np.int32(-1), local * np.int32(self.count) + np.int32(self.index))


class ShardedSequence:
    """A sequence over k servers that gives the block ids of one server.

    One caller at a time. Its writes carry no revisions: after one that failed, on any server, the layer's length is
    unknown, and the next append names its start. So does the first append of another process that continues the
    sequence, to each layer.

    Args:
        clients: of the servers, in an order that stays; of one spec.
        sequence_id: the same on each.

    Raises:
        InvalidArgumentError: no clients, or their servers have different specs.
    """

    def __init__(self, clients: Sequence[Client], sequence_id: int) -> None:
        if not clients:
            raise InvalidArgumentError("clients: there must be at least one, got 0", Reason.INVALID_SPANS)
        specs = [client.info().spec for client in clients]
        for index, spec in enumerate(specs):
            if spec != specs[0]:
                raise InvalidArgumentError(
                    f"clients: server {index} has spec {spec}, server 0 has {specs[0]}", Reason.INVALID_SPANS
                )
        self._clients = tuple(clients)
        self._id = sequence_id
        self._spec: IndexSpec = specs[0]
        self._shards = [Shard(index, len(clients), self._spec.block_size) for index in range(len(clients))]
        self._lengths = [_UNKNOWN] * self._spec.num_layers
        self._unpadded: set[int] = set()
        self._threads = ThreadPoolExecutor(len(clients), "blockdex-shards")

    def open(self, *, lease_seconds: int = 0) -> None:
        """Opens it, empty, on every server."""
        self._everywhere(lambda index: self._clients[index].open_sequence(self._id, lease_seconds=lease_seconds))
        self._lengths = [0] * self._spec.num_layers

    def close(self) -> None:
        """Gives it up on every server; the object takes no more calls."""
        self._everywhere(lambda index: self._clients[index].close_sequence(self._id))
        self._threads.shutdown()

    def append_keys(self, layer: int, keys: Any, *, start: int | None = None) -> None:
        """Writes keys `[T, D]` of one layer at the end, or from `start` on, which loses what lies behind.

        Raises:
            OutOfRangeError: the start would leave a gap (APPEND_BEYOND_LENGTH).
            FailedPreconditionError: the length is not known, and no start named (OUTCOME_UNKNOWN).
        """
        self._write(layer, keys, None, start, "ascending", False)

    def append_and_select(
        self,
        layer: int,
        keys: Any,
        queries: Any,
        *,
        start: int | None = None,
        order: Order = "ascending",
        return_scores: Literal[False, "raw"] = False,
    ) -> Any:
        """`append_keys`, and the blocks that the queries `[T, H, D]` of these tokens read.

        Returns:
            Block ids, int32 `[T, H, topk]`, as `Client.append_and_select`; with `return_scores` also the raw scores.
        """
        return self._write(layer, keys, queries, start, order, return_scores)

    def select_blocks(
        self,
        layer: int,
        queries: Any,
        *,
        order: Order = "ascending",
        return_scores: Literal[False, "raw"] = False,
    ) -> Any:
        """The blocks that the queries `[T, H, D]` of the last T tokens read.

        Raises:
            OutOfRangeError: they begin before a server's last own block: its padding behind the one before is
                overwritten (KEYS_NOT_APPENDED). Queries of long runs go with their keys, by `append_and_select`.
            FailedPreconditionError: the length is not known (OUTCOME_UNKNOWN).
        """
        array = host_array("queries", queries)
        length = self._length(layer)
        start = length - len(array)
        if start < 0:
            raise OutOfRangeError(
                f"sequence {self._id}, layer {layer}: {len(array)} queries, length is {length}",
                Reason.KEYS_NOT_APPENDED,
            )

        def ask(index: int) -> list[tuple[Run, Any]]:
            runs = list(self._shards[index].runs(start, len(array)))
            if len(runs) > 1:
                raise OutOfRangeError(
                    f"sequence {self._id}, layer {layer}: queries from {start} on, server {index} has its last block "
                    f"from {start + runs[-1].first} on",
                    Reason.KEYS_NOT_APPENDED,
                )
            return [(run, self._select(index, layer, run, array)) for run in runs]

        return self._merged(queries, array, self._everywhere(ask), start, order, return_scores)

    def truncate(self, length: int) -> None:
        """Cuts every layer to at most `length` tokens; the next call on each layer must append from there."""
        for shard in self._shards:
            kept = [run.start + run.own for run in shard.runs(0, length)]
            self._clients[shard.index].truncate_sequence(self._id, max(kept, default=0))
        self._lengths = [min(each, length) for each in self._lengths]
        self._unpadded.update(range(self._spec.num_layers))

    def _write(
        self, layer: int, keys: Any, queries: Any, start: int | None, order: Order, return_scores: Literal[False, "raw"]
    ) -> Any:
        array = host_array("keys", keys)
        asked = None if queries is None else host_array("queries", queries)
        if asked is not None and len(asked) != len(array):
            raise InvalidArgumentError(
                f"queries: must be as many as the {len(array)} keys, got {len(asked)}", Reason.INVALID_TENSOR
            )
        length = self._length(layer, known=start is None)
        begin = length if start is None else start
        if 0 <= length < begin:
            raise OutOfRangeError(
                f"sequence {self._id}, layer {layer}: append starts at {begin}, length is {length}",
                Reason.APPEND_BEYOND_LENGTH,
            )
        padded = begin == length and layer not in self._unpadded
        self._lengths[layer] = _UNKNOWN

        def write(index: int) -> list[tuple[Run, Any]]:
            if not padded:
                self._pad(index, layer, begin, array)
            runs = self._shards[index].runs(begin, len(array))
            return [(run, self._append(index, layer, run, array, asked)) for run in runs]

        answers = self._everywhere(write)
        self._lengths[layer] = begin + len(array)
        self._unpadded.discard(layer)
        return None if asked is None else self._merged(queries, asked, answers, begin, order, return_scores)

    def _pad(self, index: int, layer: int, begin: int, array: NDArray[Any]) -> None:
        """Writes the padding up to `begin` anew, which later blocks may have overwritten."""
        shard = self._shards[index]
        last = list(shard.runs(0, begin))[-1:]
        for run in last:
            missing = run.last - run.first - run.own
            if missing:
                padding = np.full((missing, array.shape[1]), np.nan, array.dtype)
                self._put(index, layer, run.start + run.own, padding)

    def _append(self, index: int, layer: int, run: Run, keys: NDArray[Any], queries: NDArray[Any] | None) -> Any:
        rows = keys[run.first : run.last]
        if queries is None:
            self._put(index, layer, run.start, rows)
            return None
        return self._clients[index].append_and_select(
            layer,
            sequences=self._id,
            starts=run.start,
            keys=rows,
            queries=queries[run.first : run.last],
            rollback=True,
            return_scores="raw",
        )

    def _put(self, index: int, layer: int, start: int, keys: NDArray[Any]) -> None:
        self._clients[index].append_keys(layer, sequences=self._id, starts=start, keys=keys, rollback=True)

    def _select(self, index: int, layer: int, run: Run, queries: NDArray[Any]) -> Any:
        rows = queries[run.first : run.last]
        return self._clients[index].select_blocks(
            layer, sequences=self._id, starts=run.start, queries=rows, return_scores="raw"
        )

    def _merged(
        self,
        like: Any,
        queries: NDArray[Any],
        answers: Sequence[Sequence[tuple[Run, Any]]],
        start: int,
        order: Order,
        return_scores: Literal[False, "raw"],
    ) -> Any:
        shape = (len(answers), *queries.shape[:2], self._spec.topk)
        ids = np.full(shape, -1, np.int32)
        scores = np.full(shape, -np.inf, np.float32)
        for shard, runs in zip(self._shards, answers, strict=True):
            for run, (block_ids, found) in runs:
                ids[shard.index, run.first : run.last] = shard.block_ids(block_ids)
                scores[shard.index, run.first : run.last] = found
        merged, ranks = merge(ids, scores, np.arange(start, start + len(queries)), self._spec, order)
        block_ids = array_like(like, "block_ids", bytearray(merged.tobytes()), "int32", merged.shape)
        if return_scores is False:
            return block_ids
        return block_ids, array_like(like, "scores", bytearray(ranks.tobytes()), "float32", ranks.shape)

    def _length(self, layer: int, *, known: bool = True) -> int:
        if not 0 <= layer < self._spec.num_layers:
            raise InvalidArgumentError(
                f"layer: must be 0 to {self._spec.num_layers - 1}, got {layer}", Reason.INVALID_LAYER
            )
        length = self._lengths[layer]
        if known and length == _UNKNOWN:
            raise FailedPreconditionError(
                f"sequence {self._id}, layer {layer}: length is not known, name the start", Reason.OUTCOME_UNKNOWN
            )
        return length

    def _everywhere(self, call: Any) -> list[Any]:
        """The answers of a call on each server, side by side; all have ended when the first failure is raised."""
        futures = [self._threads.submit(call, index) for index in range(len(self._clients))]
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        if failures:
            raise failures[0]
        return [future.result() for future in futures]
