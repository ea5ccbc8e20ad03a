"""Real certificates, keys and access files in a folder, for servers that know their callers."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass
from pathlib import Path

import trustme

import blockdex
from blockdex.client.endpoint import Token
from support.serving import Serving

NAMES = ("localhost", "127.0.0.1")
TOKENS = {"engine-a": "token-of-engine-a", "engine-b": "token-of-engine-b"}
OPERATOR, READER = "token-of-the-operator", "token-of-prometheus"


class Papers:
    """A folder with what a server shows and knows callers by, made by an authority of its own.

    Attributes:
        folder: it.
        authority: that issues the certificates.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(self.path("ca.pem"))
        self.write_access()

    def path(self, name: str) -> str:
        """A file's path."""
        return str(self.folder / name)

    def issue(self, name: str, *identities: str, days: float = 1) -> tuple[str, str]:
        """Writes `NAME.pem` and `NAME.key`: a certificate that ends after so many days, below 0 for one that has."""
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        made = self.authority.issue_cert(*identities, not_before=end - datetime.timedelta(days=9), not_after=end)
        cert, key = self.path(f"{name}.pem"), self.path(f"{name}.key")
        Path(cert).write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
        made.private_key_pem.write_to_path(key)
        return cert, key

    def write_access(self, tokens: dict[str, str] | None = None, more: str = "") -> None:
        """Writes `access.toml`: tokens by their tenants, those of an operator and of Prometheus, and more."""
        entries = [_token(token, f'tenant = "{tenant}"') for tenant, token in (tokens or TOKENS).items()]
        entries += [_token(OPERATOR, 'rights = ["operator"]'), _token(READER, 'rights = ["metrics"]')]
        written = self.folder / "access.new"
        written.write_text("\n".join(entries) + more, encoding="utf-8")
        written.replace(self.path("access.toml"))


@dataclass
class Guarded:
    """A server, and what its files are."""

    papers: Papers
    serving: Serving

    def client(self, token: Token | None = None, **options: object) -> blockdex.Client:
        """A client that knows the server's authority."""
        tls = blockdex.TLS(ca=self.papers.path("ca.pem"))
        return blockdex.Client(self.serving.grpc_address, **{"tls": tls, "token": token, "timeout": 10} | options)  # type: ignore[arg-type]

    def events(self, name: str) -> list[str]:
        """The lines of output with that event."""
        return [line for line in list(self.serving.output) if f'"event": "{name}"' in line]


def tls_flags(papers: Papers) -> tuple[str, ...]:
    """Flags of a server with TLS on both sides, whose certificates are made here, and an access file."""
    cert, key = papers.issue("server", *NAMES)
    http_cert, http_key = papers.issue("http", *NAMES)
    return (
        *("--tls-cert", cert, "--tls-key", key, "--http-tls-cert", http_cert, "--http-tls-key", http_key),
        *("--access-file", papers.path("access.toml")),
    )


def _token(token: str, fields: str) -> str:
    return f'[[tokens]]\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n{fields}\n'
