"""Forming a batch: which requests may run together, in an order that no sequence can tell from arrival order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from blockdex.cache import Cache, PageCopy
from blockdex.contract.errors import BlockdexError, Reason, UnimplementedError
from blockdex.contract.messages import (
    Answer,
    CloseSequences,
    ForkSequence,
    GetSequence,
    OpenSequences,
    SequenceRequest,
    SequenceState,
    TokenAnswer,
    TokenRequest,
    TruncateSequence,
)
from blockdex.scheduler.request import Entry, Outcome, SequenceKey


class Batch:
    """Requests that run together: page copies first, then all appends, then all selections.

    Entries are admitted in order of arrival. The cache's books change at admission, its pages when the batch runs. What
    would tell that order from arrival order is a conflict: an append to a layer of a sequence that the batch appends to
    or reads already, or a fork, truncation or closing of such a sequence. So is an append that would move a sequence
    off a page that a slice of a prefill on its way reads: whoever is left with the page may write it, or give it away.
    Such an entry is held back for a later batch, and so is every later one that names one of its sequences; the others
    overtake it.

    Attributes:
        copies: whole pages to copy, in order, before anything is written.
        appends: entries that write, each with the rows of its spans that apply; None for all.
        selections: entries that read.
        outcomes: entries that are answered without any kernel.
        waiting: selections whose keys are not there yet, and whose callers wait for them.
        changed: whether anything changed that a waiting selection may have waited for.
    """

    def __init__(
        self, cache: Cache, reading: Iterable[tuple[SequenceKey, int]], being_read: Iterable[SequenceKey]
    ) -> None:
        """What earlier batches' prefills do.

        Args:
            cache: where the sequences are.
            reading: the (sequence, layer) pairs that they still read.
            being_read: the sequences whose pages slices on their way read.
        """
        self._cache = cache
        self._being_read = set(being_read)
        self._layers_in_use = set(reading)
        self._sequences_in_use = {sequence for sequence, _ in self._layers_in_use}
        self._users: list[tuple[Entry, int]] = []
        self._held_back: set[SequenceKey] = set()
        self.copies: list[PageCopy] = []
        self.appends: list[tuple[Entry, NDArray[np.bool_] | None]] = []
        self.selections: list[Entry] = []
        self.outcomes: list[Outcome] = []
        self.waiting: list[Entry] = []
        self.changed = False

    def admit(self, entry: Entry) -> bool:
        """Takes an entry into the batch, or answers it, or has it wait; False if it must be held back."""
        if self._conflicts(entry):
            self._held_back.update(entry.sequences)
            return False
        self._do(entry)
        return True

    def taken(self) -> Iterator[Entry]:
        """Entries that it works on or answers, one or more times each; not those that wait."""
        yield from (entry for entry, _ in self.appends)
        yield from self.selections
        yield from (entry for entry, _ in self.outcomes)

    def try_waiting(self) -> None:
        """Tries the selections that wait for keys again: each is taken, answered, or waits on."""
        waiting, self.waiting = self.waiting, []
        for entry in waiting:
            self._do(entry)

    def _conflicts(self, entry: Entry) -> bool:
        self._note_users()
        if self._held_back and not self._held_back.isdisjoint(entry.sequences):
            return True
        request = entry.request
        if isinstance(request, TokenRequest):
            if request.keys is None:
                return False
            in_use = self._layers_in_use
            if in_use and any((sequence, request.layer) in in_use for sequence in entry.sequences):
                return True
            return bool(self._being_read) and self._moves_what_is_read(entry, request)
        if isinstance(request, OpenSequences | GetSequence):
            return False
        return bool(self._sequences_in_use) and not self._sequences_in_use.isdisjoint(entry.sequences)

    def _moves_what_is_read(self, entry: Entry, request: TokenRequest) -> bool:
        spans = request.spans
        return any(
            sequence in self._being_read and self._cache.would_unshare(*sequence, start, start + length)
            for sequence, start, length in zip(
                entry.sequences, spans.starts.tolist(), spans.lengths.tolist(), strict=True
            )
        )

    def _note_users(self) -> None:
        """Enters what is in use; put off until somebody asks, since a batch of one entry needs none of it."""
        for user, layer in self._users:
            self._layers_in_use.update((sequence, layer) for sequence in user.sequences)
            self._sequences_in_use.update(user.sequences)
        self._users.clear()

    def _do(self, entry: Entry) -> None:
        request = entry.request
        try:
            self._cache.check_epoch(request.epoch)
            if isinstance(request, TokenRequest):
                self._do_tokens(entry, request)
            else:
                self.outcomes.append((entry, self._do_sequence(request)))
        except BlockdexError as error:
            if isinstance(request, TokenRequest) and _waits(request, error):
                self.waiting.append(entry)
            else:
                self.outcomes.append((entry, error))

    def _do_tokens(self, entry: Entry, request: TokenRequest) -> None:
        tenant, layer, spans = request.tenant, request.layer, request.spans
        if request.queries is not None and request.queries.raw_scores:
            raise UnimplementedError("return_scores: this engine has no raw ones", Reason.UNKNOWN_FEATURE)
        keys, plan = request.keys, None
        if keys is not None:
            plan = self._cache.plan_append(tenant, layer, spans, rollback=keys.rollback)
        if request.queries is not None and not (plan is not None and plan.all_apply):
            self._cache.check_selection(tenant, layer, spans, plan)  # Otherwise it reads what it has just written.
        if plan is not None:
            # A repeated append too, which writes nothing: it is a call, and calls renew leases.
            self.copies += self._cache.apply_append(plan)
        if plan is not None and (plan.all_apply or plan.applies.any()):
            self.appends.append((entry, None if plan.all_apply else plan.applies))
            self.changed = True
        elif request.queries is None:
            self.outcomes.append((entry, TokenAnswer(self._cache.epoch)))
            return
        if request.queries is not None:
            self.selections.append(entry)
        self._users.append((entry, layer))

    def _do_sequence(self, request: SequenceRequest) -> Answer:
        cache, tenant = self._cache, request.tenant
        match request:
            case GetSequence(sequence_id=sequence_id):
                sequence = cache.get_sequence(tenant, sequence_id)
                return SequenceState(cache.epoch, sequence.lengths, sequence.revisions)
            case OpenSequences(sequence_ids=sequence_ids, lease_seconds=lease_seconds):
                cache.open_sequences(tenant, dict(zip(sequence_ids, lease_seconds, strict=True)))
                return SequenceState(cache.epoch)
            case ForkSequence(parent_id=parent_id, child_id=child_id, length=length):
                child, copies = cache.fork_sequence(tenant, parent_id, child_id, length)
                self.copies += copies
                self.changed = True
                return SequenceState(cache.epoch, child.lengths, child.revisions)
            case TruncateSequence(sequence_id=sequence_id, length=length):
                sequence = cache.truncate_sequence(tenant, sequence_id, length)
                self.changed = True
                return SequenceState(cache.epoch, sequence.lengths, sequence.revisions)
            case CloseSequences(sequence_ids=sequence_ids):
                cache.close_sequences(tenant, sequence_ids)
                self.changed = True
                return SequenceState(cache.epoch)


def _waits(request: TokenRequest, error: BlockdexError) -> bool:
    """Whether a refused selection waits instead: for revisions, or, where it names none, for keys."""
    if request.keys is not None or request.queries is None or not request.queries.wait_for_keys:
        return False
    if error.reason == Reason.KEYS_NOT_APPENDED:
        # Revisions are checked first, so they are all there: a row that names none is what may yet come.
        return not request.spans.revisions.all()
    return error.reason == Reason.FUTURE_REVISION
