"""The Python clients: one core, once for threads and once for asyncio."""

from blockdex.client.answers import Info, SequenceState
from blockdex.client.async_client import AsyncClient
from blockdex.client.client import Client

__all__ = ["AsyncClient", "Client", "Info", "SequenceState"]
