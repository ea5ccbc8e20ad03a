"""What a mutant is."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        name: what is wrong with it, in a few words.
        file: in `service/blockdex`.
        old: text that is there once.
        new: what stands there instead.
        tests: paths below `tests`, with `::name` where a few tests of a file do; one of them must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
