"""The channel between frontend and engine."""

from __future__ import annotations

import importlib.util
import sys

SUPPORTED = sys.platform == "linux" and importlib.util.find_spec("blockdex._native") is not None
"""Whether this is Linux, and the compiled module is there."""
