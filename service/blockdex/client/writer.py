"""Requests of the data calls as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from blockdex.client import compiled
from blockdex.client.answers import Info
from blockdex.client.kinds import Kind
from blockdex.client.requests import DTYPES, Named, Queries, Shape, Spans, fill, order_of
from blockdex.client.tensors import NUMPY_DTYPES, elements_of
from blockdex.contract.errors import InvalidArgumentError

_NO_QUERIES = Queries(None, 0, 0, "ascending", False)


class Writer:
    """Writes the requests that one server takes, and refuses the others.

    What is plainly right is written by the compiled module, where that is there. Whatever else comes is checked and
    written by `fill`, so that errors have one place.

    Args:
        info: what the server is.
    """

    def __init__(self, info: Info) -> None:
        self._info = info
        self._topk = info.spec.topk
        self._native = None if compiled.native is None else _native_writer(compiled.native, info)

    def write(
        self, kind: Kind, spans: Spans, starts: list[int], keys: Any | None, queries: Queries | None
    ) -> tuple[bytes, Shape]:
        """A request, and the shape of its answer.

        Args:
            kind: which call it is.
            spans: the runs.
            starts: `[N]`, where they start.
            keys: `[T, D]` where it takes any, else None.
            queries: `[T, num_heads, D]`, likewise.

        Raises:
            BlockdexError: a field is out of bounds.
        """
        if self._native is not None:
            written = self._write_quickly(kind, spans, starts, keys, queries or _NO_QUERIES)
            if written is not None:
                return written
        request = kind.request()
        shape = fill(request, self._info, spans, starts, keys, queries)
        return request.SerializeToString(), shape

    def prepare_append(self, kind: Kind, named: Named, keys: Any, queries: Queries | None) -> tuple[Any, ...] | None:
        """What `append` takes of a request that appends, its tensors on the host; None without the compiled module.

        Args:
            kind: which call it is.
            named: the runs.
            keys: `[T, D]`.
            queries: `[T, num_heads, D]`, or None where it takes none.
        """
        return None if self._native is None else self._arguments(kind, named, keys, queries or _NO_QUERIES)

    def append(self, prepared: tuple[Any, ...], books: dict[int, Any]) -> tuple[bytes, Shape, list[Any]] | None:
        """A request, the shape of its answer, and what it changes in the client's books, all in one.

        Args:
            prepared: by `prepare_append`; starts left out are found in the books.
            books: sequences by id, compiled ones; whoever has them sees to it that nobody else changes them meanwhile.

        Returns:
            None, and nothing has changed, where anything is wrong with it or unusual.
        """
        assert self._native is not None
        begun = self._native.append(books, *prepared)
        if begun is None:
            return None
        (message, tokens, num_heads), changes = begun
        return message, (tokens, num_heads, self._topk), changes

    def _write_quickly(
        self, kind: Kind, spans: Spans, starts: list[int], keys: Any | None, queries: Queries
    ) -> tuple[bytes, Shape] | None:
        assert self._native is not None
        named = (spans.layer, spans.sequences, spans.lengths, starts, spans.revisions, spans.epoch)
        written = self._native.write(*self._arguments(kind, named, keys, queries))
        if written is None:
            return None
        message, tokens, num_heads = written
        return message, (tokens, num_heads, self._topk)

    def _arguments(self, kind: Kind, named: Named, keys: Any | None, queries: Queries) -> tuple[Any, ...]:
        layer, sequences, lengths, starts, revisions, epoch = named
        tensor = queries.tensor
        return (
            kind.number,
            layer,
            self._info.epoch if epoch is None else epoch,
            sequences,
            starts,
            lengths,
            revisions,
            keys if type(keys) is np.ndarray else _host(keys),
            tensor if type(tensor) is np.ndarray else _host(tensor),
            queries.first_head,
            queries.num_heads,
            order_of(queries),
            queries.return_scores,
            queries.wait_for_keys,
        )


def _native_writer(native: Any, info: Info) -> Any:
    spec, limits = info.spec, info.limits
    return native.Writer(
        num_layers=spec.num_layers,
        num_heads=spec.num_index_heads,
        head_dim=spec.head_dim,
        max_sequence_tokens=spec.max_sequence_tokens,
        max_spans=limits.max_spans,
        max_message_bytes=limits.max_message_bytes,
        array=np.ndarray,
        dtypes={dtype: int(DTYPES[name]) for dtype, name in NUMPY_DTYPES.items()},
    )


def _host(tensor: Any) -> Any:
    """The tensor as numpy's, or as it is where it cannot be: `fill` has the words for that."""
    if tensor is None or isinstance(tensor, np.ndarray):
        return tensor
    try:
        return elements_of("", tensor)[1]
    except (InvalidArgumentError, TypeError):
        return tensor
