"""What a server needs before it serves, and what keeps it from starting."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from blockdex.addresses import Address
from blockdex.config import ServeSettings
from blockdex.transport.ring import SUPPORTED
from blockdex_kernels import IndexSpec

if TYPE_CHECKING:
    from blockdex.engine.engine import Engine
    from blockdex.engine.entry import Inbox

_FREE_SHARE = 0.9
_CORES = 2
"""From so many on several processes are faster than one, in which gRPC and the engine wait for each other's turn."""


class StartError(Exception):
    """The server cannot start: one line that says why."""


def claim(address: str) -> socket.socket:
    """A socket that listens on an address and shares it with nobody.

    Raises:
        StartError: it cannot be had, for instance since the port is in use.
    """
    try:
        return Address.parse(address).listen()
    except OSError as error:
        raise StartError(str(error.strerror)) from error


def splits(settings: ServeSettings) -> bool:
    """Whether a server is to be several processes.

    Raises:
        StartError: it cannot be what the settings say.
    """
    if settings.processes == "split" and not SUPPORTED:
        raise StartError("processes: split needs Linux on x86-64, which orders plain stores; single goes everywhere")
    if settings.front_doors > 1 and not (settings.processes != "single" and SUPPORTED):
        raise StartError(f"front_doors: {settings.front_doors} need --processes split, on Linux and x86-64")
    if settings.processes == "auto":
        return SUPPORTED and (settings.front_doors > 1 or len(os.sched_getaffinity(0)) >= _CORES)
    return settings.processes == "split"


def build_engine(settings: ServeSettings, spec: IndexSpec, inbox: Inbox | None = None) -> Engine:
    """The engine with its cache, not yet started; loads torch, which takes seconds.

    Args:
        settings: of the server.
        spec: the indexer.
        inbox: where its entries come from; without one, from `Engine.submit`.

    Raises:
        StartError: the cache does not fit, or the device is not there.
    """
    cache_bytes = _cache_bytes(settings)
    num_pages = cache_bytes // spec.bytes_per_page
    if num_pages < 1:
        raise StartError(f"cache_bytes: one page takes {spec.bytes_per_page} bytes, got {cache_bytes}")
    # Threads that wait for a kernel's others must not spin: on cores that have other work too, the engine beside this
    # server to begin with, they keep those they wait for from running. OpenMP reads it when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What can be refused without torch has been.
    from blockdex.engine.engine import Engine  # noqa: PLC0415
    from blockdex_kernels.backend import choose_backend  # noqa: PLC0415

    try:
        backend = choose_backend(settings.device, spec, num_pages, fp8_scoring=settings.fp8_scoring)
    except ValueError as error:
        raise StartError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        raise StartError(f"cache_bytes: {cache_bytes} bytes cannot be had on device {settings.device}") from error
    return Engine(
        backend,
        limits=settings.limits,
        lease_seconds=settings.lease_seconds,
        decode_queries=1 + settings.num_speculative_tokens,
        prefill_slice_seconds=settings.prefill_slice_seconds,
        inbox=inbox,
    )


def _cache_bytes(settings: ServeSettings) -> int:
    if settings.cache_bytes != "auto":
        return settings.cache_bytes
    if not settings.device.startswith("cuda"):
        raise StartError(f"cache_bytes: auto needs --device cuda, got device {settings.device}; name a size instead")
    import torch  # noqa: PLC0415 - as above

    if not torch.cuda.is_available():
        raise StartError(f"device {settings.device}: there is no CUDA device")
    free, _ = torch.cuda.mem_get_info(settings.device)
    return int(free * _FREE_SHARE)


def gpu_uuid(device: str) -> str | None:
    """Name by which the driver knows a device of torch; None for one that is no GPU."""
    if not device.startswith("cuda"):
        return None
    import torch  # noqa: PLC0415 - as above

    # NVML numbers the GPUs in another order than CUDA does; the UUID is the same for both.
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
