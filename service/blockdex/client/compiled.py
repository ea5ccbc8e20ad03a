"""The compiled module, where this install has it: it does what is plainly right, and leaves all else to Python."""

from __future__ import annotations

from types import ModuleType

native: ModuleType | None
try:
    import blockdex._native as native
except ImportError:
    native = None
