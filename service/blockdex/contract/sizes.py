"""Bytes: how a size is written, and how many of a GPU's a cache takes."""

from __future__ import annotations

import re

FREE_SHARE = 0.9
"""Part of a GPU's free memory that a cache of `auto` bytes takes."""
WORKING_BYTES = 768 << 20
"""What it leaves at least: the scores of one launch (512 MiB), and 256 MiB for kernels, queries and answers."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([a-z]*)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def parse_size(value: object) -> int:
    """Bytes of a size: a plain number, or one with kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024).

    Raises:
        ValueError: the value is something else.
    """
    match = _SIZE.fullmatch(str(value).strip())
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"must be bytes, or a number with kB, MB, GB, TB, KiB, MiB, GiB or TiB, got {value!r}")
    return int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def automatic_cache_bytes(free: int) -> int:
    """Bytes of a cache of `auto` bytes on a GPU with so many free ones."""
    return max(min(int(free * FREE_SHARE), free - WORKING_BYTES), 0)
