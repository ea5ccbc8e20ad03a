"""The engine: one loop that owns the cache and the kernels. Plain messages in, plain messages out."""
