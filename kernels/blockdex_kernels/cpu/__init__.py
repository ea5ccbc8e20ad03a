"""The CPU backend: torch for what is computed, numpy for what is counted."""

from blockdex_kernels.cpu.backend import TEMPORARY_BYTES, CpuBackend

__all__ = ["TEMPORARY_BYTES", "CpuBackend"]
