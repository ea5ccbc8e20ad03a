"""What the chip can do at best, measured in the run whose figures are held against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from benchmarks.gpu_timing import Mode, time_calls

_READ_TILES = (8192, 16384, 32768)


@dataclass(frozen=True)
class Roofline:
    """Rates: bytes a second, floating-point operations a second.

    Attributes:
        copy: of a copy on the device, bytes read and bytes written both counted.
        read: of reading alone, by the fastest way tried.
        read_by: that way.
        bf16: of a square matrix product.
        fp8: of one in e4m3 with a bf16 result; None where torch has none on this device.
        copied_bytes: of the tensor that is copied.
        read_bytes: of the tensor that is read.
        product: its rows.
    """

    copy: float
    read: float
    read_by: str
    bf16: float
    fp8: float | None
    copied_bytes: int
    read_bytes: int
    product: int


def measure(device: torch.device, mode: Mode, replays: int, memory_bytes: int, product: int) -> Roofline:
    """The roofline of a device.

    Args:
        device: the device.
        mode: how calls are timed.
        replays: of each call.
        memory_bytes: of what is read and of what is copied; far above what caches hold.
        product: rows and columns of the matrices.
    """
    copy_us, read_us, read_by = _memory(device, mode, replays, memory_bytes)
    left, right = (torch.randn(product, product, dtype=torch.bfloat16, device=device) for _ in range(2))
    operations = 2 * product**3
    products: dict[str, list[Callable[[], object]]] = {"bf16": [lambda: left @ right] * 2}
    if device.type == "cuda" and (fp8_product := _fp8_product(left, right)):
        products["fp8"] = [fp8_product] * 2
    rates = {name: operations / timing.median_us * 1e6 for name, timing in time_calls(products, mode, replays).items()}
    return Roofline(
        copy=2 * memory_bytes / copy_us * 1e6,
        read=memory_bytes / read_us * 1e6,
        read_by=read_by,
        bf16=rates["bf16"],
        fp8=rates.get("fp8"),
        copied_bytes=memory_bytes,
        read_bytes=memory_bytes,
        product=product,
    )


def _memory(device: torch.device, mode: Mode, replays: int, memory_bytes: int) -> tuple[float, float, str]:
    """Microseconds of a copy and of a read, and how it was read."""
    source = torch.randn(memory_bytes // 4, device=device)
    target = torch.empty_like(source)
    calls: dict[str, list[Callable[[], object]]] = {
        "copy": [lambda: target.copy_(source)],
        "torch.sum": [source.sum],
    }
    if device.type == "cuda":
        calls |= {f"Triton, tiles of {tile}": [_triton_read(source, tile)] for tile in _READ_TILES}
    timings = {name: timing.median_us for name, timing in time_calls(calls, mode, replays).items()}
    copy_us = timings.pop("copy")
    read_by = min(timings, key=lambda name: timings[name])
    return copy_us, timings[read_by], read_by


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(source, sums, TILE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    tile = tl.program_id(0).to(tl.int64)
    values = tl.load(source + tile * TILE + tl.arange(0, TILE))
    tl.store(sums + tile, tl.sum(values, axis=0))


def _triton_read(source: torch.Tensor, tile: int) -> Callable[[], object]:
    """Reads all of a tensor but what is left behind its last whole tile, and sums it up by tiles."""
    tiles = source.numel() // tile
    sums = torch.empty(tiles, device=source.device)
    return lambda: _read_kernel[(tiles,)](source, sums, TILE=tile, num_warps=16)


def _fp8_product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], object] | None:
    """Their product in e4m3, added up as fast as the chip can; None where torch refuses it."""
    rows, columns = left.to(torch.float8_e4m3fn), right.T.contiguous().to(torch.float8_e4m3fn).T
    one = torch.ones((), device=left.device)

    def product() -> object:
        return torch._scaled_mm(rows, columns, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        product()
    except RuntimeError:
        return None
    return product
