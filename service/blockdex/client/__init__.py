"""The Python clients: one core, once for threads and once for asyncio."""

from blockdex.client.answers import Info, SequenceState
from blockdex.client.async_client import AsyncClient
from blockdex.client.async_pool import AsyncPool
from blockdex.client.client import Client
from blockdex.client.connecting import connect, connect_async
from blockdex.client.pool import Pool

__all__ = ["AsyncClient", "AsyncPool", "Client", "Info", "Pool", "SequenceState", "connect", "connect_async"]
