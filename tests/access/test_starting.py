"""What is refused at the start, in one line: addresses that others reach, papers that are not in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockdex.client.endpoint import TLS, Endpoint
from blockdex.server.bootstrap import StartError, check_exposure, splits
from blockdex.server.config import ConfigError, load_settings
from blockdex.server.credential_files import CredentialFiles
from support.credentials import NAMES, Papers


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    return Papers(tmp_path)


def test_a_server_that_others_reach_has_tls_and_knows_its_callers_or_says_that_it_is_insecure(papers: Papers) -> None:
    cert, key = papers.issue("server", *NAMES)
    tls, http_tls = ("--tls-cert", cert, "--tls-key", key), ("--http-tls-cert", cert, "--http-tls-key", key)
    access, client_ca = ("--access-file", papers.path("access.toml")), ("--tls-client-ca", papers.path("ca.pem"))
    grpc, http = ("--grpc-address", "0.0.0.0:1"), ("--http-address", "[::]:1")
    for flags in (
        (),
        ("--grpc-address", "localhost:1", "--http-address", "[::1]:1"),
        ("--grpc-address", "unix:/tmp/grpc"),
        (*grpc, *tls, *access),
        (*grpc, *tls, *client_ca),
        (*http, *http_tls, *access),
        (*grpc, *http, "--insecure"),
        (*grpc, *http, "--insecure", "true"),
    ):
        check_exposure(load_settings(flags))
    for flags, complaint in (
        (grpc, "grpc_address: 0.0.0.0:1 can be reached from other machines, which takes tls_cert"),
        ((*grpc, *tls), "grpc_address: "),
        ((*grpc, *access), "grpc_address: "),
        (("--grpc-address", "no.such.host.invalid:1"), "grpc_address: "),
        (http, r"http_address: \[::\]:1 can be reached from other machines, which takes http_tls_cert"),
        ((*http, *http_tls), "http_address: "),
        ((*http, *tls, *access), "http_address: "),
        ((*grpc, "--insecure", "false"), "grpc_address: "),
    ):
        with pytest.raises(StartError, match=complaint):
            check_exposure(load_settings(flags))
    with pytest.raises(ConfigError, match="--insecure: "):
        load_settings(["--insecure", "maybe"])


def test_papers_that_are_not_in_order_are_refused_by_setting_and_file(papers: Papers) -> None:
    cert, key = papers.issue("server", *NAMES)
    _, another = papers.issue("another", *NAMES)
    nothing = papers.path("nothing")
    (papers.folder / "text").write_text("text", encoding="utf-8")
    (papers.folder / "bytes").write_bytes(b"\xff")
    text = papers.path("text")
    for flags, complaint in (
        (("--tls-cert", cert), "tls_cert: needs tls_cert and tls_key"),
        (("--http-tls-key", key), "http_tls_key: needs http_tls_cert and http_tls_key"),
        (("--tls-client-ca", cert), "tls_client_ca: needs tls_cert and tls_key"),
        (("--tls-cert", nothing, "--tls-key", key), f"tls_cert: {nothing}: No such file or directory"),
        (("--tls-cert", cert, "--tls-key", another), f"tls_cert, tls_key: {cert}, {another}: KEY_VALUES_MISMATCH"),
        (("--tls-cert", text, "--tls-key", key), "tls_cert, tls_key: "),
        (("--http-tls-cert", cert, "--http-tls-key", another), "http_tls_cert, http_tls_key: .*KEY_VALUES_MISMATCH"),
        (("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", text), f"tls_client_ca: {text}: "),
        (("--access-file", nothing), f"access_file: {nothing}: No such file or directory"),
        (("--access-file", papers.path("bytes")), "access_file: .*: not text"),
        (("--access-file", text), f"access_file: {text}: not TOML"),
        (("--socket-group", "no such group"), "socket_group: there is no 'no such group' on this machine"),
    ):
        with pytest.raises(StartError, match=complaint):
            CredentialFiles(load_settings(flags))


def test_a_token_is_not_shown_where_an_endpoint_is_and_does_not_go_in_plain_text_unasked() -> None:
    assert "secret" not in repr(Endpoint("127.0.0.1:1", token="secret"))
    for address in ("localhost:1", "[::1]:1", "unix:/tmp/grpc"):
        assert Endpoint(address, token="secret").metadata(None) == (("authorization", "Bearer secret"),)
    for tls in (True, False, TLS()):
        Endpoint("far.example:1", tls, "secret")
    with pytest.raises(ValueError, match=r"would go to far\.example:1 in plain text"):
        Endpoint("far.example:1", token="secret")
    for token in ("", "two words", "line\n", "\xe9"):
        with pytest.raises(ValueError, match="token: must be printable ASCII"):
            Endpoint("127.0.0.1:1", token=token).metadata(None)
    with pytest.raises(ValueError, match="cert and key go together"):
        TLS(cert="cert.pem")


def test_a_unix_socket_is_one_process_s_and_its_path_is_as_long_as_it_may_be() -> None:
    assert load_settings(["--grpc-address", "unix:grpc"]).unix_path == Path("grpc").absolute()
    assert load_settings(["--grpc-address", "unix:///run/grpc"]).grpc_address == "unix:/run/grpc"
    with pytest.raises(StartError, match="frontends: 2 cannot share unix:/tmp/grpc"):
        splits(load_settings(["--grpc-address", "unix:/tmp/grpc", "--frontends", "2"]))
    with pytest.raises(ConfigError, match="a Unix socket's path has at most 107 bytes, got 124"):
        load_settings(["--grpc-address", f"unix:/{123 * 'a'}"])
