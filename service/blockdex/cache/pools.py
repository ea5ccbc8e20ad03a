"""What sizes a pool may have, and the tables of all pools together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blockdex.contract.errors import AlreadyExistsError, InvalidArgumentError, Reason, ResourceExhaustedError

MOST_ROWS = 1 << 16
"""Of all pools: each takes what a sequence does, some 2.5 KB on the host with 57 layers."""

MOST_CELLS = 1 << 26
"""Of all pools: each takes 4 bytes on the host and on the device, up to twice that with its row's rounding."""

Sizes = tuple[int, int, int]
"""num_pages, num_rows, max_blocks."""


def check_pool(pool_id: int, num_pages: int, num_rows: int, max_blocks: int, longest: int) -> None:
    """Refuses an id or sizes that no pool has (INVALID_POOL); `longest`: blocks of the longest sequence."""
    if not pool_id:
        raise InvalidArgumentError("pool_id must be at least 1, got 0", Reason.INVALID_POOL, pool_id=0)
    for name, size in (("num_pages", num_pages), ("num_rows", num_rows), ("max_blocks", max_blocks)):
        if size < 1:
            words = f"pool {pool_id}: {name} must be at least 1, got {size}"
            raise InvalidArgumentError(words, Reason.INVALID_POOL, pool_id=pool_id, **{name: size})
    if max_blocks > longest:
        words = f"pool {pool_id}: max_blocks must be at most {longest}, got {max_blocks}"
        raise InvalidArgumentError(words, Reason.INVALID_POOL, pool_id=pool_id, max_blocks=max_blocks)


def check_tables(
    pool_id: int, rows: NDArray[np.int32], blocks: NDArray[np.int32], more_rows: int, max_blocks: int
) -> None:
    """Refuses a pool that there is no room for beside those of so many rows, `[S]`, and blocks (OVERLOADED)."""
    for name, all_of_them, more, most in (
        ("rows", int(rows.sum()), more_rows, MOST_ROWS),
        ("cells", int(rows.astype(np.int64) @ blocks), more_rows * max_blocks, MOST_CELLS),
    ):
        if all_of_them + more > most:
            words = (
                f"pool {pool_id}: the tables of all pools may have {most} {name}, {all_of_them} + {more} are too many"
            )
            raise ResourceExhaustedError(words, Reason.OVERLOADED, pool_id=pool_id, **{name: more, "most": most})


def pool_exists(pool_id: int, there: Sizes, wanted: Sizes) -> AlreadyExistsError:
    """What is raised where a pool of the same id is there, of other sizes or in use."""
    words = "pool {}: there already, with {} pages, {} rows of {} blocks; wanted are {}, {} of {}, without cells set"
    return AlreadyExistsError(words.format(pool_id, *there, *wanted), Reason.POOL_EXISTS, pool_id=pool_id)
