"""Clients over the fastest way that both sides have."""

from __future__ import annotations

import asyncio

from blockdex.client.async_client import AsyncClient
from blockdex.client.client import Client
from blockdex.client.core import DEFAULT_TIMEOUT, Core
from blockdex.client.device_channels import obstacle_of_channels
from blockdex.client.endpoint import TLS, Endpoint, Token
from blockdex.client.ring import obstacle


def connect(
    address: str,
    *,
    tenant: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    tls: TLS | bool | None = None,
    token: Token | None = None,
    device: str | None = None,
) -> Client:
    """A client over a ring where the server is on this host and offers one, else over streams.

    `client.transport` says which, and `client.why` why it is no faster one. For an engine that names its GPU, device
    channels are the fastest way: one is opened and closed, and `client.channel_device` is the GPU if that went well.

    Args:
        address: of the server's gRPC, as `Client` takes it.
        tenant: as `Client` takes it.
        timeout: as `Client` takes it.
        tls: as `Client` takes it.
        token: as `Client` takes it.
        device: where the engine's tensors are, such as `cuda:1`; None for an engine without a GPU.

    Raises:
        BlockdexError: the server cannot be asked what it offers.
    """
    client = Client(address, tenant=tenant, timeout=timeout, tls=tls, token=token)
    core = Core(Endpoint(address, tls, token), tenant, timeout)
    try:
        info = client.info()
        why = obstacle(core, info, timeout)
    except BaseException:
        client.close()
        raise
    if why:
        client.why = why
        return client
    client.close()
    client = Client(address, tenant=tenant, timeout=timeout, transport="ring", tls=tls, token=token)
    if device is not None:
        client.why = obstacle_of_channels(core, info, device)
        client.channel_device = None if client.why else device
    return client


async def connect_async(
    address: str,
    *,
    tenant: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    tls: TLS | bool | None = None,
    token: Token | None = None,
    device: str | None = None,
) -> AsyncClient:
    """The same for asyncio."""
    client = AsyncClient(address, tenant=tenant, timeout=timeout, tls=tls, token=token)
    core = Core(Endpoint(address, tls, token), tenant, timeout)
    try:
        info = await client.info()
        why = await asyncio.to_thread(obstacle, core, info, timeout)
    except BaseException:
        await client.close()
        raise
    if why:
        client.why = why
        return client
    await client.close()
    client = AsyncClient(address, tenant=tenant, timeout=timeout, transport="ring", tls=tls, token=token)
    if device is not None:
        client.why = await asyncio.to_thread(obstacle_of_channels, core, info, device)
        client.channel_device = None if client.why else device
    return client
