"""Tokens over TLS: whose sequences are whose, what is refused, and files that change while calls run."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import blockdex
from blockdex.client.endpoint import Endpoint
from support.credentials import NAMES, OPERATOR, READER, TOKENS, Guarded, Papers
from support.processes import eventually

A, B = TOKENS["engine-a"], TOKENS["engine-b"]
"""Tokens of the tenants `engine-a` and `engine-b`."""


@contextmanager
def refused(kind: type[blockdex.BlockdexError], reason: blockdex.Reason, text: str | None = None) -> Iterator[None]:
    with pytest.raises(kind, match=text) as error:
        yield
    assert error.value.reason == reason


def test_the_token_is_the_tenant(guarded: Guarded) -> None:
    with guarded.client(A) as a, guarded.client(B, transport="unary") as b, guarded.client(OPERATOR) as operator:
        a.open_sequence(1)
        with refused(blockdex.NotFoundError, blockdex.Reason.UNKNOWN_SEQUENCE):
            b.get_sequence(1)
        b.open_sequence(1)
        b.close_sequence(1)
        assert a.get_sequence(1).lengths == (0, 0, 0)
        assert operator.info().limits.max_spans > 0
        assert operator.info().cache.sequences and operator.stats().requests
        assert not a.info().cache.sequences and a.info().cache.pages_total
        with refused(blockdex.PermissionDeniedError, blockdex.Reason.MISSING_RIGHT, "takes the right 'metrics'"):
            a.stats()
        with refused(blockdex.PermissionDeniedError, blockdex.Reason.MISSING_RIGHT, "has no tenant"):
            operator.get_sequence(1)
    with guarded.client(OPERATOR, tenant="engine-a") as operator:
        operator.close_sequence(1)


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_who_is_not_known_is_refused_and_told_what_to_do(guarded: Guarded, transport: str) -> None:
    def ask(token: str | None, tenant: str | None = None) -> None:
        with guarded.client(token, tenant=tenant, transport=transport) as client:
            client.open_sequence(2)

    with refused(blockdex.UnauthenticatedError, blockdex.Reason.MISSING_CREDENTIALS, "send a token"):
        ask(None)
    with refused(blockdex.UnauthenticatedError, blockdex.Reason.UNKNOWN_CREDENTIALS, "does not know this token"):
        ask("guessed")
    with refused(blockdex.PermissionDeniedError, blockdex.Reason.WRONG_TENANT, "'engine-b' is not the caller's"):
        ask(A, "engine-b")
    with refused(blockdex.PermissionDeniedError, blockdex.Reason.MISSING_RIGHT, "has no tenant"):
        ask(READER)
    assert guarded.events("call refused")


def test_health_is_open_and_reflection_is_not(guarded: Guarded) -> None:
    endpoint = Endpoint(guarded.serving.grpc_address, blockdex.TLS(ca=guarded.papers.path("ca.pem")), A)
    with endpoint.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (
            health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == health_pb2.HealthCheckResponse.SERVING
        )
        with pytest.raises(grpc.RpcError) as error:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        assert isinstance(error.value, grpc.Call) and error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_http_answers_holders_of_a_right_and_is_alive_for_anybody(guarded: Guarded) -> None:
    tls = ssl.create_default_context(cafile=guarded.papers.path("ca.pem"))
    with httpx.Client(base_url=f"https://{guarded.serving.http_address}", verify=tls) as http:

        def get(path: str, token: str = "", basic: str = "") -> httpx.Response:
            headers = {"authorization": f"Bearer {token}"} if token else {}
            return http.get(path, headers=headers, auth=("anybody", basic) if basic else None)

        assert get("/healthz").text == "alive\n"
        for path in ("/", "/readyz", "/metrics", "/v1/info", "/v1/live", "/page.js", "/nowhere", "/healthz/"):
            answer = get(path)
            assert (answer.status_code, answer.text) == (401, "send a token: authorization: Bearer ...\n"), path
            assert "Basic" in answer.headers["www-authenticate"]
        assert get("/metrics", "guessed").status_code == 401
        assert get("/metrics", A).text == "this takes the right 'metrics'\n"
        assert get("/metrics", A).status_code == 403
        for token in (READER, OPERATOR):
            assert get("/metrics", token).status_code == get("/readyz", token).status_code == 200
        assert get("/", basic=READER).status_code == 200
        assert get("/", basic="guessed").status_code == 401
        assert http.get("/", headers={"authorization": "Basic !"}).status_code == 401
        assert 'code="UNAUTHENTICATED"' in get("/metrics", READER).text


def test_a_rotated_token_ends_the_old_one_and_its_streams_while_others_run(guarded: Guarded) -> None:
    asked, stop = [0], threading.Event()

    def call(client: blockdex.Client) -> None:
        while not stop.is_set():
            client.get_sequence(3)
            asked[0] += 1

    with ExitStack() as stack:
        a, b = (stack.enter_context(guarded.client(token)) for token in (A, B))
        executor = stack.enter_context(ThreadPoolExecutor())
        for client in (a, b):
            client.open_sequence(3)
        calling = executor.submit(call, b)
        stack.callback(stop.set)
        guarded.papers.write_access({"engine-a": "another", "engine-b": B})
        with guarded.client("another") as new:
            eventually(lambda: _knows(new), "the new token is known")
        with refused(blockdex.UnauthenticatedError, blockdex.Reason.UNKNOWN_CREDENTIALS):
            a.get_sequence(3)
        before = asked[0]
        eventually(lambda: asked[0] > before + 20, "the other tenant's calls go on")
        guarded.papers.write_access()
        eventually(lambda: _knows(a), "the old token is known again")
        stop.set()
        calling.result()


def _knows(client: blockdex.Client) -> bool:
    try:
        client.get_sequence(3)
    except blockdex.UnauthenticatedError:
        return False
    return True


def test_a_token_may_be_a_function(guarded: Guarded) -> None:
    tokens = iter(["guessed", A, A, A])
    with guarded.client(transport="unary", token=lambda: next(tokens)) as client:
        with refused(blockdex.UnauthenticatedError, blockdex.Reason.UNKNOWN_CREDENTIALS):
            client.info()
        client.open_sequence(4)
        client.close_sequence(4)


def test_a_bad_access_file_changes_nothing_and_is_told_once(guarded: Guarded) -> None:
    told = len(guarded.events("credentials not read anew"))
    path = guarded.papers.folder / "access.toml"
    path.write_text("[[tokens]]\nsha265 = 3\n", encoding="utf-8")
    eventually(lambda: len(guarded.events("credentials not read anew")) == told + 1, "it is told")
    assert "did you mean sha256?" in guarded.events("credentials not read anew")[-1]
    with guarded.client(A) as client:
        client.info()
    time.sleep(1.5)
    assert len(guarded.events("credentials not read anew")) == told + 1
    guarded.papers.write_access()


def test_certificates_are_replaced_while_calls_run(guarded: Guarded, tmp_path: Path) -> None:
    """By those of another authority: clients of the new one come in, and who is there already stays."""
    old = guarded.papers.path("ca.pem")
    tls = ssl.create_default_context(cafile=old)
    with guarded.client(A) as before:
        before.open_sequence(5)
        other = Papers(tmp_path)
        for name in ("server", "http"):
            for made, suffix in zip(other.issue(f"new-{name}", *NAMES), ("pem", "key"), strict=True):
                Path(made).replace(guarded.papers.path(f"{name}.{suffix}"))
        new = blockdex.TLS(ca=other.path("ca.pem"))

        def comes_in() -> bool:
            with guarded.client(A, tls=new, timeout=1) as client:
                try:
                    client.info()
                except (blockdex.UnavailableError, blockdex.DeadlineExceededError):
                    return False
            return True

        eventually(comes_in, "a client that trusts the new authority comes in")
        assert before.get_sequence(5).lengths == (0, 0, 0)
        with refused(blockdex.UnavailableError, blockdex.Reason.UNREACHABLE, "is not of the authorities"):
            guarded.client(A, timeout=2).info()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"https://{guarded.serving.http_address}/healthz", verify=tls)
        trusted = ssl.create_default_context(cafile=other.path("ca.pem"))
        assert httpx.get(f"https://{guarded.serving.http_address}/healthz", verify=trusted).text == "alive\n"
    guarded.papers.issue("server", *NAMES)
    guarded.papers.issue("http", *NAMES)
    eventually(lambda: _is_open(guarded.client), "the first authority's certificate is shown again")


def _is_open(make: Callable[..., blockdex.Client]) -> bool:
    with make(A, timeout=1) as client:
        try:
            client.info()
        except (blockdex.UnavailableError, blockdex.DeadlineExceededError):
            return False
    return True


def test_a_certificate_whose_key_is_another_ones_changes_nothing(guarded: Guarded) -> None:
    told = len(guarded.events("credentials not read anew"))
    cert = (guarded.papers.folder / "server.pem").read_bytes()
    guarded.papers.issue("stranger", *NAMES)
    (guarded.papers.folder / "stranger.pem").replace(guarded.papers.path("server.pem"))
    eventually(lambda: len(guarded.events("credentials not read anew")) > told, "it is told")
    assert "KEY_VALUES_MISMATCH" in guarded.events("credentials not read anew")[-1]
    assert _is_open(guarded.client)
    (guarded.papers.folder / "server.pem").write_bytes(cert)
