"""Signals to a server of one process and of several: SIGHUP reads settings anew, SIGTERM drains before it ends."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import blockdex
from blockdex import _native
from support.serving import SMALL, Serving, serve

BOTH = pytest.mark.parametrize("processes", ["single", "split"])


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def events(serving: Serving, name: str) -> list[dict[str, Any]]:
    """The lines of output with that event."""
    return [record for record in map(json.loads, list(serving.output)) if record["event"] == name]


@BOTH
def test_a_hangup_reads_the_log_level_anew_and_ends_nothing(processes: str, tmp_path: Path) -> None:
    """Every request is slow enough to be told, as a warning, by the process that answered it."""
    path = tmp_path / "blockdex.toml"
    flags = ("--processes", processes, "--slow-request-seconds", "1e-6", "--config", str(path))
    path.touch()
    with serve(*SMALL, *flags) as serving, blockdex.Client(serving.grpc_address, tenant="hangup") as client:

        def hang_up(text: str) -> None:
            path.write_text(text, encoding="utf-8")
            serving.process.send_signal(signal.SIGHUP)
            time.sleep(0.5)

        def slow_requests() -> int:
            return len(events(serving, "slow request"))

        client.open_sequence(1)
        eventually(lambda: slow_requests() > 0, "a request is told")
        hang_up('log_level = "error"\n')
        told = slow_requests()
        for _ in range(5):
            client.get_sequence(1)
        time.sleep(0.5)
        assert slow_requests() == told
        hang_up("lease_seconds = 5.0\n")
        client.get_sequence(1)
        eventually(lambda: slow_requests() > told, "a request is told again")
        again = serving.event("settings read anew")
        assert (again["log_level"], again["need_a_restart"]) == ("info", "lease_seconds")

        hang_up("cash_bytes = 3\n")
        eventually(lambda: events(serving, "settings not read anew") != [], "a bad file is told")
        assert "did you mean cache_bytes?" in serving.event("settings not read anew")["reason"]
        assert client.get_sequence(1).lengths == (0, 0, 0)
        assert serving.stop() == 0


@BOTH
def test_while_a_server_drains_probes_hear_of_it_and_requests_are_served(processes: str) -> None:
    with (
        serve(*SMALL, "--processes", processes, "--drain-seconds", "3") as serving,
        blockdex.Client(serving.grpc_address, tenant="drain", timeout=10) as client,
        grpc.insecure_channel(serving.grpc_address) as channel,
    ):
        client.open_sequence(1)
        began = time.monotonic()
        serving.process.send_signal(signal.SIGTERM)

        def readiness() -> httpx.Response:
            return httpx.get(f"http://{serving.http_address}/readyz")

        eventually(lambda: readiness().status_code == 503, "not ready")
        assert readiness().text == "shutting down\n"
        health = health_pb2_grpc.HealthStub(channel)

        def is_serving() -> bool:
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=5)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        eventually(lambda: not is_serving(), "health says so")
        number = 1
        while time.monotonic() < began + 2.5:
            number += 1
            client.open_sequence(number)
            time.sleep(0.02)
        assert number > 10
        assert serving.wait() == 0
        assert 3 <= time.monotonic() - began < 20


@BOTH
def test_clients_on_this_host_are_told_and_served_and_then_refused_until_the_rest_is_answered(processes: str) -> None:
    flags = ("--processes", processes, "--drain-seconds", "1", "--shutdown-grace-seconds", "40")
    queries = np.ones((6000, 4, 128), np.float32)
    with (
        serve(*SMALL, *flags) as serving,
        blockdex.Client(serving.grpc_address, transport="ring", timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        connection = _native.RingConnection(str(serving.socket), "drain", 10.0, 4, 8, 1 << 20)
        client.open_sequence(1)
        client.append_keys(0, sequences=1, keys=queries[:, 0])
        serving.process.send_signal(signal.SIGTERM)
        told: list[bytes] = []

        def is_told() -> bool:
            connection.poll()
            told.extend(connection.take_events())
            return bool(told)

        eventually(is_told, "the event")
        assert told == [b'{"draining":true}']
        long = pool.submit(client.select_blocks, 0, sequences=1, lengths=6000, queries=queries)
        outcomes: list[Any] = []
        while not outcomes or outcomes[-1][0] == 0:
            number = len(outcomes) + 1
            ticket = connection.submit_sequences(1, 0, 0, 0, 0, 1, np.array((number, 0), "<u8").tobytes(), 5.0)
            assert isinstance(ticket, int), ticket
            outcomes.append(connection.wait(ticket, 5.0))
            time.sleep(0.02)
        assert len(outcomes) > 1
        assert outcomes[-1] == (14, "SHUTTING_DOWN", "server: shutting down, takes no new requests")
        assert long.result(60).shape == (6000, 4, 16), "what was in flight is answered"
        eventually(lambda: connection.poll() == [] and connection.over is not None, "links end")
        assert serving.wait() == 0
        connection.close()
