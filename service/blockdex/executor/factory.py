"""Which executor a backend gets."""

from __future__ import annotations

from blockdex.executor.cpu import CpuExecutor
from blockdex.executor.interface import Executor
from blockdex_kernels.interface import Backend


def make_executor(backend: Backend, table_row: int) -> Executor:
    """The executor for a backend's device.

    Args:
        backend: the kernels and their pages.
        table_row: cells of a row of the page tables.
    """
    if backend.device.type == "cpu":
        return CpuExecutor(backend, table_row)
    from blockdex.executor.gpu import GpuExecutor  # noqa: PLC0415
    from blockdex_kernels.triton.backend import TritonBackend  # noqa: PLC0415 - not every machine has Triton

    assert isinstance(backend, TritonBackend)
    return GpuExecutor(backend, table_row)
