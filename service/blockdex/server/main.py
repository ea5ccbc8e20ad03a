"""`blockdex serve`: from the settings to the last answer, as one process or as several."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from blockdex.contract.messages import Info
from blockdex.contract.version import VERSION
from blockdex.faults import FaultsError, arm
from blockdex.frontend.http.readiness import Readiness
from blockdex.logs import configure_logging, log_event, set_level
from blockdex.server.addresses import Address
from blockdex.server.bootstrap import (
    FLUSH_SECONDS,
    StartError,
    answer_all,
    build_engine,
    check_exposure,
    check_tracing,
    claim,
    end_with_the_thread,
    gpu_uuid,
    spin_seconds,
    splits,
    start_tracing,
    warm_up,
)
from blockdex.server.config import ConfigError, ServeSettings
from blockdex.server.credential_files import CredentialFiles
from blockdex.server.http_process import HttpSide
from blockdex.server.public_socket import check_stale, public_socket
from blockdex.server.request_counts import OwnCounts
from blockdex.server.supervisor import Supervisor
from blockdex_kernels import IndexSpec, SpecError

if TYPE_CHECKING:
    from blockdex.ring.selector import RingSelector

logger = logging.getLogger(__name__)

Read = Callable[[], ServeSettings]
"""Reads the settings anew; raises `ConfigError` where they cannot be."""

_PACKAGES_OF_CHILDREN = ("torch", "grpc_health", "grpc_reflection")
_WRITE_SECONDS = 1.0
"""How long answers that are there may take to be written."""


def serve(settings: ServeSettings, read: Read) -> int:
    """Runs a server until SIGTERM or SIGINT; then finishes what is in flight. A second signal ends it at once.

    Args:
        settings: of the server.
        read: for SIGHUP.

    Returns:
        The exit status: 0 after a signal, 1 if its device or its engine failed, 2 if the server could not start.
    """
    configure_logging(settings.log_format, settings.log_level)
    # A terminal that is closed sends it too, also before there is a loop to handle it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        arm()
        spec = settings.index_spec()
        check_tracing(settings)
        split = splits(settings)
        check_exposure(settings)
        files = CredentialFiles(settings)
        # Claimed before torch is loaded: a port in use is told at once. gRPC itself would only say that it failed.
        if settings.unix_path is None:
            claim(settings.grpc_address).close()
        elif settings.unix_path.exists():
            check_stale(settings.unix_path, "grpc_address")
        with claim(settings.http_address) as http_socket:
            if split:
                return asyncio.run(_run_split(settings, read, http_socket, files))
            return _run_on_ring(settings, spec, read, http_socket, files)
    except (StartError, SpecError, FaultsError) as error:
        log_event(logger, logging.ERROR, "refused to start", reason=str(error))
        return 2


def _run_on_ring(
    settings: ServeSettings, spec: IndexSpec, read: Read, http_socket: socket.socket, files: CredentialFiles
) -> int:
    from blockdex.ring.selector import RingSelector  # noqa: PLC0415 - it is compiled, and a refusal to start is not

    selector = RingSelector()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        return runner.run(_run_single(settings, spec, read, http_socket, files, selector))


async def _run_single(
    settings: ServeSettings,
    spec: IndexSpec,
    read: Read,
    http_socket: socket.socket,
    files: CredentialFiles,
    selector: RingSelector,
) -> int:
    # What brings torch and gRPC is loaded here: a supervisor needs neither.
    from blockdex.frontend.grpc.server import start_rpc_server  # noqa: PLC0415
    from blockdex.ring.server import RingInbox  # noqa: PLC0415
    from blockdex.server.single_process import connected  # noqa: PLC0415

    threading.excepthook = end_with_the_thread
    with public_socket(settings) as public:
        inbox = RingInbox(spin_seconds(settings))
        engine = build_engine(settings, spec, lambda: os.kill(os.getpid(), signal.SIGTERM), inbox)
        told_to_stop = _listen_to_signals()
        _reload_on_hangup(settings, read, set_level, files)
        requests, readiness = OwnCounts(), Readiness()
        async with connected(engine, inbox, settings, public, requests, selector, files, told_to_stop) as channel:
            info = await channel.info()
            restarts = dict.fromkeys(("core", "frontend"), 0)
            processes = {"server": os.getpid()}
            http = await HttpSide.start(
                channel, requests, readiness, restarts, lambda: processes, gpu_uuid(info.device), http_socket, files
            )
            watching = asyncio.create_task(files.watch())
            try:
                if not await warm_up(engine, readiness.compiling, told_to_stop):
                    return 0
                engine.start()
                tracing = start_tracing(settings)
                try:
                    rpc = await start_rpc_server(
                        channel,
                        settings.grpc_address,
                        observer=requests,
                        slow_request_seconds=settings.slow_request_seconds,
                        min_ping_seconds=settings.min_ping_seconds,
                        tracing=tracing,
                        credentials=files.credentials,
                    )
                except OSError as error:
                    raise StartError(str(error)) from error
                files.tell(rpc.take_up)
                readiness.obstacle = ""
                _log_start(info, http, rpc.address, _http_address(settings, http_socket))
                await told_to_stop.wait()
                _log_stopping(settings)
                readiness.obstacle = "shutting down"
                engine.drain()
                await rpc.stop_being_ready()
                await asyncio.sleep(0.0 if engine.device_is_lost else settings.drain_seconds)
                channel.refuse_new()
                engine.expect_no_more()
                grace = settings.shutdown_grace_seconds
                await asyncio.gather(channel.drain(grace), answer_all(engine, grace))
                await rpc.stop(_WRITE_SECONDS)
                if tracing is not None:
                    await asyncio.to_thread(tracing.close, FLUSH_SECONDS)
            finally:
                watching.cancel()
                await http.stop()
    log_event(logger, logging.INFO, "stopped")
    if engine.device_is_lost:
        # Another thread may be in a call of its driver that does not end, and the interpreter would wait for it.
        os._exit(1)
    return 0


async def _run_split(settings: ServeSettings, read: Read, http_socket: socket.socket, files: CredentialFiles) -> int:
    for package in _PACKAGES_OF_CHILDREN:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    told_to_stop = _listen_to_signals()
    readiness = Readiness()
    supervisor = Supervisor(settings, readiness, files.credentials)
    _reload_on_hangup(settings, read, supervisor.set_log_level, files)
    files.tell(supervisor.set_credentials)
    watching = asyncio.create_task(files.watch())
    try:
        if await supervisor.start(told_to_stop):
            await _serve_with(supervisor, settings, readiness, told_to_stop, http_socket, files)
    finally:
        watching.cancel()
        await supervisor.close()
    log_event(logger, logging.INFO, "stopped")
    return 1 if supervisor.failure else 0


async def _serve_with(
    supervisor: Supervisor,
    settings: ServeSettings,
    readiness: Readiness,
    told_to_stop: asyncio.Event,
    http_socket: socket.socket,
    files: CredentialFiles,
) -> None:
    """Serves until it is told to stop, once the engine core can be asked what it is."""
    http = await HttpSide.start(
        supervisor.reports,
        supervisor.counts,
        readiness,
        supervisor.restarts,
        supervisor.processes,
        supervisor.gpu,
        http_socket,
        files,
    )
    try:
        if await supervisor.open(told_to_stop):
            info, http_address = await supervisor.reports.info(), _http_address(settings, http_socket)
            _log_start(info, http, supervisor.grpc_address, http_address, **supervisor.pids())
            await told_to_stop.wait()
            _log_stopping(settings)
        await supervisor.stop(settings.drain_seconds, settings.shutdown_grace_seconds)
    finally:
        await http.stop()


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


def _reload_on_hangup(
    settings: ServeSettings, read: Read, set_log_level: Callable[[str], None], files: CredentialFiles
) -> None:
    """Has SIGHUP read the settings anew, and do what can be done about them while the server runs."""

    def on_signal() -> None:
        try:
            new = read()
        except ConfigError as error:
            log_event(logger, logging.ERROR, "settings not read anew", reason=str(error))
            return
        set_log_level(new.log_level)
        files.read_anew()
        changed = [name for name, value in new if value != getattr(settings, name) and name != "log_level"]
        restart = ", ".join(changed)
        log_event(logger, logging.INFO, "settings read anew", log_level=new.log_level, need_a_restart=restart)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_signal)


def _http_address(settings: ServeSettings, http_socket: socket.socket) -> str:
    return str(Address.parse(settings.http_address).at_port_of(http_socket))


def _log_stopping(settings: ServeSettings) -> None:
    drain, grace = settings.drain_seconds, settings.shutdown_grace_seconds
    log_event(logger, logging.INFO, "stopping", drain_seconds=drain, grace_seconds=grace)


def _log_start(info: Info, http: HttpSide, grpc_address: str, http_address: str, **pids: str) -> None:
    sharing = {} if http.gpu_in_turns is None else {"gpu_processes_in_turns": http.gpu_in_turns}
    kernels = {f"{phase}_kernel": f"{kernel} ({reason})" for phase, (kernel, reason) in info.kernels.items()}
    log_event(
        logger,
        logging.INFO,
        "serving",
        grpc=grpc_address,
        http=http_address,
        version=VERSION,
        device=info.device,
        capacity_tokens=info.cache.capacity_tokens,
        capacity_bytes=info.cache.pages_total * info.cache.page_bytes,
        epoch=str(info.epoch),  # as /v1/info has it: 64 bits do not fit a JSON number
        **sharing,
        **pids,
        **kernels,
        **dataclasses.asdict(info.spec),
    )
