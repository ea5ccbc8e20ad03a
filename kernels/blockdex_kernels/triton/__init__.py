"""The GPU backend: Triton kernels from Ampere to Blackwell, which its interpreter runs on the CPU too."""

from blockdex_kernels.triton.backend import SCORE_BYTES, TritonBackend

__all__ = ["SCORE_BYTES", "TritonBackend"]
