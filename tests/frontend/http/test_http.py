"""The HTTP side of a real server."""

from __future__ import annotations

import grpc
import httpx
from google.protobuf.json_format import Parse
from prometheus_client.parser import text_string_to_metric_families

from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc
from support.serving import Serving


def get(server: Serving, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"http://{server.http_address}{path}", headers=headers)


def test_alive_and_ready(server: Serving) -> None:
    assert (get(server, "/healthz").status_code, get(server, "/healthz").text) == (200, "alive\n")
    assert (get(server, "/readyz").status_code, get(server, "/readyz").text) == (200, "ready\n")


def test_info_is_what_get_info_says(server: Serving) -> None:
    answer = get(server, "/v1/info")
    with grpc.insecure_channel(server.grpc_address) as channel:
        info = pb_grpc.IndexerServiceStub(channel).GetInfo(pb.GetInfoRequest())
    assert answer.headers["content-type"] == "application/json"
    assert Parse(answer.text, pb.GetInfoResponse()) == info
    assert answer.json()["spec"]["initBlocks"] == 0  # zeros are said too
    # 64 bits do not fit a JSON number, in the log either.
    assert answer.json()["epoch"] == str(info.epoch) == server.event("serving")["epoch"]


def test_metrics_in_both_formats(server: Serving) -> None:
    plain = get(server, "/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert list(text_string_to_metric_families(plain.text))
    openmetrics = get(server, "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


def test_what_is_not_there_is_404(server: Serving) -> None:
    assert get(server, "/docs").status_code == 404
    assert get(server, "/v2/info").status_code == 404
    assert httpx.post(f"http://{server.http_address}/v1/info").status_code == 405
