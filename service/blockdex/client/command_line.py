"""Flags of the commands that call a server: where it is, and how they and it know each other."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from blockdex.client.endpoint import TLS, Endpoint

_DEFAULT_ADDRESS = "127.0.0.1:50051"


class EndpointError(Exception):
    """Flags that do not go together, or a file that cannot be read: one line that says which."""


def add_endpoint_flags(parser: Any) -> None:
    """Adds them to a parser, or to a group of one."""
    parser.add_argument(
        "--address",
        default=os.environ.get("BLOCKDEX_GRPC_ADDRESS") or _DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help=f"where the server's gRPC is, or unix:PATH (default: BLOCKDEX_GRPC_ADDRESS, else {_DEFAULT_ADDRESS})",
    )
    files = {
        "--tls-ca": "authorities that the server's certificate may be of (PEM)",
        "--tls-cert": "certificate to show, where the server asks for one (PEM)",
        "--tls-key": "its private key (PEM)",
        "--token-file": "file with the token to show",
    }
    parser.add_argument("--tls", action="store_true", help="with TLS, and the authorities that gRPC brings")
    for flag, what in files.items():
        parser.add_argument(flag, metavar="FILE", type=Path, help=what)
    parser.add_argument("--tls-server-name", metavar="NAME", help="that the certificate is for, if not the address")
    parser.add_argument("--insecure", action="store_true", help="send the token over a network in plain text")


def endpoint_of(options: argparse.Namespace) -> Endpoint:
    """The server that the flags say.

    Raises:
        EndpointError: they do not go together, or a file cannot be read.
    """
    parts = (options.tls_ca, options.tls_cert, options.tls_key, options.tls_server_name)
    secured = options.tls or any(part is not None for part in parts)
    if (options.tls_cert is None) != (options.tls_key is None):
        raise EndpointError("--tls-cert and --tls-key go together")
    for path in parts[:3]:
        if path is not None:
            _read(path)
    token = None if options.token_file is None else _read(options.token_file).strip()
    if secured:
        return Endpoint(options.address, TLS(*parts), token)
    try:
        return Endpoint(options.address, False if options.insecure else None, token)
    except ValueError:
        raise EndpointError(
            f"--token-file: would go to {options.address} in plain text: --tls or --tls-ca FILE, or --insecure"
        ) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EndpointError(f"{path}: {getattr(error, 'strerror', None) or 'not text'}") from error
