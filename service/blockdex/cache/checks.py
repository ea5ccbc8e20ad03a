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


def check_no_gap(layer: int, spans: Spans, applies: NDArray[np.bool_], lengths: NDArray[np.int64]) -> None:
    """Refuses an append behind the layer's end, where it applies: OUT_OF_RANGE, APPEND_BEYOND_LENGTH."""
    beyond = (spans.starts > lengths) & applies
    if beyond.any():
        row = int(beyond.argmax())
        raise OutOfRangeError(
            f"sequence {spans.sequence_ids[row]}, layer {layer}: "
            f"append starts at {spans.starts[row]}, length is {lengths[row]}",
            Reason.APPEND_BEYOND_LENGTH,
        )


def check_appended(layer: int, spans: Spans, lengths: NDArray[np.int64]) -> None:
    """Refuses positions whose keys are not there: FAILED_PRECONDITION, KEYS_NOT_APPENDED."""
    ends = spans.starts + spans.lengths
    missing = ends > lengths
    if missing.any():
        row = int(missing.argmax())
        raise FailedPreconditionError(
            f"sequence {spans.sequence_ids[row]}, layer {layer}: "
            f"selection ends at {ends[row]}, length is {lengths[row]}",
            Reason.KEYS_NOT_APPENDED,
        )


def _wrong_revision(
    call: str, layer: int, spans: Spans, revisions: NDArray[np.uint64], row: int, reason: Reason
) -> AbortedError:
    return AbortedError(
        f"sequence {spans.sequence_ids[row]}, layer {layer}: "
        f"{call} has revision {spans.revisions[row]}, the layer is at {revisions[row]}",
        reason,
    )
