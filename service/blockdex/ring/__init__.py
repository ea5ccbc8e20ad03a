"""The channel between frontend and engine."""

from __future__ import annotations

import importlib.util
import platform

SUPPORTED = (
    platform.system() == "Linux"
    and platform.machine() == "x86_64"
    and importlib.util.find_spec("blockdex._native") is not None
)
"""Whether this machine orders plain stores and loads as the ring needs it, and what is compiled for it is there."""
