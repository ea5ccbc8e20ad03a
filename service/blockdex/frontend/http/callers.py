"""Who may read over HTTP: with an access file, holders of a token with that right, and anybody only `/healthz`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from blockdex.contract.access import Access, Right

OPEN_PATH = "/healthz"

# A browser can ask whoever looks at the page for a token only as a password.
_CHALLENGE = 'Bearer realm="blockdex", Basic realm="blockdex"'


class KnownCallers:
    """An application before another one, that lets those through who may read what it answers.

    Args:
        app: the other one.
        access: who is known; None: everybody may.
    """

    def __init__(self, app: ASGIApp, access: Callable[[], Access | None]) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        access = self._access()
        if access is not None and scope["type"] == "http" and scope["path"] != OPEN_PATH:
            refusal = _refusal(access, Headers(scope=scope).get("authorization", ""))
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _refusal(access: Access, authorization: str) -> PlainTextResponse | None:
    token = _token(authorization)
    identity = access.of_token(token) if token else None
    if identity is None:
        why = "this token is not in the server's access file" if token else "send a token: authorization: Bearer ..."
        return PlainTextResponse(f"{why}\n", status_code=401, headers={"www-authenticate": _CHALLENGE})
    if not identity.has(Right.METRICS):
        return PlainTextResponse(f"this takes the right {str(Right.METRICS)!r}\n", status_code=403)
    return None


def _token(authorization: str) -> str:
    """The token of `Bearer TOKEN`, or the password of `Basic`; empty where there is neither."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
