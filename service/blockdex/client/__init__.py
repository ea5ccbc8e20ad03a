"""The Python clients: one core, once for threads and once for asyncio."""

from blockdex.client import forking  # noqa: F401 - before whatever imports gRPC
from blockdex.client.answers import Info, SequenceState
from blockdex.client.async_client import AsyncClient
from blockdex.client.async_pool import AsyncPool
from blockdex.client.client import Client
from blockdex.client.connecting import connect, connect_async
from blockdex.client.endpoint import TLS
from blockdex.client.pool import Pool
from blockdex.client.shared_regions import SharedRegion

__all__ = [
    "TLS",
    "AsyncClient",
    "AsyncPool",
    "Client",
    "Info",
    "Pool",
    "SequenceState",
    "SharedRegion",
    "connect",
    "connect_async",
]
