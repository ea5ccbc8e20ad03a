"""Faults of the core: admission, the loop, steps, the index of sequences."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = ()
