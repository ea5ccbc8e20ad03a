"""Which of several processes that share a port a connection has come to, as the kernel tells it.

A server does not say which of its frontends answers, and the kernel shares connections out as it likes. Both ends of
a connection on this machine are in /proc/net, and the process that holds an end is the one with its inode open.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc

_ESTABLISHED = "01"
_CONNECT_SECONDS = 20.0

OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A connection of its own for each channel, so that trying again can lead to another process.
    ("grpc.use_local_subchannel_pool", 1),
)


def connect(address: str, pid: int, tries: int = 200) -> grpc.Channel:
    """A channel whose connection a given process has accepted: made again and again until it has.

    Raises:
        ConnectionError: it never did.
    """
    for _ in range(tries):
        before = local_ports(address)
        channel = grpc.insecure_channel(address, options=OPTIONS)
        grpc.channel_ready_future(channel).result(timeout=_CONNECT_SECONDS)
        if owner(address, local_ports(address) - before, [pid]) == pid:
            return channel
        channel.close()
    raise ConnectionError(f"{address}: process {pid} accepted none of {tries} connections")


def local_ports(address: str) -> set[int]:
    """Our ends of this process's connections to an address."""
    inodes = _inodes(os.getpid())
    return {local for local, remote, inode in _connections() if remote == _port(address) and inode in inodes}


def owner(address: str, peers: Iterable[int], pids: Iterable[int]) -> int | None:
    """The process that accepted a connection from one of the ports `peers`; None where it is none of `pids`."""
    theirs = set(peers)
    accepted = {inode for local, remote, inode in _connections() if local == _port(address) and remote in theirs}
    return next((pid for pid in pids if accepted & _inodes(pid)), None)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _connections() -> Iterator[tuple[int, int, int]]:
    """Local port, remote port and inode of every connection; gRPC's sockets are IPv6, also where addresses are not."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text("ascii").splitlines()[1:]:
            _, local, remote, state, *_, inode = line.split()[:10]
            if state == _ESTABLISHED:
                yield int(local.rpartition(":")[2], 16), int(remote.rpartition(":")[2], 16), int(inode)


def _inodes(pid: int) -> set[int]:
    """Sockets that a process has open."""
    inodes = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(entry.path)  # noqa: PTH115 - not a path: "socket:[4711]"
        except FileNotFoundError:
            continue  # Closed meanwhile.
        if target.startswith("socket:["):
            inodes.add(int(target[8:-1]))
    return inodes
