"""Which device and which kernels an indexer gets, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from blockdex_kernels.cpu import CpuBackend
from blockdex_kernels.interface import Backend, Fp8Scoring, PrefillKernel
from blockdex_kernels.spec import IndexSpec

LEAST_CAPABILITY = (8, 0)
"""Compute capability that the GPU kernels need: Ampere's."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Where the pages of an indexer are to be.

    Attributes:
        device: the device, with its number where it is a GPU.
        reason: why, in one line.
    """

    device: torch.device
    reason: str


def choose_device(device: str, spec: IndexSpec) -> Choice:
    """Where the pages of an indexer go. Nothing is allocated yet.

    Args:
        device: `cpu`; `cuda` (the first GPU) or `cuda:N`; or `auto`, the first GPU that the kernels are made for, and
            the CPU where there is none.
        spec: the indexer.

    Raises:
        ValueError: the device is not there, or the kernels are made neither for it nor for the indexer.
    """
    if device == "cpu":
        return Choice(torch.device("cpu"), "asked for")
    if not re.fullmatch(r"auto|cuda(:\d+)?", device):
        raise ValueError(f"device: must be auto, cpu, cuda or cuda:N, got {device!r}")
    gpus = range(torch.cuda.device_count()) if device == "auto" else [int(device[5:] or 0)]
    obstacle = _obstacle(spec)
    if obstacle is None:
        obstacles = {gpu: _obstacle_of_gpu(gpu) for gpu in gpus}
        for gpu in gpus:
            if obstacles[gpu] is None:
                how = "found" if device == "auto" else "asked for"
                return Choice(torch.device("cuda", gpu), f"{how}: {_describe(gpu)}")
        obstacle = obstacles[gpus[0]]
    if device == "auto":
        return Choice(torch.device("cpu"), f"no GPU: {obstacle}")
    raise ValueError(f"device {device}: {obstacle}")


def _obstacle(spec: IndexSpec) -> str | None:
    """Why no GPU of this machine can have the pages."""
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        from blockdex_kernels.triton.limits import unfit  # noqa: PLC0415 - not every machine has Triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return unfit(spec)


def _obstacle_of_gpu(gpu: int) -> str | None:
    """Why this one cannot."""
    if gpu >= torch.cuda.device_count():
        return f"there are only {torch.cuda.device_count()}, counted from 0"
    if torch.cuda.get_device_capability(gpu) < LEAST_CAPABILITY:
        major, minor = LEAST_CAPABILITY
        return f"kernels are for compute capability {major}.{minor} and later, got {_describe(gpu)}"
    return None


def _describe(gpu: int) -> str:
    major, minor = torch.cuda.get_device_capability(gpu)
    return f"{torch.cuda.get_device_name(gpu)}, compute capability {major}.{minor}"


def device_name(device: torch.device) -> str:
    """Product name of a GPU; empty of a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def choose_backend(
    device: str | Choice,
    spec: IndexSpec,
    num_pages: int,
    *,
    fp8_scoring: Fp8Scoring = "native",
    prefill_kernel: PrefillKernel = "hopper",
) -> Backend:
    """The backend for a device, its pages allocated.

    Args:
        device: as for `choose_device`, or what that chose.
        spec: the indexer.
        num_pages: pages to allocate.
        fp8_scoring: how an fp8 cache is scored: `native` (queries scaled into the fp8 range and cast) or `upcast`
            (queries kept in bf16, keys upcast).
        prefill_kernel: `hopper` has prefills scored by the kernel that is made for Hopper, where chip and indexer are
            what it is for; `portable` by that of all chips.

    Raises:
        ValueError: `choose_device` refuses the device, or the pages are too few or too many.
    """
    choice = device if isinstance(device, Choice) else choose_device(device, spec)
    if choice.device.type == "cpu":
        return CpuBackend(spec, num_pages, reason=choice.reason, fp8_scoring=fp8_scoring)
    from blockdex_kernels.triton.gpu import GpuBackend  # noqa: PLC0415 - not every machine has Triton

    return GpuBackend(
        spec,
        num_pages,
        choice.device,
        reason=choice.reason,
        fp8_scoring=fp8_scoring,
        prefill_kernel=prefill_kernel,
    )
