"""Clients over the fastest way that both sides have."""

from __future__ import annotations

import asyncio

from blockdex.client.async_client import AsyncClient
from blockdex.client.client import Client
from blockdex.client.core import DEFAULT_TIMEOUT, Core
from blockdex.client.endpoint import TLS, Endpoint, Token
from blockdex.client.ring import obstacle


def connect(
    address: str,
    *,
    tenant: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    tls: TLS | bool | None = None,
    token: Token | None = None,
) -> Client:
    """A client over a ring where the server is on this host and offers one, else over streams.

    `client.transport` says which, and `client.why` why it is no faster one.

    Args:
        address: of the server's gRPC, as `Client` takes it.
        tenant: as `Client` takes it.
        timeout: as `Client` takes it.
        tls: as `Client` takes it.
        token: as `Client` takes it.

    Raises:
        BlockdexError: the server cannot be asked what it offers.
    """
    client = Client(address, tenant=tenant, timeout=timeout, tls=tls, token=token)
    try:
        why = obstacle(Core(Endpoint(address, tls, token), tenant, timeout), client.info(), timeout)
    except BaseException:
        client.close()
        raise
    if why:
        client.why = why
        return client
    client.close()
    return Client(address, tenant=tenant, timeout=timeout, transport="ring", tls=tls, token=token)


async def connect_async(
    address: str,
    *,
    tenant: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    tls: TLS | bool | None = None,
    token: Token | None = None,
) -> AsyncClient:
    """The same for asyncio."""
    client = AsyncClient(address, tenant=tenant, timeout=timeout, tls=tls, token=token)
    try:
        why = await asyncio.to_thread(
            obstacle, Core(Endpoint(address, tls, token), tenant, timeout), await client.info(), timeout
        )
    except BaseException:
        await client.close()
        raise
    if why:
        client.why = why
        return client
    await client.close()
    return AsyncClient(address, tenant=tenant, timeout=timeout, transport="ring", tls=tls, token=token)
