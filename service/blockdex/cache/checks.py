"""Checks of a request's rows against what its layer holds; the first row that fails is named.

`lengths` and `revisions` are the layer's, int64 and uint64 `[N]`, row by row of the spans.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blockdex.contract.errors import AbortedError, FailedPreconditionError, OutOfRangeError, Reason
from blockdex.contract.messages import Spans


def check_not_stale(call: str, layer: int, spans: Spans, revisions: NDArray[np.uint64]) -> None:
    """Refuses a revision below the layer's: ABORTED, STALE_REVISION."""
    stale = (spans.revisions < revisions) & (spans.revisions != 0)
    if stale.any():
        raise _wrong_revision(call, layer, spans, revisions, int(stale.argmax()), Reason.STALE_REVISION)


def check_not_future(call: str, layer: int, spans: Spans, revisions: NDArray[np.uint64]) -> None:
    """Refuses a revision above the layer's: ABORTED, FUTURE_REVISION."""
    future = spans.revisions > revisions
    if future.any():
        raise _wrong_revision(call, layer, spans, revisions, int(future.argmax()), Reason.FUTURE_REVISION)


def check_done(layer: int, spans: Spans, done: NDArray[np.bool_], lengths: NDArray[np.int64]) -> None:
    """Refuses an append at the layer's own revision that is not the one that made it: ABORTED, STALE_REVISION."""
    ends = spans.starts + spans.lengths
    another = (ends != lengths) & done
    if another.any():
        row = int(another.argmax())
        raise AbortedError(
            f"{_where(layer, spans, row)}: append ends at {ends[row]}, "
            f"length at its revision {spans.revisions[row]} is {lengths[row]}",
            Reason.STALE_REVISION,
            **_numbers(layer, spans, row, lengths),
            revision=spans.revisions[row],
        )


def check_starts(
    layer: int, spans: Spans, applies: NDArray[np.bool_], lengths: NDArray[np.int64], *, rollback: bool
) -> None:
    """Refuses an append that leaves a gap, or cuts its layer without a word, where it applies.

    OUT_OF_RANGE, APPEND_BEYOND_LENGTH or APPEND_OVERLAPS.
    """
    wrong = (spans.starts > lengths) & applies
    if not rollback:
        wrong |= (spans.starts < lengths) & (spans.revisions == 0)
    if wrong.any():
        row = int(wrong.argmax())
        overlaps = spans.starts[row] < lengths[row]
        raise OutOfRangeError(
            f"{_where(layer, spans, row)}: append starts at {spans.starts[row]}, length is {lengths[row]}"
            + ("; to roll back takes a revision or rollback" if overlaps else ""),
            Reason.APPEND_OVERLAPS if overlaps else Reason.APPEND_BEYOND_LENGTH,
            **_numbers(layer, spans, row, lengths),
        )


def check_appended(layer: int, spans: Spans, lengths: NDArray[np.int64]) -> None:
    """Refuses positions whose keys are not there: FAILED_PRECONDITION, KEYS_NOT_APPENDED."""
    ends = spans.starts + spans.lengths
    missing = ends > lengths
    if missing.any():
        row = int(missing.argmax())
        raise FailedPreconditionError(
            f"{_where(layer, spans, row)}: selection ends at {ends[row]}, length is {lengths[row]}",
            Reason.KEYS_NOT_APPENDED,
            **_numbers(layer, spans, row, lengths),
        )


def _wrong_revision(
    call: str, layer: int, spans: Spans, revisions: NDArray[np.uint64], row: int, reason: Reason
) -> AbortedError:
    return AbortedError(
        f"{_where(layer, spans, row)}: {call} has revision {spans.revisions[row]}, the layer is at {revisions[row]}",
        reason,
        sequence_id=spans.sequence_ids[row],
        layer=layer,
        revision=spans.revisions[row],
        layer_revision=revisions[row],
    )


def _where(layer: int, spans: Spans, row: int) -> str:
    return f"sequence {spans.sequence_ids[row]}, layer {layer}"


def _numbers(layer: int, spans: Spans, row: int, lengths: NDArray[np.int64]) -> dict[str, object]:
    """Of a row that does not go with how long its layer is."""
    return {
        "sequence_id": spans.sequence_ids[row],
        "layer": layer,
        "start": spans.starts[row],
        "length": spans.lengths[row],
        "layer_length": lengths[row],
    }
