"""Clients that go on whatever happens to their server, check every answer, and notice what they lost without a word."""

from __future__ import annotations

import collections
import itertools
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

import blockdex
from blockdex.contract.errors import BlockdexError, NotFoundError, Reason
from faults.target import LAYERS, MODEL

HEADS, HEAD_DIM, BLOCK, TOPK = 2, 32, 16, 4
assert (MODEL["sparse_num_index_heads"], MODEL["sparse_index_dim"]) == (HEADS, HEAD_DIM)
_LONGEST = 400
_CALL_SECONDS = 5.0
_PAUSE_SECONDS = 0.01
_GONE = frozenset({Reason.UNKNOWN_SEQUENCE, Reason.EPOCH_MISMATCH})


class WrongAnswerError(AssertionError):
    """A server said what is not so."""


def selected(keys: NDArray[np.float32], queries: NDArray[np.float32], start: int) -> NDArray[np.int32]:
    """What queries `[T, HEADS, HEAD_DIM]` at positions from `start` on select: block ids, int32 `[T, HEADS, TOPK]`.

    Keys and queries are small integers, whose products are added up exactly.
    """
    ids = np.full((len(queries), HEADS, TOPK), -1, np.int32)
    for token, own in enumerate(queries):
        products = own @ keys[: start + token + 1].T
        blocks = (start + token) // BLOCK + 1
        padded = np.full((HEADS, blocks * BLOCK), -np.inf, np.float32)
        padded[:, : products.shape[1]] = products
        scores = padded.reshape(HEADS, blocks, BLOCK).max(axis=2)
        scores[:, -1] = np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, :TOPK]
        ids[token, :, : best.shape[1]] = np.sort(best, axis=1)
    return ids


@dataclass
class Known:
    """What a client knows of its sequence: keys and a revision a layer."""

    number: int
    keys: list[NDArray[np.float32]] = field(default_factory=lambda: [np.zeros((0, HEAD_DIM), np.float32)] * LAYERS)
    revisions: list[int] = field(default_factory=lambda: [0] * LAYERS)


class Checked:
    """One client with one sequence at a time, on a thread of its own.

    Attributes:
        answers: answers that were right.
        lost: sequences that the server said it does not hold any more.
        refusals: by reason.
        failure: what was wrong, after which it has ended.
        good: beginning and end of the last call that went well, `time.monotonic`.
    """

    def __init__(self, name: str, seed: int, **options: object) -> None:
        self.name = name
        self.answers = self.lost = 0
        self.refusals: collections.Counter[str] = collections.Counter()
        self.failure: BaseException | None = None
        self.good = (0.0, 0.0)
        self._asked: tuple[int, NDArray[np.float32]] | None = None
        self._random = np.random.default_rng(seed)
        self._options = options
        self._ids = itertools.count(1 + (seed << 32))
        self._known: Known | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends."""
        self._ending.set()
        self._thread.join(60)

    def good_after(self, moment: float, seconds: float) -> float | None:
        """When the first call that began after a moment went well; None where none does for so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.failure is None:
            began, ended = self.good
            if began > moment:
                return ended
            time.sleep(0.002)
        return None

    def _run(self) -> None:
        try:
            with blockdex.Client(tenant=self.name, timeout=_CALL_SECONDS, **self._options) as client:  # type: ignore[arg-type]
                while not self._ending.is_set():
                    self._try(client)
        except BaseException as failure:
            self.failure = failure

    def _try(self, client: blockdex.Client) -> None:
        began = time.monotonic()
        try:
            self._step(client)
        except BlockdexError as error:
            self.refusals[str(error.reason)] += 1
            if error.reason in _GONE:
                self._lose()
            elif self._known is not None:
                self._find_out(client)
            self._ending.wait(_PAUSE_SECONDS)
            return
        self.answers += 1
        self.good = (began, time.monotonic())

    def _step(self, client: blockdex.Client) -> None:
        if self._known is None:
            number = next(self._ids)
            client.open_sequence(number)
            self._known = Known(number)
            return
        known, random = self._known, self._random
        if max(map(len, known.keys)) > _LONGEST:
            client.close_sequence(known.number)
            self._known = None
            return
        if random.random() < 0.05:
            self._fork(client, known)
            return
        layer = int(random.integers(LAYERS))
        count = int(random.choice([1, 1, 1, 2, 4, 40]))
        keys, start = self._numbers(count, HEAD_DIM), len(known.keys[layer])
        queries = self._numbers(count, HEADS, HEAD_DIM)
        self._asked = (layer, keys)
        ids = client.append_and_select(
            layer,
            sequences=known.number,
            starts=start,
            keys=keys,
            queries=queries,
            revisions=known.revisions[layer] + 1,
        )
        self._take(known, layer, keys)
        expected = selected(known.keys[layer], queries, start)
        if not np.array_equal(ids, expected):
            raise WrongAnswerError(
                f"{self.name}: {start} + {count} tokens select {ids.tolist()}, not {expected.tolist()}"
            )

    def _fork(self, client: blockdex.Client, known: Known) -> None:
        """Goes on with a fork, which shares the last page until it is written; what it was forked from is closed."""
        child, self._asked = next(self._ids), None
        client.fork_sequence(known.number, child, _LONGEST * 2)
        parent, self._known = known.number, Known(child, list(known.keys))
        layer = int(self._random.integers(LAYERS))
        keys, queries = self._numbers(1, HEAD_DIM), self._numbers(1, HEADS, HEAD_DIM)
        self._asked = (layer, keys)
        start = len(known.keys[layer])
        ids = client.append_and_select(layer, sequences=child, starts=start, keys=keys, queries=queries, revisions=1)
        self._take(self._known, layer, keys)
        if not np.array_equal(ids, selected(self._known.keys[layer], queries, start)):
            raise WrongAnswerError(f"{self.name}: a fork at {start} selects {ids.tolist()}")
        client.close_sequence(parent)

    def _take(self, known: Known, layer: int, keys: NDArray[np.float32]) -> None:
        known.keys[layer] = np.concatenate((known.keys[layer], keys))
        known.revisions[layer] += 1
        self._asked = None

    def _find_out(self, client: blockdex.Client) -> None:
        """After a call whose outcome is not known: either it was done or it was not, and nothing else has changed."""
        while not self._ending.is_set():
            known = self._known
            assert known is not None
            try:
                state = client.get_sequence(known.number)
            except BlockdexError as error:
                self.refusals[str(error.reason)] += 1
                if isinstance(error, NotFoundError) or error.reason in _GONE:
                    self._lose()
                    return
                self._ending.wait(_PAUSE_SECONDS)
                continue
            if self._asked is not None and int(state.revisions[self._asked[0]]) == known.revisions[self._asked[0]] + 1:
                self._take(known, *self._asked)
            expected = [len(keys) for keys in known.keys], known.revisions
            if (list(state.lengths), list(state.revisions)) != expected:
                raise WrongAnswerError(f"{self.name}: the sequence is {state}, and not {expected}")
            return

    def _lose(self) -> None:
        self.lost += self._known is not None
        self._known = None

    def _numbers(self, *shape: int) -> NDArray[np.float32]:
        return self._random.integers(-4, 5, shape).astype(np.float32)
