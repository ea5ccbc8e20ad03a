"""Who is silently gone is found by pings, and who pings is not cut for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockdex import UnavailableError
from blockdex.client.endpoint import CHANNEL_OPTIONS
from blockdex.server.config import ServeSettings
from support.clients import FLAVOURS, Flavour, connect, new_sequence
from support.serving import SMALL, Serving, serve
from support.tcp_proxy import TcpProxy, proxy_to

QUERIES = np.ones((1, 4, 128), np.float32)
OVER_GRPC = [flavour for name, flavour in FLAVOURS.items() if flavour.transport != "ring" and "python" not in name]


@pytest.fixture(scope="module")
def patient() -> Iterator[Serving]:
    with serve(*SMALL, "--min-ping-seconds", "0.5") as serving:
        yield serving


def test_a_server_that_falls_silent_is_found_long_before_the_deadline(server: Serving) -> None:
    with proxy_to(server.grpc_address) as proxy, ThreadPoolExecutor(len(OVER_GRPC)) as pool:
        waiting = threading.Barrier(len(OVER_GRPC) + 1)
        lost = [pool.submit(_wait_in_vain, flavour, proxy, waiting) for flavour in OVER_GRPC]
        waiting.wait(30)
        time.sleep(0.5)
        proxy.answers = False
        for each in lost:
            assert 5 < each.result(60) < 30


def _wait_in_vain(flavour: Flavour, proxy: TcpProxy, waiting: threading.Barrier) -> float:
    """Seconds until a call finds that the server is gone, which has 100 to be answered."""
    with connect(flavour, proxy.address, timeout=20) as client:
        sequence = new_sequence()
        client.open_sequence(sequence)
        waiting.wait(30)
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            client.append_keys(0, sequences=sequence, keys=np.ones((1, 128), np.float32))
            while True:  # what is repeated by itself would go on to the deadline
                client.truncate_sequence(sequence, 0, timeout=100)
        return time.monotonic() - began


@pytest.mark.parametrize(("which", "is_cut"), [("patient", False), ("server", True)])
def test_pings_oftener_than_the_server_permits_cut_the_connection(
    which: str, is_cut: bool, request: pytest.FixtureRequest
) -> None:
    """An idle stream of a client of any language, which pings as often as gRPC lets it: every second."""
    serving: Serving = request.getfixturevalue(which)
    pinging = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    with grpc.insecure_channel(serving.grpc_address, pinging) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=6)
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as ended:
            next(watching)
    assert ended.value.code() is (grpc.StatusCode.UNAVAILABLE if is_cut else grpc.StatusCode.DEADLINE_EXCEEDED)


def test_a_server_permits_what_the_clients_do() -> None:
    pings_after = dict(CHANNEL_OPTIONS)["grpc.keepalive_time_ms"]
    assert isinstance(pings_after, int) and pings_after >= 2000 * ServeSettings().min_ping_seconds
