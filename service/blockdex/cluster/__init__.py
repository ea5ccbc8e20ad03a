"""Many servers as one: who holds which sequence, and clients that go straight there."""

from blockdex.cluster.async_client import AsyncClusterClient
from blockdex.cluster.client import ClusterClient
from blockdex.cluster.directory import Directory, DnsDirectory, FileDirectory, StaticDirectory
from blockdex.cluster.sharded import ShardedSequence
from blockdex.cluster.views import Member, View

__all__ = [
    "AsyncClusterClient",
    "ClusterClient",
    "Directory",
    "DnsDirectory",
    "FileDirectory",
    "Member",
    "ShardedSequence",
    "StaticDirectory",
    "View",
]
