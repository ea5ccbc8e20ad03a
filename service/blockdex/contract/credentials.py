"""What a server shows callers and knows them by, as its files say it; read anew while it runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from blockdex.contract.access import ANYBODY, Access, Identity, unauthenticated

_BEARER = "bearer "


class Certificate(NamedTuple):
    """What a server proves with who it is, all PEM.

    Attributes:
        chain: its certificate, and those between it and its authority's.
        key: its private key.
        client_ca: authorities whose clients may connect; empty: any client may, and shows no certificate.
    """

    chain: str
    key: str
    client_ca: str = ""


@dataclass(frozen=True)
class Credentials:
    """What a server shows callers and knows them by.

    Attributes:
        certificate: None where gRPC is plain text.
        access_text: an access file; None where there is none.
        socket_group: number of the group that may open its Unix sockets; None: its own user alone.
        access: what the text says.

    Raises:
        AccessError: the text is no access file.
    """

    certificate: Certificate | None = None
    access_text: str | None = None
    socket_group: int | None = None
    access: Access | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "access", None if self.access_text is None else Access.parse(self.access_text))

    @classmethod
    def restore(cls, words: Mapping[str, Any]) -> Credentials:
        """Those that `words` made an object of."""
        certificate = words["certificate"]
        return cls(None if certificate is None else Certificate(*certificate), words["access"], words["socket_group"])

    def words(self) -> dict[str, Any]:
        """An object of strings and lists, for another process."""
        return {"certificate": self.certificate, "access": self.access_text, "socket_group": self.socket_group}

    def identity_of(self, authorization: str | None, certificate_names: Iterable[str], on_socket: bool) -> Identity:
        """Who makes a call: a token goes before a certificate, that before the Unix socket that it came over.

        Without an access file a verified certificate's first name is the tenant, and without one anybody may call.

        Args:
            authorization: what the call says under this name; None where it says nothing.
            certificate_names: of the client's certificate, which the connection has verified; none without one.
            on_socket: whether it came over a Unix socket.

        Raises:
            UnauthenticatedError: nobody that the access file knows.
        """
        names = list(certificate_names)
        if self.access is None:
            return Identity(names[0]) if names else ANYBODY
        if authorization is not None:
            known = authorization[: len(_BEARER)].lower() == _BEARER and self.access.of_token(
                authorization[len(_BEARER) :].strip()
            )
            if not known:
                raise unauthenticated("this token")
            return known
        identity = self.access.of_certificate(names)
        if identity is None and on_socket:
            # gRPC does not say who is at the other end; whoever may open the file is one.
            identity = self.access.of_socket(os.getuid(), self.socket_group)
        if identity is None:
            raise unauthenticated(f"a certificate of {', '.join(names)}" if names else "")
        return identity

    def identity_of_peer(self, user: int, groups: Iterable[int]) -> Identity:
        """Who the process at the other end of a ring's socket is: an entry of the access file goes before all.

        Args:
            user: number of its Unix user. The server's own, and root, may do anything where no entry names them.
            groups: numbers of its groups.

        Raises:
            UnauthenticatedError: another user, whom the access file does not know.
        """
        is_own = user in {0, os.getuid()}
        identity = None if self.access is None else self.access.of_peer(user, () if is_own else groups)
        if identity is None and not is_own:
            raise unauthenticated(f"user {user} of this host")
        return identity or ANYBODY
