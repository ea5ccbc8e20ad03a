"""The engine: one loop that owns the cache and the kernels. Plain messages in, plain messages out."""

THREAD = "blockdex-engine"
"""Name of the thread that its loop runs on."""
