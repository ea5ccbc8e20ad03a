"""The files by which a server and its callers know each other: read at the start, and again whenever they change."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path

from blockdex.contract.access import AccessError
from blockdex.contract.credentials import Certificate, Credentials
from blockdex.logs import log_event
from blockdex.server.bootstrap import StartError
from blockdex.server.config import ServeSettings
from blockdex.server.public_socket import group_number

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


class CredentialFiles:
    """Certificates, keys and the access file of one server; used on one asyncio loop.

    Args:
        settings: that name them.

    Attributes:
        credentials: what they said when they were last read without an error.
        http_tls: what HTTP takes connections with; None where it is plain text. Later certificates are put into it.

    Raises:
        StartError: one of them cannot be read, or is not what it should be.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._told: list[Callable[[Credentials], None]] = []
        self.http_tls: ssl.SSLContext | None = None
        self._versions = self._look()
        self.credentials = self._read()

    def tell(self, told: Callable[[Credentials], None]) -> None:
        """Has a function called with what the files say, whenever that is read anew."""
        self._told.append(told)

    async def watch(self) -> None:
        """Reads the files whenever they change; until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._look() != self._versions:
                self.read_anew()

    def read_anew(self) -> None:
        """Reads the files and passes on what they say; where that cannot be, the log says why, and all stays."""
        self._versions = self._look()
        try:
            self.credentials = self._read()
        except StartError as error:
            log_event(logger, logging.ERROR, "credentials not read anew", reason=str(error))
            return
        for told in self._told:
            told(self.credentials)
        log_event(logger, logging.INFO, "credentials read anew")

    def _look(self) -> list[tuple[int, int, int] | None]:
        """What tells another version of each file: a mounted secret is replaced by moving a link."""
        found: list[tuple[int, int, int] | None] = []
        settings = self._settings
        for path in (
            settings.access_file,
            settings.tls_cert,
            settings.tls_key,
            settings.tls_client_ca,
            settings.http_tls_cert,
            settings.http_tls_key,
        ):
            try:
                status = None if path is None else path.stat()
            except OSError:
                status = None
            found.append(None if status is None else (status.st_ino, status.st_mtime_ns, status.st_size))
        return found

    def _read(self) -> Credentials:
        settings = self._settings
        http = _certificate("http_tls", settings.http_tls_cert, settings.http_tls_key, None)
        grpc = _certificate("tls", settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        try:
            group = None if settings.socket_group is None else group_number(settings.socket_group)
            access = None if settings.access_file is None else _text("access_file", settings.access_file)
            credentials = Credentials(grpc, access, group)
        except KeyError as error:
            raise StartError(f"socket_group: there is no {settings.socket_group!r} on this machine") from error
        except AccessError as error:
            raise StartError(f"access_file: {settings.access_file}: {error}") from error
        if http is not None:
            self.http_tls = self.http_tls or ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.http_tls.load_cert_chain(str(settings.http_tls_cert), str(settings.http_tls_key), password="")
        return credentials


def _certificate(setting: str, cert: Path | None, key: Path | None, client_ca: Path | None) -> Certificate | None:
    """A certificate whose key is its own; None where none is named.

    Raises:
        StartError: as `CredentialFiles` says.
    """
    if cert is None or key is None:
        named = {f"{setting}_cert": cert, f"{setting}_key": key, f"{setting}_client_ca": client_ca}
        for name, path in named.items():
            if path is not None:
                raise StartError(f"{name}: needs {setting}_cert and {setting}_key")
        return None
    texts = _text(f"{setting}_cert", cert), _text(f"{setting}_key", key)
    authorities = "" if client_ca is None else _text(f"{setting}_client_ca", client_ca)
    checked = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password OpenSSL would ask the terminal for one.
        checked.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        raise StartError(f"{setting}_cert, {setting}_key: {cert}, {key}: {error.reason or error}") from error
    try:
        if authorities:
            checked.load_verify_locations(cadata=authorities)
    except ssl.SSLError as error:
        raise StartError(f"{setting}_client_ca: {client_ca}: {error.reason or error}") from error
    return Certificate(*texts, authorities)


def _text(setting: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"{setting}: {path}: {getattr(error, 'strerror', None) or 'not text'}") from error
