"""The process behind `blockdex serve`: engine, gRPC and HTTP, from the settings to the last answer."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import time
from typing import TYPE_CHECKING

from blockdex import __version__
from blockdex.addresses import Address
from blockdex.config import ServeSettings, automatic_cache_bytes
from blockdex.logs import configure_logging, log_event
from blockdex.messages import Info
from blockdex.rpc.server import RpcServer, start_rpc_server
from blockdex.transport.channel import Channel
from blockdex.web.app import create_app
from blockdex.web.gpu import GpuCollector, open_gpu
from blockdex.web.history import History
from blockdex.web.live import LiveView
from blockdex.web.metrics import Metrics, RequestMetrics, ServerCollector
from blockdex.web.readiness import Readiness
from blockdex.web.server import HttpServer
from blockdex_kernels import IndexSpec, SpecError

if TYPE_CHECKING:
    from blockdex.engine.engine import Engine
    from blockdex_kernels.backend import Choice

logger = logging.getLogger(__name__)

_WRITE_SECONDS = 1.0
"""How long answers that are there may take to be written."""
_WARM_UP_LINE_SECONDS = 5.0


class StartError(Exception):
    """The server cannot start: one line that says why."""


def serve(settings: ServeSettings) -> int:
    """Runs a server until SIGTERM or SIGINT; then finishes what is in flight. A second signal ends it at once.

    Returns:
        The exit status: 0 after a signal, 1 if its device failed, 2 if the server could not start.
    """
    configure_logging(settings.log_format, settings.log_level)
    try:
        spec = settings.index_spec()
        # Claimed before torch is loaded: a port in use is told at once. gRPC itself would only say that it failed.
        _claim(settings.grpc_address).close()
        with _claim(settings.http_address) as http_socket:
            engine = _build_engine(settings, spec)
            asyncio.run(_run(settings, engine, http_socket))
            if engine.device_is_lost:
                return 1
    except (StartError, SpecError) as error:
        log_event(logger, logging.ERROR, "refused to start", reason=str(error))
        return 2
    return 0


def _claim(address: str) -> socket.socket:
    try:
        return Address.parse(address).listen()
    except OSError as error:
        raise StartError(str(error.strerror)) from error


def _build_engine(settings: ServeSettings, spec: IndexSpec) -> Engine:
    if settings.cache_bytes == "auto" and settings.device == "cpu":
        raise StartError("cache_bytes: auto is for a GPU, got device cpu; name a size instead")
    if settings.cache_bytes != "auto":
        _check_room(settings.cache_bytes, spec)
    # Threads that wait for a kernel's others must not spin: on cores that have other work too, the engine beside this
    # server to begin with, they keep those they wait for from running. OpenMP reads it when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch takes seconds to load: what can be refused without it has been.
    from blockdex.engine.engine import Engine  # noqa: PLC0415
    from blockdex_kernels.backend import choose_backend, choose_device  # noqa: PLC0415

    try:
        choice = choose_device(settings.device, spec)
        cache_bytes = settings.cache_bytes
        if cache_bytes == "auto":
            cache_bytes = _automatic_cache_bytes(choice)
            _check_room(cache_bytes, spec)
        backend = choose_backend(choice, spec, cache_bytes // spec.bytes_per_page, fp8_scoring=settings.fp8_scoring)
    except ValueError as error:
        raise StartError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        wanted = f"{settings.cache_bytes} bytes cannot be had on device {settings.device}"
        raise StartError(f"cache_bytes: {wanted}") from error
    return Engine(
        backend,
        limits=settings.limits,
        lease_seconds=settings.lease_seconds,
        decode_queries=1 + settings.num_speculative_tokens,
        prefill_slice_seconds=settings.prefill_slice_seconds,
        on_lost_device=lambda: os.kill(os.getpid(), signal.SIGTERM),
    )


def _check_room(cache_bytes: int, spec: IndexSpec) -> None:
    if cache_bytes < spec.bytes_per_page:
        raise StartError(f"cache_bytes: one page takes {spec.bytes_per_page} bytes, got {cache_bytes}")


def _automatic_cache_bytes(choice: Choice) -> int:
    if choice.device.type == "cpu":
        raise StartError(f"cache_bytes: auto is for a GPU, got device cpu ({choice.reason}); name a size instead")
    import torch  # noqa: PLC0415 - as above

    free, _ = torch.cuda.mem_get_info(choice.device)
    return automatic_cache_bytes(free)


async def _run(settings: ServeSettings, engine: Engine, http_socket: socket.socket) -> None:
    from blockdex.transport.local import LocalChannel  # noqa: PLC0415 - brings the engine, and with it torch

    told_to_stop = _listen_to_signals()
    requests, readiness = RequestMetrics(), Readiness()
    channel = LocalChannel(engine)
    channel.start()
    try:
        history = History(channel, requests)
        metrics = Metrics(ServerCollector(channel, requests, readiness), _gpu_of(channel.info().device))
        live = LiveView(channel, history, readiness)
        http = HttpServer(create_app(channel, metrics, live, readiness), http_socket)
        watching = asyncio.create_task(history.run())
        try:
            if not await _warm_up(engine, readiness, told_to_stop):
                return
            rpc = await _start_rpc(channel, settings, requests)
            readiness.obstacle = ""
            http_address = Address.parse(settings.http_address).at_port_of(http_socket)
            _log_start(channel.info(), rpc.address, str(http_address))
            await told_to_stop.wait()
            log_event(logger, logging.INFO, "stopping", grace_seconds=settings.shutdown_grace_seconds)
            readiness.obstacle = "shutting down"
            await rpc.stop_being_ready()
            await channel.drain(settings.shutdown_grace_seconds)
            await rpc.stop(_WRITE_SECONDS)
        finally:
            watching.cancel()
            await http.stop()
    finally:
        channel.stop()
    log_event(logger, logging.INFO, "stopped")


async def _warm_up(engine: Engine, readiness: Readiness, told_to_stop: asyncio.Event) -> bool:
    """Compiles what the kernels have left to compile; False where that was told to stop.

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
        readiness.obstacle = f"compiling kernels, {done} of {total}"
        if time.monotonic() - said > _WARM_UP_LINE_SECONDS:
            said = time.monotonic()
            log_event(logger, logging.INFO, "compiling kernels", done=done, total=total)
    if total:
        log_event(
            logger, logging.INFO, "kernels compiled", done=done, total=total, seconds=round(time.monotonic() - began, 1)
        )
    return not told_to_stop.is_set()


def _gpu_of(device: str) -> GpuCollector | None:
    if not device.startswith("cuda"):
        return None
    import torch  # noqa: PLC0415 - as above

    # NVML numbers the GPUs in another order than CUDA does; the UUID is the same for both.
    return open_gpu(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


async def _start_rpc(channel: Channel, settings: ServeSettings, requests: RequestMetrics) -> RpcServer:
    try:
        return await start_rpc_server(
            channel,
            settings.grpc_address,
            observe=requests.observe,
            slow_request_seconds=settings.slow_request_seconds,
        )
    except OSError as error:
        raise StartError(str(error)) from error


def _listen_to_signals() -> asyncio.Event:
    told = asyncio.Event()

    def on_signal() -> None:
        if told.is_set():
            log_event(logger, logging.WARNING, "told to stop twice: ends at once")
            os._exit(1)
        told.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return told


def _log_start(info: Info, grpc_address: str, http_address: str) -> None:
    kernels = {f"{phase}_kernel": f"{kernel} ({reason})" for phase, (kernel, reason) in info.kernels.items()}
    log_event(
        logger,
        logging.INFO,
        "serving",
        grpc=grpc_address,
        http=http_address,
        version=__version__,
        device=info.device,
        capacity_tokens=info.cache.capacity_tokens,
        capacity_bytes=info.cache.pages_total * info.cache.page_bytes,
        epoch=info.epoch,
        **kernels,
        **dataclasses.asdict(info.spec),
    )
