"""What a chip can do, and the launch shapes that were found best on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """The shape of a launch.

    Attributes:
        programs: how many run at once on one multiprocessor.
        warps: of a program.
        stages: blocks of keys that a program has room for.
        tile: rows that a program scores against each block; 0 where that depends on the call.
    """

    programs: int
    warps: int
    stages: int
    tile: int = 0


@dataclass(frozen=True, slots=True)
class Chip:
    """How kernels are built and launched on a device.

    Attributes:
        name: for people.
        multiprocessors: how many there are.
        tma: whether tensors are read through descriptors by the copy engine.
        pdl: whether a kernel may be launched while the one before it ends.
        native_fp8: whether the tensor cores multiply e4m3.
        warpgroups: whether they are Hopper's, which four warps ask for a product together.
        prefill: scores of prefill from keys of two bytes.
        prefill_fp8: the same from e4m3 keys.
        decode: scores of decode from keys of two bytes.
        decode_fp8: the same from e4m3 keys.
        decode_fp8_wide: the same for runs of more than 32 rows (queries times heads), which take more shared memory.
    """

    name: str
    multiprocessors: int
    tma: bool
    pdl: bool
    native_fp8: bool
    warpgroups: bool
    prefill: Launch
    prefill_fp8: Launch
    decode: Launch
    decode_fp8: Launch
    decode_fp8_wide: Launch

    @classmethod
    def of(cls, device: torch.device) -> Chip:
        """The chip of a CUDA device; of the CPU, what Triton's interpreter can do.

        Raises:
            ValueError: the chip is older than Ampere.
        """
        if device.type == "cpu":
            few, tiles = Launch(1, 4, 1), Launch(1, 4, 1, tile=32)
            return cls("interpreter", 3, False, False, True, False, tiles, tiles, few, few, few)
        properties = torch.cuda.get_device_properties(device)
        if properties.major < 8:
            raise ValueError(f"device {device}: compute capability must be at least 8.0, got {properties.name}'s")
        return chip_of(properties.major * 10 + properties.minor, properties.multi_processor_count)


def chip_of(capability: int, multiprocessors: int) -> Chip:
    """The chip of a compute capability (90 for 9.0); launch shapes were measured on 9.0 only."""
    large = capability in {90, 100, 103}  # These have 227 KiB of shared memory for a program, the others 99 or 163.
    return Chip(
        name=f"sm_{capability}",
        multiprocessors=multiprocessors,
        tma=capability >= 90,
        pdl=capability >= 90,
        native_fp8=capability >= 89,
        warpgroups=capability == 90,
        # Rows share what is read of the keys, which bounds bf16: as many as registers hold. e4m3 is bounded by the
        # maxima, and two programs on a multiprocessor take them while the other multiplies; where accumulators are
        # registers, four warps have too few.
        prefill=Launch(1, 8, 3, tile=256) if large else Launch(1, 8, 2, tile=64 if capability >= 120 else 128),
        prefill_fp8=Launch(2, 4, 2, tile=128) if large else Launch(1, 8, 2, tile=128),
        decode=Launch(2, 4, 3) if large else Launch(1, 4, 2),
        decode_fp8=Launch(4, 4, 3) if large else Launch(2, 4, 2),
        decode_fp8_wide=Launch(2, 4, 6) if large else Launch(2, 4, 2),
    )
