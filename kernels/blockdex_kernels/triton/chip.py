"""What a chip can do, and the launch shapes that were found best on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Chip:
    """How kernels are built and launched on a device.

    Attributes:
        name: for people.
        programs: multiprocessors.
        tma: whether tensors are read through descriptors by the copy engine.
        pdl: whether a kernel may be launched while the one before it ends.
        native_fp8: whether the tensor cores multiply e4m3.
        prefill_tile: rows of a prefill program's tile.
        prefill_warps: its warps.
        prefill_stages: blocks of keys it has in flight.
        decode_programs: programs of a decode launch on one multiprocessor; twice as many where keys have one byte.
        decode_stages: blocks of keys each has in flight.
    """

    name: str
    programs: int
    tma: bool
    pdl: bool
    native_fp8: bool
    prefill_tile: int
    prefill_warps: int
    prefill_stages: int
    decode_programs: int
    decode_stages: int

    @classmethod
    def of(cls, device: torch.device) -> Chip:
        """The chip of a CUDA device; of the CPU, what Triton's interpreter can do.

        Raises:
            ValueError: the chip is older than Ampere.
        """
        if device.type == "cpu":
            return cls("interpreter", 3, False, False, True, 32, 4, 1, 1, 1)
        properties = torch.cuda.get_device_properties(device)
        if properties.major < 8:
            raise ValueError(f"device {device}: compute capability must be at least 8.0, got {properties.name}'s")
        return chip_of(properties.major * 10 + properties.minor, properties.multi_processor_count)


def chip_of(capability: int, programs: int) -> Chip:
    """The chip of a compute capability (90 for 9.0) with so many multiprocessors."""
    large = capability in {90, 100, 103}  # These have 227 KiB of shared memory for a program, the others 99 or 163.
    return Chip(
        name=f"sm_{capability}",
        programs=programs,
        tma=capability >= 90,
        pdl=capability >= 90,
        native_fp8=capability >= 89,
        prefill_tile=256 if large else 128,
        prefill_warps=8,
        prefill_stages=3 if large else 2,
        decode_programs=2 if large else 1,
        decode_stages=3 if large else 2,
    )
