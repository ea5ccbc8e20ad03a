"""A program that calls a server with everything there is, for a while, and checks every answer against the reference.

    python tests/soak_caller.py ADDRESS stream|unary SEED SECONDS

Two tasks share a client, each with sequences of its own; every so many steps the client is closed and another one made,
which comes to whatever frontend the kernel picks. Prints how often each thing was done, as JSON; ends with an error
where an answer is wrong. Keys and queries are small integers, whose products every kernel adds up exactly: a selection
is the reference's or it is wrong.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import sys
import time
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex import AsyncClient, BlockdexError, DeadlineExceededError
from support import vectorised_reference
from support.clients import Transport
from support.wire import SPEC, keys_of, queries_of

Keys = list[NDArray[np.float32]]
"""Of one sequence, by layer: float32 `[tokens, D]`."""

STEPS_OF_A_CLIENT = 20
LONGEST = 4000
"""Tokens: twice the blocks that a query may select."""
MOST_SEQUENCES = 3
_SHORT_SECONDS = 0.02

WEIGHTS = {
    "append": 4,
    "decode": 4,
    "prefill": 2,
    "append_and_decode": 5,
    "append_and_prefill": 2,
    "open": 2,
    "fork": 2,
    "truncate": 2,
    "close": 1,
    "look": 1,
    "refused": 1,
    "late": 1,
    "cancelled": 1,
    "cancelled_append": 1,
}


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence, from `start` on: float32 keys `[n, D]`."""

    sequence: int
    start: int
    keys: NDArray[np.float32]


class Task:
    """Steps of one task, and what it knows of its sequences.

    Args:
        seed: of what is done, and part of the ids of its sequences.

    Attributes:
        done: how often each thing was done.
    """

    def __init__(self, seed: int) -> None:
        self.done: collections.Counter[str] = collections.Counter()
        self._random = np.random.default_rng(seed)
        self._ids = itertools.count(1 + seed * 10**9)
        self._sequences: dict[int, Keys] = {}

    async def steps(self, client: AsyncClient, count: int, end: float) -> None:
        """Does so many steps, fewer where time is up."""
        names, weights = list(WEIGHTS), np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
        for _ in range(count):
            if time.monotonic() > end:
                return
            name = "open" if not self._sequences else str(self._random.choice(names, p=weights))
            await getattr(self, f"_{name}")(client)
            self.done[name] += 1

    async def close_all(self, client: AsyncClient) -> None:
        """Gives everything up."""
        for sequence in list(self._sequences):
            await self._drop(client, sequence)

    async def _open(self, client: AsyncClient) -> None:
        if len(self._sequences) == MOST_SEQUENCES:
            await self._close(client)
        sequence = next(self._ids)
        await client.open_sequence(sequence)
        self._sequences[sequence] = [np.empty((0, SPEC.head_dim), np.float32) for _ in range(SPEC.num_layers)]
        for layer in range(SPEC.num_layers):
            await self._write(client, layer, [self._piece(sequence, layer, LONGEST)])

    async def _close(self, client: AsyncClient) -> None:
        await self._drop(client, self._any())

    async def _append(self, client: AsyncClient) -> None:
        layer = self._layer()
        await self._write(client, layer, self._pieces(layer, 200))

    async def _append_and_decode(self, client: AsyncClient) -> None:
        await self._append_and_select(client, 16)

    async def _append_and_prefill(self, client: AsyncClient) -> None:
        await self._append_and_select(client, 100)

    async def _append_and_select(self, client: AsyncClient, most: int) -> None:
        layer = self._layer()
        pieces = self._pieces(layer, most)
        ids, starts, lengths = _columns(pieces)
        queries = queries_of(self._random, sum(lengths))
        keys = np.concatenate([piece.keys for piece in pieces])
        answer = await client.append_and_select(
            layer, sequences=ids, starts=starts, lengths=lengths, keys=keys, queries=queries
        )
        self._note(layer, pieces)
        self._check(layer, ids, starts, lengths, queries, answer)

    async def _decode(self, client: AsyncClient) -> None:
        await self._select(client, 16)

    async def _prefill(self, client: AsyncClient) -> None:
        await self._select(client, 120)

    async def _select(self, client: AsyncClient, most: int) -> None:
        layer = self._layer()
        ids = [each for each, keys in self._sequences.items() if len(keys[layer])]
        if not ids:
            return
        held = [len(self._sequences[each][layer]) for each in ids]
        lengths = [1 + int(self._random.integers(min(most, length))) for length in held]
        starts = [int(self._random.integers(length - taken + 1)) for length, taken in zip(held, lengths, strict=True)]
        queries = queries_of(self._random, sum(lengths))
        answer = await client.select_blocks(layer, sequences=ids, starts=starts, lengths=lengths, queries=queries)
        self._check(layer, ids, starts, lengths, queries, answer)

    async def _fork(self, client: AsyncClient) -> None:
        if len(self._sequences) == MOST_SEQUENCES:
            await self._close(client)
        if not self._sequences:
            return
        parent, child = self._any(), next(self._ids)
        length = int(self._random.integers(LONGEST))
        lengths = await client.fork_sequence(parent, child, length)
        self._sequences[child] = [keys[:length] for keys in self._sequences[parent]]
        assert list(lengths) == [len(keys) for keys in self._sequences[child]]

    async def _truncate(self, client: AsyncClient) -> None:
        sequence, length = self._any(), int(self._random.integers(LONGEST))
        await client.truncate_sequence(sequence, length)
        self._sequences[sequence] = [keys[:length] for keys in self._sequences[sequence]]

    async def _look(self, client: AsyncClient) -> None:
        sequence = self._any()
        state = await client.get_sequence(sequence)
        assert list(state.lengths) == [len(keys) for keys in self._sequences[sequence]]

    async def _refused(self, client: AsyncClient) -> None:
        """A gap, which is refused and changes nothing."""
        sequence, layer = self._any(), self._layer()
        start = len(self._sequences[sequence][layer]) + 1
        try:
            await client.append_keys(layer, sequences=sequence, starts=start, keys=keys_of(self._random, 3))
        except BlockdexError:
            return
        raise AssertionError("a gap was let in")

    async def _late(self, client: AsyncClient) -> None:
        """Waits for keys that never come, until its deadline."""
        try:
            await self._wait_for_keys(client, _SHORT_SECONDS)
        except DeadlineExceededError:
            return
        raise AssertionError("it did not wait")

    async def _cancelled(self, client: AsyncClient) -> None:
        """Waits for keys that never come, and gives up."""
        await _give_up(asyncio.create_task(self._wait_for_keys(client, 30.0)), self._nap())

    async def _cancelled_append(self, client: AsyncClient) -> None:
        """Gives up an append, of which nobody knows what became: the sequence is closed."""
        sequence, keys = self._any(), keys_of(self._random, 100)
        appending = client.append_keys(self._layer(), sequences=sequence, starts=0, keys=keys)
        await _give_up(asyncio.create_task(appending), self._nap())
        await self._drop(client, sequence)

    async def _wait_for_keys(self, client: AsyncClient, timeout: float) -> None:
        sequence, layer = self._any(), self._layer()
        start, queries = len(self._sequences[sequence][layer]), queries_of(self._random, 2)
        await client.select_blocks(
            layer, sequences=sequence, starts=start, queries=queries, wait_for_keys=True, timeout=timeout
        )

    async def _drop(self, client: AsyncClient, sequence: int) -> None:
        del self._sequences[sequence]
        await client.close_sequence(sequence)

    def _any(self) -> int:
        return int(self._random.choice(list(self._sequences)))

    def _layer(self) -> int:
        return int(self._random.integers(SPEC.num_layers))

    def _nap(self) -> float:
        return float(self._random.uniform(0, _SHORT_SECONDS))

    def _pieces(self, layer: int, most: int) -> list[Piece]:
        """New tokens for some of the sequences, `most` for each at most."""
        chosen = [each for each in self._sequences if self._random.random() < 0.7] or [self._any()]
        return [self._piece(sequence, layer, most) for sequence in chosen]

    def _piece(self, sequence: int, layer: int, most: int) -> Piece:
        """New tokens at the end, or, as rejected drafts are, over the last ones."""
        held = len(self._sequences[sequence][layer])
        length = 1 + int(self._random.integers(most))
        start = min(held - int(self._random.integers(min(held, 16) + 1)), LONGEST - length)
        return Piece(sequence, start, keys_of(self._random, length))

    async def _write(self, client: AsyncClient, layer: int, pieces: list[Piece]) -> None:
        ids, starts, lengths = _columns(pieces)
        keys = np.concatenate([piece.keys for piece in pieces])
        await client.append_keys(layer, sequences=ids, starts=starts, lengths=lengths, keys=keys)
        self._note(layer, pieces)

    def _note(self, layer: int, pieces: list[Piece]) -> None:
        for piece in pieces:
            held = self._sequences[piece.sequence]
            held[layer] = np.concatenate([held[layer][: piece.start], piece.keys])

    def _check(
        self,
        layer: int,
        ids: list[int],
        starts: list[int],
        lengths: list[int],
        queries: NDArray[np.float32],
        answer: NDArray[np.int32],
    ) -> None:
        first = 0
        for sequence, start, length in zip(ids, starts, lengths, strict=True):
            rows = slice(first, first + length)
            first += length
            keys = torch.from_numpy(self._sequences[sequence][layer])
            expected = vectorised_reference.select(keys, torch.from_numpy(queries[rows]), start, SPEC).block_ids
            assert np.array_equal(answer[rows], expected.numpy()), (sequence, layer, start, length)
        assert first == len(answer)
        self.done["rows checked"] += answer.shape[0] * answer.shape[1]


def _columns(pieces: list[Piece]) -> tuple[list[int], list[int], list[int]]:
    """Ids, starts and lengths."""
    return (
        [piece.sequence for piece in pieces],
        [piece.start for piece in pieces],
        [len(piece.keys) for piece in pieces],
    )


async def _give_up(task: asyncio.Task[None], seconds: float) -> None:
    """Cancels a task, if it has not ended before."""
    await asyncio.wait([task], timeout=seconds)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def main(address: str, transport: Transport, seed: int, seconds: float) -> None:
    """Calls until time is up."""
    end = time.monotonic() + seconds
    tasks = [Task(2 * seed), Task(2 * seed + 1)]
    clients = 0
    while time.monotonic() < end:
        clients += 1
        async with AsyncClient(address, transport=transport) as client:
            await asyncio.gather(*(task.steps(client, STEPS_OF_A_CLIENT, end) for task in tasks))
    async with AsyncClient(address, transport=transport) as client:
        await asyncio.gather(*(task.close_all(client) for task in tasks))
    print(json.dumps(sum((task.done for task in tasks), collections.Counter({"clients": clients}))))


if __name__ == "__main__":
    _, server, how, number, duration = sys.argv
    asyncio.run(main(server, cast(Transport, how), int(number), float(duration)))
