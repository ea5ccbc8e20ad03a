"""What an append will do once its request has been checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class AppendPlan:
    """An append of N rows, checked against the cache but not yet applied.

    Attributes:
        layer: where it appends.
        slots: intp `[N]`, the sequences.
        applies: bool `[N]`; False for a row that is done already, whose keys are not to be written.
        lengths: int64 `[N]`, the layer's lengths after it.
        revisions: uint64 `[N]`, the layer's revisions after it.
        held: int64 `[N]`, pages of each sequence after it.
        shared_writes: intp `[M, 2]`, slot and block of the pages it writes that others hold too when it is planned.
        victims: slots of the sequences that it evicts.
        all_apply: whether all rows do.
    """

    layer: int
    slots: NDArray[np.intp]
    applies: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    revisions: NDArray[np.uint64]
    held: NDArray[np.int64]
    shared_writes: NDArray[np.intp]
    victims: list[int]
    all_apply: bool
