"""Each process of a server, ended at once: what the others do, what callers hear, and that nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import blockdex
from blockdex import FailedPreconditionError, NotFoundError, Reason, UnavailableError
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc
from support.processes import SECONDS, Split, command_of, eventually, kill, split
from support.serving import STOP_SECONDS, environment
from support.wire import append, close_request, keys_of, open_request, queries_of, refusal_of, select

CLIENTS = 12
STREAM = (("blockdex-tenant", "supervision"),)


def left_over(pids: list[int]) -> list[str]:
    """Processes of a server that still are there."""
    return [f"{pid}: {command}" for pid in pids if "blockdex" in (command := command_of(pid))]


@pytest.fixture(scope="module")
def server() -> Iterator[Split]:
    """One server, whose children die in these tests, and whose supervisor is told to stop after them."""
    with split("--frontends", "2", "--spin-seconds", "0.001") as running:
        yield running
        pids = [running.core, *running.frontends, running.supervisor]
    assert left_over(pids) == []


@pytest.fixture
def stubs(server: Split) -> Iterator[list[pb_grpc.IndexerServiceStub]]:
    """Clients with a connection each, so that they are at different frontends."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(server.serving.grpc_address, options=own) for _ in range(CLIENTS)]
    yield [pb_grpc.IndexerServiceStub(channel) for channel in channels]
    for channel in channels:
        channel.close()


def is_serving(server: Split) -> bool:
    """What grpc.health.v1 says."""
    with grpc.insecure_channel(server.serving.grpc_address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def whole(server: Split) -> bool:
    """Whether all processes are there and serve."""
    return server.ready() == "ready" and len(server.frontends) == 2 and is_serving(server)


def held_by(process: Path) -> set[Path]:
    """The files that a process has mapped or open, as far as it is there."""
    held: set[Path] = set()
    with contextlib.suppress(OSError):
        held.update(Path(line.split(maxsplit=5)[-1]) for line in libraries_of(int(process.name)).splitlines())
        for file in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                held.add(file.readlink())
    return held


def left_in_memory(before: set[Path]) -> set[Path]:
    """New files of shared memory that no process holds; what another run beside this one has there, it does hold."""
    new = set(Path("/dev/shm").iterdir()) - before
    return new.difference(*map(held_by, Path("/proc").glob("[0-9]*"))) if new else new


def libraries_of(pid: int) -> str:
    """The files that a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text("utf-8")


def test_each_process_loads_what_is_its_own(server: Split) -> None:
    assert "torch" in libraries_of(server.core)
    assert "grpc" not in libraries_of(server.core)
    for other in (*server.frontends, server.supervisor):
        assert "torch" not in libraries_of(other)
    assert all("grpc" in libraries_of(frontend) for frontend in server.frontends)
    said = server.serving.event("serving")
    assert said["core_pid"] == str(server.core)
    assert said["frontend_pids"].split() == [str(frontend) for frontend in server.frontends]


def test_all_frontends_count_as_one(server: Split, stubs: list[pb_grpc.IndexerServiceStub]) -> None:
    before = server.metric("blockdex_requests_total", rpc="GetInfo", code="OK")
    epochs = {stub.GetInfo(pb.GetInfoRequest(), timeout=10).epoch for stub in stubs}
    assert len(epochs) == 1, "one engine behind them all"
    assert server.metric("blockdex_requests_total", rpc="GetInfo", code="OK") == before + CLIENTS
    assert server.metric("blockdex_request_duration_seconds_count", rpc="GetInfo") == before + CLIENTS


@pytest.mark.parametrize("frontends", ["1", "2"])
def test_the_port_is_shared_with_no_other_server(server: Split, frontends: str) -> None:
    address = server.serving.grpc_address
    flags = ["--grpc-address", address, "--http-address", "127.0.0.1:0", "--frontends", frontends]
    command = [sys.executable, "-m", "blockdex", "serve", *flags]
    other = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert other.returncode == 2
    assert f"cannot listen on {address}: Address already in use" in other.stderr


def test_a_frontend_ends_and_the_others_go_on(server: Split, stubs: list[pb_grpc.IndexerServiceStub]) -> None:
    with blockdex.Client(server.serving.grpc_address, tenant="frontends") as client:
        client.open_sequence(1)
        client.append_keys(0, sequences=1, keys=np.ones((300, 128), np.float32))
    waits = select(1, [(2, 0, 1)], np.ones((1, 4, 128), np.float32), wait_for_keys=True)
    stubs[0].OpenSequences(open_request(2), metadata=STREAM)
    waiting = [stub.SelectBlocks.future(waits, timeout=60, metadata=STREAM) for stub in stubs]
    eventually(lambda: server.metric("blockdex_waiting_requests") == CLIENTS, "all wait")
    counted = server.metric("blockdex_requests_total", rpc="GetInfo", code="OK")
    first, second = server.frontends

    kill(first)
    eventually(lambda: any(one.done() for one in waiting), "some hear of it")

    def given_up() -> bool:
        return bool(server.metric("blockdex_waiting_requests") == CLIENTS - sum(one.done() for one in waiting))

    eventually(given_up, "they are given up")
    lost = [one for one in waiting if one.done()]
    assert {one.code() for one in lost} == {grpc.StatusCode.UNAVAILABLE}
    with blockdex.Client(server.serving.grpc_address, tenant="frontends") as client:
        assert client.get_sequence(1).lengths == (300, 0, 0), "no sequence went with it"
        client.close_sequence(1)
    stubs[0].AppendKeys(append(1, [(2, 0, 1)], np.ones((1, 128), np.float32)), timeout=20, metadata=STREAM)
    for one in waiting:
        if one not in lost:
            assert one.result(timeout=20).block_ids.data
    assert len(lost) < CLIENTS, "the connections were shared out"
    eventually(lambda: whole(server), "it is started again")
    assert second in server.frontends and first not in server.frontends
    assert server.metric("blockdex_restarts_total", process="frontend") == 1
    assert server.metric("blockdex_restarts_total", process="core") == 0
    assert server.metric("blockdex_requests_total", rpc="GetInfo", code="OK") >= counted, "counters do not go back"
    stubs[0].CloseSequences(close_request(2), timeout=20, metadata=STREAM)


def test_the_engine_core_ends_and_comes_back_empty(server: Split, random: np.random.Generator) -> None:
    address, http = server.serving.grpc_address, f"http://{server.serving.http_address}"
    with blockdex.Client(address, tenant="core") as client, grpc.insecure_channel(address) as channel:
        client.open_sequence(1)
        client.append_keys(0, sequences=1, keys=keys_of(random, 200))
        epoch = client.info().epoch
        stub = pb_grpc.IndexerServiceStub(channel)
        metadata = (("blockdex-tenant", "core"),)
        waits = select(1, [(1, 0, 1)], queries_of(random, 1), wait_for_keys=True)
        waiting = stub.SelectBlocks.future(waits, timeout=60, metadata=metadata)
        eventually(lambda: server.metric("blockdex_waiting_requests") == 1, "it waits")
        over = threading.Event()
        silent = stub.Stream(iter(over.wait, True), timeout=60, metadata=metadata)
        frontends = server.frontends
        assert httpx.get(f"{http}/v1/live").json()["obstacle"] == ""

        kill(server.core)
        began = time.monotonic()
        refused = refusal_of(waiting.exception(timeout=20))
        assert time.monotonic() - began < 2, "at once"
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "UNREACHABLE")
        assert refused.message == "engine: it is gone and starts anew, without any sequence"
        answer = httpx.get(f"{http}/readyz")
        assert (answer.status_code, answer.text) == (503, "the engine core starts anew\n")
        assert httpx.get(f"{http}/healthz").status_code == 200
        assert not is_serving(server)
        with pytest.raises(UnavailableError, match="engine: it is gone"):
            client.get_sequence(1, timeout=0.5)
        with pytest.raises(UnavailableError, match="engine: it is gone"):
            blockdex.Client(address).info(timeout=0.5)
        assert httpx.get(f"{http}/v1/info").status_code == 503
        assert server.metric("blockdex_ready") == 0
        assert httpx.get(f"{http}/v1/live").json()["obstacle"] == "the engine core starts anew"

        eventually(lambda: whole(server), "it is started again")
        assert server.frontends == frontends, "they stay"
        assert server.metric("blockdex_restarts_total", process="core") == 1
        gone = refusal_of(_error(lambda: stub.GetSequence(pb.GetSequenceRequest(sequence_id=1), metadata=metadata)))
        assert (gone.code, gone.reason) == ("NOT_FOUND", "UNKNOWN_SEQUENCE")
        with pytest.raises(FailedPreconditionError) as stale:
            client.append_keys(0, sequences=1, keys=keys_of(random, 1))
        assert stale.value.reason == Reason.EPOCH_MISMATCH
        assert client.info().epoch != epoch
        assert next(silent) == pb.StreamResponse(event=pb.Event(new_epoch=pb.NewEpoch(epoch=client.info().epoch)))
        over.set()
        live = str(client.info().epoch)
        eventually(lambda: httpx.get(f"{http}/v1/live").json()["epoch"] == live, "the page shows it")
        with pytest.raises(NotFoundError):
            client.get_sequence(1)
        client.open_sequence(1)
        client.append_keys(0, sequences=1, keys=keys_of(random, 200))
        client.select_blocks(0, sequences=1, lengths=[1], queries=queries_of(random, 1))
        client.close_sequence(1)


def _error(call: object) -> grpc.RpcError:
    assert callable(call)
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def test_children_do_not_hear_the_signals_that_stop_a_server(server: Split) -> None:
    """A terminal and a service manager send them to all processes at once; the supervisor needs the others then."""
    children = [server.core, *server.frontends]
    for child in children:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(child, number)
    time.sleep(0.3)
    assert [server.core, *server.frontends] == children
    assert whole(server)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_though_the_engine_core_hangs(number: signal.Signals, tmp_path: Path) -> None:
    shared = set(Path("/dev/shm").iterdir())
    with split("--frontends", "2", "--shutdown-grace-seconds", "1", TMPDIR=str(tmp_path)) as server:
        pids = [server.core, *server.frontends, server.supervisor]
        address = server.serving.http_address
        os.kill(server.core, signal.SIGSTOP)
        os.kill(server.supervisor, number)
        server.serving.process.wait(STOP_SECONDS)
        eventually(lambda: not left_over(pids), "all have ended", SECONDS)
        assert server.serving.wait() == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    eventually(lambda: not left_in_memory(shared), "no shared memory is left", SECONDS)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{address}/healthz")


def test_a_second_signal_ends_all_at_once() -> None:
    with split("--shutdown-grace-seconds", "60") as server, blockdex.Client(server.serving.grpc_address) as client:
        pids = [server.core, *server.frontends]
        client.open_sequence(1)
        with grpc.insecure_channel(server.serving.grpc_address) as channel:
            waits = select(1, [(1, 0, 1)], np.ones((1, 4, 128), np.float32), wait_for_keys=True)
            waiting = pb_grpc.IndexerServiceStub(channel).SelectBlocks.future(waits, timeout=60)
            eventually(lambda: server.metric("blockdex_waiting_requests") == 1, "it waits")
            os.kill(server.core, signal.SIGSTOP)
            server.serving.process.send_signal(signal.SIGINT)
            eventually(lambda: server.ready() == "shutting down", "it stops")
            server.serving.process.send_signal(signal.SIGTERM)
            assert server.serving.wait() == 1
            eventually(lambda: not left_over(pids), "all have ended", SECONDS)
            assert waiting.exception(timeout=10) is not None
