"""Block selection for block-sparse attention, served from a sidecar."""

from importlib.metadata import version

__version__ = version("blockdex")
