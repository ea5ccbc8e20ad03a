"""Who may call, and as whom: the one rule that makes a tenant of an identity, and the file that holds it."""

from __future__ import annotations

import grp
import hashlib
import hmac
import pwd
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from blockdex.contract.errors import BlockdexError, PermissionDeniedError, Reason, UnauthenticatedError
from blockdex.contract.limits import DEFAULT_TENANT, TENANT_KEY, check_tenant
from blockdex.flags import did_you_mean

_SHA256 = re.compile(r"[0-9a-f]{64}")
_KINDS = {"tokens": "sha256", "certificates": "name", "users": "user", "groups": "group"}
"""The tables of an access file, and the field by which an entry of each is found."""


class AccessError(Exception):
    """An access file that cannot be: one line that names the entry and the field."""


class Right(StrEnum):
    """What an identity may do beside calling for its own tenant."""

    OPERATOR = "operator"
    """Calls for any tenant, sees all of them, and may do what `METRICS` may."""
    METRICS = "metrics"
    """Reads what is of all tenants together: what HTTP answers (metrics, what the server is, the live page), GetStats,
    and what the cache holds."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Somebody who proved who they are.

    Attributes:
        tenant: whose sequences are theirs; empty for somebody who has none, and reads metrics, say.
        rights: what they may do besides.
    """

    tenant: str
    rights: frozenset[Right] = frozenset()

    def has(self, right: Right) -> bool:
        """Whether they may do that."""
        return right in self.rights or Right.OPERATOR in self.rights

    def check(self, right: Right) -> None:
        """Refuses who may not do something.

        Raises:
            PermissionDeniedError: the entry does not have the right (MISSING_RIGHT).
        """
        if not self.has(right):
            raise PermissionDeniedError(
                f"this takes the right {str(right)!r}, which the caller's entry in the access file does not have",
                Reason.MISSING_RIGHT,
            )

    def acting_for(self, named: str | None) -> str:
        """The tenant of a call that names one, or none.

        Raises:
            InvalidArgumentError: the tenant cannot be (INVALID_TENANT).
            PermissionDeniedError: it is another one's (WRONG_TENANT), or none is theirs (MISSING_RIGHT).
        """
        if named is None and not self.tenant:
            raise PermissionDeniedError("the caller's entry in the access file has no tenant", Reason.MISSING_RIGHT)
        tenant = self.tenant if named is None else named
        if tenant != self.tenant and Right.OPERATOR not in self.rights:
            raise PermissionDeniedError(
                f"{TENANT_KEY}: {named!r} is not the caller's, {self.tenant!r} is: leave it out or use its credentials",
                Reason.WRONG_TENANT,
            )
        check_tenant(tenant)
        return tenant


ANYBODY = Identity(DEFAULT_TENANT, frozenset((Right.OPERATOR,)))
"""Who calls where nobody has to prove who they are."""


@dataclass(frozen=True)
class Access:
    """Who is known, each with their identity; read from an access file, and replaced as a whole.

    Attributes:
        tokens: by the SHA-256 of the token, 32 bytes.
        certificates: by a name that a client's certificate has: a subject alternative name, else its common name.
        users: by the number of a Unix user.
        groups: by the number of a Unix group.
    """

    tokens: Mapping[bytes, Identity] = field(default_factory=dict)
    certificates: Mapping[str, Identity] = field(default_factory=dict)
    users: Mapping[int, Identity] = field(default_factory=dict)
    groups: Mapping[int, Identity] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Access:
        """Reads an access file: TOML, with any number of each kind of entry.

            [[tokens]]
            sha256 = "..."              # of the token, 64 hexadecimal digits
            tenant = "engine-a"
            rights = ["operator"]       # may be left out, as may the tenant where there are rights

            [[certificates]]
            name = "engine-b.example"
            tenant = "engine-b"

            [[users]]
            user = 1000                 # or a name
            tenant = "engine-c"

            [[groups]]
            group = "engines"           # or a number
            tenant = "engine-d"

        Raises:
            AccessError: it is something else.
        """
        try:
            tables = tomllib.loads(text)
        except ValueError as error:
            raise AccessError(f"not TOML: {error}") from error
        found: dict[str, dict[Any, Identity]] = {kind: {} for kind in _KINDS}
        for kind, entries in tables.items():
            if kind not in _KINDS:
                raise AccessError(f"unknown table {kind!r}{did_you_mean(kind, _KINDS)}")
            if not isinstance(entries, list):
                raise AccessError(f"{kind}: must be a list of tables, each under [[{kind}]]")
            for number, entry in enumerate(entries, start=1):
                place = f"{kind}, entry {number}"
                key, identity = _entry(place, kind, entry)
                if key in found[kind]:
                    raise AccessError(f"{place}: {_KINDS[kind]}: {entry[_KINDS[kind]]!r} is there twice")
                found[kind][key] = identity
        return cls(**found)

    def of_token(self, token: str) -> Identity | None:
        """Whose a bearer token is; how long that takes tells nothing of those that there are."""
        given, found = hashlib.sha256(token.encode()).digest(), None
        for digest, identity in self.tokens.items():
            if hmac.compare_digest(digest, given):
                found = identity
        return found

    def of_certificate(self, names: Iterable[str]) -> Identity | None:
        """Whose a verified certificate is: the first of its names that is known counts."""
        return next((self.certificates[name] for name in names if name in self.certificates), None)

    def of_peer(self, user: int, groups: Iterable[int]) -> Identity | None:
        """Who the process at the other end of a Unix socket is: its user goes before its groups, in their order."""
        if user in self.users:
            return self.users[user]
        return next((self.groups[group] for group in groups if group in self.groups), None)

    def of_socket(self, user: int, group: int | None) -> Identity | None:
        """Who anybody is that may open a Unix socket of this user, and of this group if one may."""
        return self.users.get(user) if group is None else self.groups.get(group)


def unauthenticated(given: str) -> BlockdexError:
    """What is refused whose caller is not known.

    Args:
        given: what they showed, as `a token`; empty where it was nothing.
    """
    if given:
        return UnauthenticatedError(
            f"the server does not know {given}: use one of its access file, or add this one", Reason.UNKNOWN_CREDENTIALS
        )
    return UnauthenticatedError(
        "the server has to know who calls: send a token (authorization: Bearer ...), or a client certificate",
        Reason.MISSING_CREDENTIALS,
    )


def _entry(place: str, kind: str, entry: Any) -> tuple[bytes | str | int, Identity]:
    finds = _KINDS[kind]
    if not isinstance(entry, dict):
        raise AccessError(f"{place}: must be a table, got {entry!r}")
    for name in entry:
        if name not in {finds, "tenant", "rights"}:
            raise AccessError(f"{place}: unknown field {name!r}{did_you_mean(name, (finds, 'tenant', 'rights'))}")
    if finds not in entry:
        raise AccessError(f"{place}: {finds} is missing")
    identity = Identity(_tenant(place, entry), _rights(place, entry))
    if not identity.tenant and not identity.rights:
        raise AccessError(f"{place}: tenant is missing, and there are no rights: it would allow nothing")
    return _key(f"{place}: {finds}", kind, entry[finds]), identity


def _key(place: str, kind: str, value: Any) -> bytes | str | int:
    if kind == "tokens":
        if not isinstance(value, str) or not _SHA256.fullmatch(value.lower()):
            # Not what it is: somebody may have put the token itself there.
            raise AccessError(f"{place}: must be 64 hexadecimal digits, got {len(str(value))} characters")
        return bytes.fromhex(value)
    if kind == "certificates":
        if not isinstance(value, str) or not value:
            raise AccessError(f"{place}: must be a name, got {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise AccessError(f"{place}: must be a name or a number, got {value!r}")
    if isinstance(value, int):
        return value
    try:
        return pwd.getpwnam(value).pw_uid if kind == "users" else grp.getgrnam(value).gr_gid
    except KeyError:
        raise AccessError(f"{place}: there is no {value!r} on this machine") from None


def _tenant(place: str, entry: Mapping[str, Any]) -> str:
    tenant = entry.get("tenant", "")
    if not isinstance(tenant, str):
        raise AccessError(f"{place}: tenant: must be a string, got {tenant!r}")
    if "tenant" in entry:
        try:
            check_tenant(tenant)
        except BlockdexError as error:
            raise AccessError(f"{place}: tenant: {error.message.partition(': ')[2]}") from None
    return tenant


def _rights(place: str, entry: Mapping[str, Any]) -> frozenset[Right]:
    rights, known = entry.get("rights", []), list(map(str, Right))
    if not isinstance(rights, list):
        raise AccessError(f"{place}: rights: must be a list of {', '.join(known)}, got {rights!r}")
    for right in rights:
        if right not in known:
            raise AccessError(f"{place}: rights: must be of {', '.join(known)}, got {right!r}")
    return frozenset(map(Right, rights))
