"""Which member holds a sequence, and how a batch is cut by members and its answers are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockdex.client.requests import Integers, integers
from blockdex.client.tensors import torch_of
from blockdex.cluster.views import View
from blockdex.contract.errors import BlockdexError, InvalidArgumentError, Reason, UnavailableError, error_of

_BY_SEQUENCE = ("lengths", "starts", "revisions", "lease_seconds")
_BY_TOKEN = ("keys", "queries")

Rows = list[int]
"""Positions of sequences in their batch."""


class Router:
    """What a client knows of where sequences are. Threads may share it: each change is one step of a dict.

    Args:
        tenant: of the sequences.
    """

    def __init__(self, tenant: str) -> None:
        self._tenant = tenant
        self._views: tuple[View, ...] = ()
        self._addresses: dict[str, str] = {}
        self._places: dict[int, str] = {}
        self._roots: dict[int, int] = {}

    def take_views(self, views: tuple[View, ...]) -> None:
        """The directory tells these."""
        self._views = views
        self._addresses = {member.name: member.address for member in views[0].members}

    def address(self, member: str) -> str:
        """Of a member of the newest view.

        Raises:
            UnavailableError: it has left the cluster (UNREACHABLE).
        """
        try:
            return self._addresses[member]
        except KeyError:
            raise UnavailableError(f"member {member}: is not in the cluster", Reason.UNREACHABLE) from None

    def roots(self, sequences: Sequence[int], root_ids: Integers | None) -> list[int]:
        """Of each sequence: as it is said, as it is known from a fork that was made here, or the sequence itself."""
        if root_ids is None:
            return [self._roots.get(sequence, sequence) for sequence in sequences]
        roots = integers("root_ids", root_ids, bits=64)
        if len(roots) == 1:
            return roots * len(sequences)
        if len(roots) != len(sequences):
            raise InvalidArgumentError(
                f"root_ids: one for each of {len(sequences)} sequences, got {len(roots)}", Reason.INVALID_SPANS
            )
        return roots

    def newest(self, root: int) -> str:
        """The member that a new root goes to."""
        return self._views[0].owner(self._tenant, root)

    def place_of_all(self, sequences: Sequence[int]) -> str | None:
        """The member that is known to hold all of these; None where none is."""
        places = set(map(self._places.get, sequences))
        (place,) = places if len(places) == 1 else (None,)
        return place if place in self._addresses else None

    def candidates(self, sequence: int, root: int) -> list[str]:
        """Members that may hold a sequence, the likeliest first; one that has left has lost what it held."""
        place = self._places.get(sequence)
        if place in self._addresses:
            return [str(place)]
        owners = dict.fromkeys(view.owner(self._tenant, root) for view in self._views)
        return [owner for owner in owners if owner in self._addresses]

    def place_new(self, sequence: int, root: int) -> None:
        """A sequence is about to be opened: where its root goes now, unless it has a place already."""
        place = self._places.get(sequence)
        self.found(sequence, str(place) if place in self._addresses else self.newest(root), root)

    def found(self, sequence: int, member: str, root: int) -> None:
        """A sequence is at a member."""
        self._places[sequence] = member
        if root != sequence:
            self._roots[sequence] = root

    def lost(self, sequences: Sequence[int], error: BlockdexError) -> None:
        """A member does not know one of these: they are looked for anew."""
        if error.reason == Reason.UNKNOWN_SEQUENCE:
            for sequence in sequences:
                self._places.pop(sequence, None)

    def forget(self, sequences: Sequence[int]) -> None:
        """Sequences are closed."""
        for sequence in sequences:
            self._places.pop(sequence, None)
            self._roots.pop(sequence, None)


@dataclass(frozen=True, slots=True)
class Batch:
    """A call on sequences, as `Client` takes its arguments.

    Attributes:
        sequences: `[N]`, their ids.
        roots: `[N]`.
        arguments: the others by name.
    """

    sequences: list[int]
    roots: list[int]
    arguments: Mapping[str, Any]

    def part(self, rows: Rows) -> dict[str, Any]:
        """The arguments of the call on some of the sequences."""
        if len(rows) == len(self.sequences):
            return {"sequences": self.sequences, **self.arguments}
        part = dict(self.arguments, sequences=[self.sequences[row] for row in rows])
        for name in _BY_SEQUENCE:
            value = part.get(name)
            if value is not None and np.ndim(value):
                part[name] = [self._column(name, value)[row] for row in rows]
        for name in _BY_TOKEN:
            if part.get(name) is not None:
                part[name] = _rows_of(part[name], self.tokens(rows))
        return part

    def tokens(self, rows: Rows) -> NDArray[np.int64]:
        """Positions of some sequences' tokens among those of the batch."""
        lengths = self.arguments.get("lengths")
        if lengths is None:
            raise InvalidArgumentError("lengths: may be left out for a single sequence only", Reason.INVALID_SPANS)
        column = self._column("lengths", lengths)
        ends = np.cumsum(column)
        return np.concatenate([np.arange(ends[row] - column[row], ends[row]) for row in rows])

    def together(self, answers: Sequence[tuple[Rows, Any]]) -> Any:
        """The members' answers as one: nothing, block ids, or a pair of these and scores."""
        first = answers[0][1]
        if first is None or len(answers) == 1:
            return first
        tokens = [self.tokens(rows) for rows, _ in answers]
        if isinstance(first, tuple):
            columns = zip(*(answer for _, answer in answers), strict=True)
            return tuple(_scattered(tokens, column) for column in columns)
        return _scattered(tokens, [answer for _, answer in answers])

    def _column(self, name: str, value: Any) -> list[int]:
        column = integers(name, value, bits=64)
        if len(column) != len(self.sequences):
            raise InvalidArgumentError(
                f"{name}: one for each of {len(self.sequences)} sequences, got {len(column)}", Reason.INVALID_SPANS
            )
        return column


def failure_of(
    batch: Batch, failures: Sequence[tuple[str, Rows, BlockdexError]], done: Sequence[tuple[Rows, Any]]
) -> BlockdexError:
    """The first failure of a call, with its member, the sequences that failed and those whose part took effect."""
    member, _, error = failures[0]
    failed = sorted(row for _, rows, _ in failures for row in rows)
    answered = sorted(row for rows, _ in done for row in rows)
    numbers = {
        **error.metadata,
        "member": member,
        "failed": ",".join(str(batch.sequences[row]) for row in failed),
        "done": ",".join(str(batch.sequences[row]) for row in answered),
    }
    return error_of(error.code, f"member {member}: {error.message}", error.reason, numbers)


def _rows_of(tensor: Any, rows: NDArray[np.int64]) -> Any:
    torch = None if isinstance(tensor, np.ndarray) else torch_of(tensor)
    if torch is None:
        return tensor[rows]
    index = torch.from_numpy(rows).to(tensor.device)
    if tensor.element_size() == 1:
        return tensor.view(torch.uint8)[index].view(tensor.dtype)
    return tensor[index]


def _scattered(tokens: Sequence[NDArray[np.int64]], parts: Sequence[Any]) -> Any:
    first = parts[0]
    shape = (sum(map(len, tokens)), *first.shape[1:])
    torch = None if isinstance(first, np.ndarray) else torch_of(first)
    whole = np.empty(shape, first.dtype) if torch is None else first.new_empty(shape)
    for rows, part in zip(tokens, parts, strict=True):
        whole[rows if torch is None else torch.from_numpy(rows).to(first.device)] = part
    return whole
