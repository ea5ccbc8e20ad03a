"""Weighted rendezvous hashing: which member a root goes to, the same in any language.

The key of a tenant, and of a member's name, is the first 8 bytes of the SHA-256 of its UTF-8, little-endian. With `mix`
the finalizer of SplitMix64, a root's hash at a member is `mix(mix(tenant ^ root) + member)`, modulo 2^64; its upper 53
bits plus a half, times 2^-53, are a number u in (0, 1), and the member's score is `weight / -ln(u)`. The highest score
owns the root; of two that are equal, that of the lower name. So a member that joins takes its share from each of the
others and nothing else moves, and one that leaves gives its own to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray


def owners(
    tenant: str, roots: Sequence[int] | NDArray[np.uint64], names: Sequence[str], weights: Sequence[float]
) -> NDArray[np.int64]:
    """Positions among the members of the owner of each root, `[R]`.

    Args:
        tenant: of the roots.
        roots: `[R]`, 64 bits.
        names: `[N]`, of the members.
        weights: `[N]`, not all 0; a member of weight 0 owns nothing.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    members = np.array([_key(names[at]) for at in order], np.uint64)
    scaled = np.array([weights[at] for at in order], np.float64)
    hashed = _mix(np.uint64(_key(tenant)) ^ np.asarray(roots, np.uint64))
    bits = _mix(hashed[:, None] + members[None, :]) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
    best: NDArray[np.int64] = np.argmax(scaled / -np.log(uniform), axis=1)
    return np.array(order)[best]


@lru_cache(maxsize=4096)
def _key(word: str) -> int:
    return int.from_bytes(sha256(word.encode()).digest()[:8], "little")


def _mix(number: NDArray[np.uint64]) -> NDArray[np.uint64]:
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))
