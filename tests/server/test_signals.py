"""Signals to a server of one process and of several: SIGHUP reads settings anew, SIGTERM drains before it ends."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import blockdex
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
    """Every request is slow enough to be told, by the process that answered it, at a level below `error`."""
    path = tmp_path / "blockdex.toml"
    path.write_text("slow_request_seconds = 1e-6\n", encoding="utf-8")
    reads = 0

    def hang_up(text: str) -> dict[str, Any]:
        nonlocal reads
        path.write_text(f"slow_request_seconds = 1e-6\n{text}", encoding="utf-8")
        serving.process.send_signal(signal.SIGHUP)
        reads += 1
        eventually(lambda: len(events(serving, "settings read anew")) == reads, "settings are read anew")
        return events(serving, "settings read anew")[-1]

    with (
        serve(*SMALL, "--processes", processes, "--config", str(path)) as serving,
        blockdex.Client(serving.grpc_address, tenant="hangup") as client,
    ):

        def slow_requests() -> int:
            return len(events(serving, "slow request"))

        client.open_sequence(1)
        eventually(lambda: slow_requests() > 0, "a request is told")
        told = slow_requests()
        assert hang_up('log_level = "error"\n')["log_level"] == "error"
        # What a process is told, it hears before what is sent to it later, or soon after.
        time.sleep(0.3)
        told = slow_requests()
        for _ in range(5):
            client.get_sequence(1)
        time.sleep(0.3)
        assert slow_requests() == told
        assert hang_up("lease_seconds = 5.0\n")["need_a_restart"] == "lease_seconds"
        time.sleep(0.3)
        client.get_sequence(1)
        eventually(lambda: slow_requests() > told, "a request is told again")

        path.write_text("cash_bytes = 3\n", encoding="utf-8")
        serving.process.send_signal(signal.SIGHUP)
        eventually(lambda: events(serving, "settings not read anew") != [], "a bad file is told")
        assert "did you mean cache_bytes?" in events(serving, "settings not read anew")[0]["reason"]
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
