"""Mutual TLS: a client's certificate is its tenant, and connections without a good one do not come to be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import blockdex
from blockdex.cli.main import main
from support.credentials import NAMES, TOKENS, Guarded, Papers, tls_flags
from support.processes import eventually
from support.serving import SMALL, serve

ENTRIES = '\n[[certificates]]\nname = "one.engine"\ntenant = "engine-a"\n'


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    papers = Papers(Path(tmp_path_factory.mktemp("papers")))
    papers.write_access(more=ENTRIES)
    authorities = ("--tls-client-ca", papers.path("ca.pem"))
    with serve(*SMALL, *tls_flags(papers), *authorities) as serving:
        yield Guarded(papers, serving)


def tls_of(papers: Papers, name: str, *identities: str, days: float = 1, ca: str = "") -> blockdex.TLS:
    """A client that shows a new certificate."""
    cert, key = papers.issue(name, *identities, days=days)
    return blockdex.TLS(ca=ca or papers.path("ca.pem"), cert=cert, key=key)


def test_a_certificate_in_the_access_file_is_its_tenant_and_a_token_goes_before_it(mutual: Guarded) -> None:
    one = tls_of(mutual.papers, "one", "other.engine", "one.engine")
    with mutual.client(tls=one) as client, mutual.client(TOKENS["engine-b"], tls=one) as by_token:
        client.open_sequence(1)
        with pytest.raises(blockdex.NotFoundError):
            by_token.get_sequence(1)
    with mutual.client(TOKENS["engine-a"], tls=one) as client:
        client.close_sequence(1)
    stranger = tls_of(mutual.papers, "stranger", "strange.engine")
    with mutual.client(tls=stranger) as client, pytest.raises(blockdex.UnauthenticatedError) as error:
        client.info()
    assert error.value.reason == blockdex.Reason.UNKNOWN_CREDENTIALS
    assert "a certificate of strange.engine" in error.value.message


def test_connections_without_a_good_certificate_do_not_come_to_be_and_a_client_is_told(
    mutual: Guarded, tmp_path: Path
) -> None:
    papers, other = mutual.papers, Papers(tmp_path)
    wrong_name = blockdex.TLS(ca=papers.path("ca.pem"), server_name="elsewhere")
    for tls, meaning in (
        (blockdex.TLS(ca=papers.path("ca.pem")), "does it ask for TLS, or for a client's certificate"),
        (tls_of(papers, "late", "one.engine", days=-1), "does it ask for TLS, or for a client's certificate"),
        (tls_of(other, "foreign", "one.engine", ca=papers.path("ca.pem")), "does it ask for TLS"),
        (tls_of(papers, "one", "one.engine", days=1, ca=other.path("ca.pem")), "is not of the authorities"),
        (wrong_name, "for another name|does it ask for"),
        (None, "does it ask for TLS"),
    ):
        with mutual.client(tls=tls, timeout=1) as client, pytest.raises(blockdex.BlockdexError, match=meaning):
            client.info()
    # What gRPC itself says of connections would be lines of another format.
    assert [line for line in mutual.serving.output if not line.startswith("{")] == []


def test_authorities_of_clients_are_replaced_while_the_server_runs(mutual: Guarded, tmp_path: Path) -> None:
    papers, other = mutual.papers, Papers(tmp_path)
    own, foreign = tls_of(papers, "one", "one.engine"), tls_of(other, "one", "one.engine", ca=papers.path("ca.pem"))

    def comes_in(tls: blockdex.TLS) -> bool:
        with mutual.client(tls=tls, timeout=0.5) as client:
            try:
                client.info()
            except (blockdex.UnavailableError, blockdex.DeadlineExceededError):
                return False
        return True

    with mutual.client(tls=own) as stays:
        stays.open_sequence(2)
        own_ca = Path(papers.path("ca.pem")).read_bytes()
        both = tmp_path / "both.pem"
        both.write_bytes(Path(other.path("ca.pem")).read_bytes())
        both.replace(papers.path("ca.pem"))
        foreign = blockdex.TLS(ca=_copy(tmp_path, own_ca), cert=foreign.cert, key=foreign.key)
        eventually(lambda: comes_in(foreign), "a client of the new authority comes in")
        assert not comes_in(blockdex.TLS(ca=foreign.ca, cert=own.cert, key=own.key))
        stays.close_sequence(2)
        Path(papers.path("ca.pem")).write_bytes(own_ca)
        eventually(lambda: comes_in(own), "the first authority counts again")


def test_a_server_s_certificate_that_has_ended_is_refused_by_clients_until_it_is_renewed(mutual: Guarded) -> None:
    papers = mutual.papers
    own = tls_of(papers, "one", "one.engine")

    def why_not() -> str:
        with mutual.client(tls=own, timeout=0.5) as client:
            try:
                client.info()
            except blockdex.BlockdexError as error:
                return error.message
        return ""

    with mutual.client(tls=own) as stays:
        stays.open_sequence(3)
        papers.issue("server", *NAMES, days=-1)
        eventually(lambda: "has expired" in why_not(), "clients refuse it")
        stays.close_sequence(3)
        papers.issue("server", *NAMES)
        eventually(lambda: not why_not(), "clients come in")


def _copy(folder: Path, content: bytes) -> str:
    path = folder / "copy.pem"
    path.write_bytes(content)
    return str(path)


def test_the_commands_show_certificates_and_tokens(
    mutual: Guarded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    papers, address = mutual.papers, ("--address", mutual.serving.grpc_address)
    cert, key = papers.issue("one", "one.engine")
    secured = (*address, "--tls-ca", papers.path("ca.pem"), "--tls-cert", cert, "--tls-key", key)
    assert main(["health", *secured]) == 0
    assert main(["info", *secured]) == 0
    assert main(["health", *address, "--timeout", "1"]) == 1
    assert "does it ask for TLS" in capsys.readouterr().err
    token = tmp_path / "token"
    token.write_text("guessed\n", encoding="utf-8")
    assert main(["info", *secured, "--token-file", str(token)]) == 1
    assert "UNAUTHENTICATED: the server does not know this token" in capsys.readouterr().err
    for words, complaint in (
        (("--tls-cert", cert), "--tls-cert and --tls-key go together"),
        (("--tls-ca", "/nowhere"), "/nowhere: No such file or directory"),
        (("--address", "host:1", "--token-file", str(token)), "would go to host:1 in plain text"),
    ):
        assert main(["info", *words]) == 2
        assert complaint in capsys.readouterr().err


def test_the_load_test_shows_a_token(mutual: Guarded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cert, key = mutual.papers.issue("one", "one.engine")
    token = tmp_path / "token"
    token.write_text("token-of-the-operator\n", encoding="utf-8")
    ca = mutual.papers.path("ca.pem")
    words = ["--address", mutual.serving.grpc_address, "--http-address", f"https://{mutual.serving.http_address}"]
    words += ["--tls-ca", ca, "--tls-cert", cert, "--tls-key", key, "--token-file", str(token), "--scenario", "churn"]
    words += ["--clients", "2", "--warm-up", "0", "--duration", "1", "--ceiling", "0.2", "--layers", "1"]
    status = main(["loadtest", *words, "--output", str(tmp_path / "report")])
    result = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert status in {0, 4}, capsys.readouterr()
    assert result["server"]["metrics"] is not None
    assert "token-of" not in (tmp_path / "report.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("names", [NAMES])
def test_without_an_access_file_the_certificate_s_name_is_the_tenant(names: tuple[str, ...], tmp_path: Path) -> None:
    papers = Papers(tmp_path)
    cert, key = papers.issue("server", *names)
    flags = ("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", papers.path("ca.pem"), "--processes", "single")
    with serve(*SMALL, *flags) as serving:
        guarded = Guarded(papers, serving)
        one, two = (tls_of(papers, name, name) for name in ("one", "two"))
        with guarded.client(tls=one) as first, guarded.client(tls=two) as second:
            first.open_sequence(1)
            with pytest.raises(blockdex.NotFoundError):
                second.get_sequence(1)
        with (
            guarded.client(tls=two, tenant="one") as liar,
            pytest.raises(blockdex.PermissionDeniedError, match="'one' is not the caller's, 'two' is"),
        ):
            liar.get_sequence(1)
