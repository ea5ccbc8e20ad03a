"""What the engine must answer, worked out one request after another over plain arrays of keys."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.ring_messages import Answer, Queries, Request, TensorData, TokenAnswer, TokenRequest
from blockdex.contract import errors
from blockdex.contract.errors import BlockdexError, Reason
from blockdex.contract.messages import (
    CloseSequences,
    ForkSequence,
    GetSequence,
    OpenSequences,
    SequenceState,
    TruncateSequence,
)
from blockdex_kernels import IndexSpec, reference
from support.cache_state import check_integrity
from support.running_engine import NUMPY_DTYPES, SPEC, Running, open_sequence, tokens

BUSY = 99
"""A sequence that keeps the engine busy."""

SequenceKey = tuple[str, int]
"""Tenant and sequence id."""

Row = tuple[int, int, int, int]
"""Sequence id, start, length, revision."""


@dataclass
class Layer:
    """One layer of a sequence: its keys `[length, D]` and its revision."""

    keys: NDArray[np.float32]
    revision: int = 0


@dataclass
class NaiveEngine:
    """Every sequence as the keys of its layers, without pages; a request is done, refused, or put off."""

    spec: IndexSpec
    epoch: int
    sequences: dict[SequenceKey, list[Layer]] = field(default_factory=dict)

    def answer(self, request: Request) -> Answer | BlockdexError | None:
        """What a request is answered now; None where it waits for keys."""
        try:
            if request.epoch not in {0, self.epoch}:
                words = f"epoch: request names {request.epoch}, the cache's is {self.epoch}"
                raise errors.FailedPreconditionError(words, Reason.EPOCH_MISMATCH)
            return self._tokens(request) if isinstance(request, TokenRequest) else self._sequence(request)
        except BlockdexError as error:
            return None if isinstance(request, TokenRequest) and _waits(request, error) else error

    def _sequence(self, request: Request) -> SequenceState:
        match request:
            case OpenSequences(tenant=tenant, sequence_ids=sequence_ids):
                for sequence_id in sequence_ids:
                    held = self.sequences.get((tenant, sequence_id), ())
                    if any(len(layer.keys) or layer.revision for layer in held):
                        self._check_absent(tenant, sequence_id)
                empty = np.zeros((0, self.spec.head_dim), np.float32)
                for sequence_id in sequence_ids:
                    self.sequences[tenant, sequence_id] = [Layer(empty) for _ in range(self.spec.num_layers)]
                return SequenceState(self.epoch)
            case GetSequence(tenant=tenant, sequence_id=sequence_id):
                return self._state(tenant, sequence_id)
            case ForkSequence(tenant=tenant, parent_id=parent_id, child_id=child_id, length=length):
                parent = self._held(tenant, parent_id)
                self._check_absent(tenant, child_id)
                self.sequences[tenant, child_id] = [Layer(layer.keys[:length]) for layer in parent]
                return self._state(tenant, child_id)
            case TruncateSequence(tenant=tenant, sequence_id=sequence_id, length=length):
                for layer in self._held(tenant, sequence_id):
                    layer.keys = layer.keys[:length]
                return self._state(tenant, sequence_id)
            case CloseSequences(tenant=tenant, sequence_ids=sequence_ids):
                for sequence_id in sequence_ids:
                    self.sequences.pop((tenant, sequence_id), None)
                return SequenceState(self.epoch)
        raise AssertionError(request)

    def _tokens(self, request: TokenRequest) -> TokenAnswer:
        spans, number = request.spans, request.layer
        columns = (spans.sequence_ids, spans.starts, spans.lengths, spans.revisions)
        rows: list[Row] = list(zip(*(column.tolist() for column in columns), strict=True))
        layers = [self._held(request.tenant, row[0])[number] for row in rows]
        after = [Layer(layer.keys, layer.revision) for layer in layers]
        if request.keys is not None:
            keys = _array(request.keys.tensor, spans.num_tokens, self.spec.head_dim)
            _append(number, rows, after, keys, rollback=request.keys.rollback)
        answer = TokenAnswer(self.epoch)
        if request.queries is not None:
            half = request.queries
            _check_selection(number, rows, after)
            queries = _array(half.tensor, spans.num_tokens, half.num_heads, self.spec.head_dim)
            answer = self._select(rows, after, queries, half)
        for layer, new in zip(layers, after, strict=True):
            layer.keys, layer.revision = new.keys, new.revision
        return answer

    def _select(
        self, spans: list[Row], layers: list[Layer], queries: NDArray[np.float32], half: Queries
    ) -> TokenAnswer:
        block_ids, scores = [], []
        top = 0
        for (_, start, length, _), layer in zip(spans, layers, strict=True):
            rows = torch.from_numpy(queries[top : top + length])
            selection = reference.select(torch.from_numpy(layer.keys), rows, start, self.spec, order=half.order)
            block_ids.append(selection.block_ids.numpy())
            scores.append(_raw(selection) if half.raw_scores else selection.scores.float().numpy())
            top += length
        wanted = half.return_scores or half.raw_scores
        return TokenAnswer(self.epoch, np.concatenate(block_ids), np.concatenate(scores) if wanted else None)

    def _held(self, tenant: str, sequence_id: int) -> list[Layer]:
        try:
            return self.sequences[tenant, sequence_id]
        except KeyError:
            words = f"sequence {sequence_id}: unknown (never opened, closed, or evicted)"
            raise errors.NotFoundError(words, Reason.UNKNOWN_SEQUENCE) from None

    def _check_absent(self, tenant: str, sequence_id: int) -> None:
        if (tenant, sequence_id) in self.sequences:
            raise errors.AlreadyExistsError(f"sequence {sequence_id}: open already", Reason.SEQUENCE_EXISTS)

    def _state(self, tenant: str, sequence_id: int) -> SequenceState:
        layers = self._held(tenant, sequence_id)
        lengths = np.array([len(layer.keys) for layer in layers], np.int64)
        return SequenceState(self.epoch, lengths, np.array([layer.revision for layer in layers], np.uint64))


def _waits(request: TokenRequest, error: BlockdexError) -> bool:
    if request.queries is None or not request.queries.wait_for_keys:
        return False
    named = request.spans.revisions.all()
    return error.reason == (Reason.FUTURE_REVISION if named else Reason.KEYS_NOT_APPENDED)


def _raw(selection: reference.Reference) -> NDArray[np.float32]:
    """Unscaled scores of a selection, those of forced blocks too."""
    chosen = selection.block_ids.long()
    scores = selection.block_scores.gather(2, chosen.clamp(min=0))
    raw: NDArray[np.float32] = scores.masked_fill(chosen < 0, -np.inf).float().numpy()
    return raw


def _append(number: int, rows: list[Row], layers: list[Layer], keys: NDArray[np.float32], *, rollback: bool) -> None:
    _check_not_stale("append", number, rows, layers)
    for (sequence_id, start, length, revision), layer in zip(rows, layers, strict=True):
        if revision and revision == layer.revision and start + length != len(layer.keys):
            words = f"append ends at {start + length}, length at its revision {revision} is {len(layer.keys)}"
            raise errors.AbortedError(f"sequence {sequence_id}, layer {number}: {words}", Reason.STALE_REVISION)
    applies = [not revision or revision != layer.revision for (*_, revision), layer in zip(rows, layers, strict=True)]
    for (sequence_id, start, _, revision), layer, applied in zip(rows, layers, applies, strict=True):
        overlaps = start < len(layer.keys) and not revision and not rollback
        if applied and (start > len(layer.keys) or overlaps):
            words = f"sequence {sequence_id}, layer {number}: append starts at {start}, length is {len(layer.keys)}"
            if overlaps:
                raise errors.OutOfRangeError(
                    f"{words}; to roll back takes a revision or rollback", Reason.APPEND_OVERLAPS
                )
            raise errors.OutOfRangeError(words, Reason.APPEND_BEYOND_LENGTH)
    top = 0
    for (_, start, length, revision), layer, applied in zip(rows, layers, applies, strict=True):
        if applied:
            layer.keys = np.concatenate((layer.keys[:start], keys[top : top + length]))
            layer.revision = max(layer.revision, revision)
        top += length


def _check_selection(number: int, rows: list[Row], layers: list[Layer]) -> None:
    _check_not_stale("selection", number, rows, layers)
    for (sequence_id, _, _, revision), layer in zip(rows, layers, strict=True):
        if revision > layer.revision:
            raise _wrong_revision("selection", number, sequence_id, revision, layer.revision, Reason.FUTURE_REVISION)
    for (sequence_id, start, length, _), layer in zip(rows, layers, strict=True):
        if start + length > len(layer.keys):
            words = (
                f"sequence {sequence_id}, layer {number}: "
                f"selection ends at {start + length}, length is {len(layer.keys)}"
            )
            raise errors.FailedPreconditionError(words, Reason.KEYS_NOT_APPENDED)


def _check_not_stale(call: str, number: int, rows: list[Row], layers: list[Layer]) -> None:
    for (sequence_id, _, _, revision), layer in zip(rows, layers, strict=True):
        if 0 < revision < layer.revision:
            raise _wrong_revision(call, number, sequence_id, revision, layer.revision, Reason.STALE_REVISION)


def _wrong_revision(
    call: str, number: int, sequence_id: int, revision: int, held: int, reason: Reason
) -> errors.AbortedError:
    words = f"sequence {sequence_id}, layer {number}: {call} has revision {revision}, the layer is at {held}"
    return errors.AbortedError(words, reason)


def _array(tensor: TensorData, *shape: int) -> NDArray[np.float32]:
    return np.frombuffer(tensor.data, NUMPY_DTYPES[tensor.dtype]).astype(np.float32).reshape(shape)


def check_same(actual: object, expected: Answer | BlockdexError, what: str) -> None:
    """Asserts that an answer or a refusal is the one expected, to the last number and word."""
    assert type(actual) is type(expected), f"{what}: {actual!r} instead of {expected!r}"
    if isinstance(expected, BlockdexError):
        assert isinstance(actual, BlockdexError)
        assert (actual.reason, actual.message) == (expected.reason, expected.message), what
        return
    tokens = isinstance(expected, TokenAnswer)
    for name in ("epoch", "block_ids", "scores") if tokens else ("epoch", "lengths", "revisions"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), f"{what}: {name}")


async def answer_together(run: Running, requests: Sequence[Request], *, setup: Sequence[Request] = ()) -> None:
    """Queues requests while the engine is busy, and compares its answers with those of one after another.

    Args:
        run: the engine; its notes begin with these requests.
        requests: what is queued together.
        setup: what is done before.
    """
    naive = NaiveEngine(SPEC, run.engine.info().epoch)
    for request in (*setup, open_sequence(BUSY)):
        naive.answer(request)
        await run.ask(request)
    with run.backend.held("append") as entered:
        run.submit(tokens(2, [(BUSY, 0, 1)], keys=np.zeros((1, SPEC.head_dim), np.float32)))
        await run.reached(entered)
        futures = [run.submit(request) for request in requests]
        run.backend.calls.clear()
    answers = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 60)
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        expected = naive.answer(request)
        assert expected is not None
        check_same(answer, expected, f"request {number}: {request}")
    check_integrity(run.engine._cache)
