"""What a server needs before it serves, and what keeps it from starting."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from blockdex.contract.sizes import automatic_cache_bytes
from blockdex.logs import log_event, log_fault
from blockdex.ring import SUPPORTED
from blockdex.scheduler import THREAD
from blockdex.server.addresses import Address
from blockdex.server.config import ServeSettings
from blockdex_kernels import IndexSpec

if TYPE_CHECKING:
    from blockdex.frontend.grpc.tracing import Tracing
    from blockdex.ring.server import RingInbox
    from blockdex.scheduler.loop import Engine
    from blockdex_kernels.dispatch import Choice

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
"""How long the last spans may take to be sent."""

_TRACING_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc")
_WARM_UP_LINE_SECONDS = 5.0
_SPIN_SECONDS = 0.001
"""Longer than what an engine does between two layers, so that both are awake when the next one asks."""
_NO_RING = "a server needs Linux on x86-64, which orders plain stores, and the compiled module blockdex._native"
_AVAILABLE = re.compile(r"MemAvailable: +(\d+) kB")
_LOOK_SECONDS = 0.02
_CORES = 4
"""From so many on a server is several processes, which do not wait for each other's turn at the interpreter.

On two cores that was faster as well, but takes them from the engine that the server is beside."""


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


def check_exposure(settings: ServeSettings) -> None:
    """Refuses addresses that other machines reach where anybody could read along or call.

    Raises:
        StartError: one of them is not safe.
    """
    if settings.insecure:
        return
    knows_callers = settings.access_file is not None
    grpc_is_safe = settings.tls_cert is not None and (knows_callers or settings.tls_client_ca is not None)
    http_is_safe = settings.http_tls_cert is not None and knows_callers
    if settings.unix_path is None and not grpc_is_safe and Address.parse(settings.grpc_address).is_public:
        raise _exposed("grpc_address", settings.grpc_address, "tls_cert, tls_key and access_file or tls_client_ca")
    if not http_is_safe and Address.parse(settings.http_address).is_public:
        raise _exposed("http_address", settings.http_address, "http_tls_cert, http_tls_key and access_file")


def _exposed(setting: str, address: str, needed: str) -> StartError:
    return StartError(
        f"{setting}: {address} can be reached from other machines, which takes {needed}; or insecure, where something "
        "else keeps others out"
    )


def splits(settings: ServeSettings) -> bool:
    """Whether a server is to be several processes.

    Raises:
        StartError: it cannot be what the settings say, or cannot be here at all.
    """
    if not SUPPORTED:
        raise StartError(_NO_RING)
    if settings.frontends > 1 and settings.unix_path is not None:
        raise StartError(f"frontends: {settings.frontends} cannot share {settings.grpc_address}: one can, or a port")
    if settings.processes != "auto":
        if settings.frontends > 1 and settings.processes == "single":
            raise StartError(f"frontends: {settings.frontends} need --processes split")
        return settings.processes == "split"
    return settings.frontends > 1 or len(os.sched_getaffinity(0)) >= _CORES


def spin_seconds(settings: ServeSettings) -> float:
    """How long engine core and frontends look for work before they sleep; not at all where cores are few."""
    if settings.spin_seconds != "auto":
        return settings.spin_seconds
    processes = 2 + settings.frontends
    return _SPIN_SECONDS if len(os.sched_getaffinity(0)) >= processes else 0.0


def tell_seconds(settings: ServeSettings) -> float:
    """Frontends hear how requests that took longer spent their time: slow ones for the log, or all for spans."""
    return -1.0 if settings.otlp_endpoint else settings.slow_request_seconds


def set_weights(settings: ServeSettings) -> None:
    """Has this process share room and time by the weights of tenants; before any of them asks."""
    from blockdex._native import set_weight  # noqa: PLC0415 - not everywhere, which `splits` says in words

    for tenant, weight in settings.weights.items():
        set_weight(tenant, weight)


def check_tracing(settings: ServeSettings) -> None:
    """Looks for what tracing needs, and loads nothing.

    Raises:
        StartError: spans are to be made, and a package for it is missing.
    """
    if not settings.otlp_endpoint:
        return
    for package in _TRACING_PACKAGES:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise StartError(f"otlp_endpoint: package {package!r} is missing: pip install 'blockdex[server,tracing]'")


def start_tracing(settings: ServeSettings) -> Tracing | None:
    """What makes spans of requests; None where none are wanted."""
    if not settings.otlp_endpoint:
        return None
    from blockdex.frontend.grpc.tracing import Tracing  # noqa: PLC0415 - who traces nothing needs none of its packages

    return Tracing(settings.otlp_endpoint, settings.trace_ratio)


def build_engine(
    settings: ServeSettings, spec: IndexSpec, on_lost_device: Callable[[], None], inbox: RingInbox
) -> Engine:
    """The engine with its cache, not yet started; loads torch, which takes seconds.

    Args:
        settings: of the server.
        spec: the indexer.
        on_lost_device: as `Engine` takes it.
        inbox: where links come.

    Raises:
        StartError: the cache does not fit, or the device is not there.
    """
    if settings.cache_bytes == "auto" and settings.device == "cpu":
        raise StartError("cache_bytes: auto is for a GPU, got device cpu; name a size instead")
    if settings.cache_bytes != "auto":
        _check_room(settings.cache_bytes, spec)
    # Threads that wait for a kernel's others must not spin: on cores that have other work too, the engine beside this
    # server to begin with, they keep those they wait for from running. OpenMP reads it when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Memory that came in pieces of one size serves others, too: without it a quarter of a GiB lies idle.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    set_weights(settings)
    # What can be refused without torch has been.
    from blockdex.scheduler.loop import Engine  # noqa: PLC0415
    from blockdex_kernels.dispatch import choose_backend, choose_device  # noqa: PLC0415

    try:
        choice = choose_device(settings.device, spec)
    except (ValueError, RuntimeError) as error:
        raise StartError(str(error)) from error
    cache_bytes = settings.cache_bytes
    if cache_bytes == "auto":
        cache_bytes = _automatic_cache_bytes(choice)
        _check_room(cache_bytes, spec)
    try:
        backend = choose_backend(
            choice,
            spec,
            cache_bytes // spec.bytes_per_page,
            fp8_scoring=settings.fp8_scoring,
            prefill_kernel=settings.prefill_kernel,
        )
    except ValueError as error:
        raise StartError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        most = f"at most about {_bytes_to_be_had(choice)} can be had on device {choice.device}"
        raise StartError(f"cache_bytes: {most}, got {settings.cache_bytes}") from error
    return Engine(
        backend,
        limits=settings.limits,
        lease_seconds=settings.lease_seconds,
        max_lease_seconds=settings.max_lease_seconds,
        max_tenant_sequences=settings.max_tenant_sequences,
        decode_queries=1 + settings.num_speculative_tokens,
        prefill_slice_seconds=settings.prefill_slice_seconds,
        on_lost_device=on_lost_device,
        inbox=inbox,
        socket="" if settings.socket is None else str(settings.socket.absolute()),
    )


def _check_room(cache_bytes: int, spec: IndexSpec) -> None:
    if cache_bytes < spec.bytes_per_page:
        raise StartError(f"cache_bytes: one page takes {spec.bytes_per_page} bytes, got {cache_bytes}")


def _automatic_cache_bytes(choice: Choice) -> int:
    if choice.device.type == "cpu":
        raise StartError(f"cache_bytes: auto is for a GPU, got device cpu ({choice.reason}); name a size instead")
    return _bytes_to_be_had(choice)


def _bytes_to_be_had(choice: Choice) -> int:
    if choice.device.type == "cpu":
        return int(_AVAILABLE.findall(Path("/proc/meminfo").read_text("ascii"))[0]) * 1024
    import torch  # noqa: PLC0415 - as above

    free, _ = torch.cuda.mem_get_info(choice.device)
    return automatic_cache_bytes(free)


async def warm_up(engine: Engine, tell: Callable[[int, int], None], told_to_stop: asyncio.Event) -> bool:
    """Compiles what the kernels have left to compile; False where that was told to stop.

    Args:
        engine: whose kernels they are.
        tell: called with how many are done and how many there are.
        told_to_stop: ends it after the step that runs.

    Raises:
        StartError: a kernel cannot be compiled, or does not run.
    """
    steps = engine.warm_up()
    began = said = time.monotonic()
    done = total = 0
    while not told_to_stop.is_set():
        try:
            step = await asyncio.to_thread(next, steps, None)
        except Exception as error:  # Whatever a compiler raises: better now than in a request.
            raise StartError(f"kernels, step {done + 1}: {type(error).__name__}: {error}") from error
        if step is None:
            break
        done, total = step
        tell(done, total)
        if time.monotonic() - said > _WARM_UP_LINE_SECONDS:
            said = time.monotonic()
            log_event(logger, logging.INFO, "compiling kernels", done=done, total=total)
    if total:
        log_event(
            logger, logging.INFO, "kernels compiled", done=done, total=total, seconds=round(time.monotonic() - began, 1)
        )
    return not told_to_stop.is_set()


async def answer_all(engine: Engine, seconds: float) -> None:
    """Waits until an engine has answered what it has taken, but no longer than that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while await asyncio.wrap_future(engine.unanswered()):
                await asyncio.sleep(_LOOK_SECONDS)


def end_with_the_thread(fault: threading.ExceptHookArgs) -> None:
    """Ends the process with the engine's thread: a `threading.excepthook`.

    Without its loop an engine answers nobody, not even where a deadline has passed; a new process does.
    """
    if fault.thread is None or fault.thread.name != THREAD or fault.exc_value is None:
        threading.__excepthook__(fault)
        return
    log_fault(logger, "the engine's thread ended", fault.exc_value)
    os._exit(1)


def gpu_uuid(device: str) -> str | None:
    """Name by which the driver knows a device of torch; None for one that is no GPU."""
    if not device.startswith("cuda"):
        return None
    import torch  # noqa: PLC0415 - as above

    # NVML numbers the GPUs in another order than CUDA does; the UUID is the same for both.
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
