"""The client's side of regions: memory that it makes, shares with an engine over a link's socket, and takes back."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from blockdex.contract.errors import error_of
from blockdex.ring.control_channel import LENGTH_BYTES, Words
from blockdex_kernels import cuda_driver


class Shared(NamedTuple):
    """A region as its client knows it: the number that requests name, and its bytes."""

    region: int
    bytes: int


def share(connected: socket.socket, kind: str, files: Sequence[int] = (), **words: Any) -> Shared:
    """Shares memory over the socket of a link.

    Args:
        connected: to the engine, of a link that was taken; nobody else reads it.
        kind: see `Offer`.
        files: the one that stands for it, or none.
        words: `bytes`, `device`, `handle` (hexadecimal digits) of `Offer`.

    Raises:
        BlockdexError: the engine refuses it.
        OSError: it does not answer.
    """
    answer = _ask(connected, {"share": kind, **words}, files)
    return Shared(answer["region"], answer["bytes"])


def share_memory(connected: socket.socket, memory: HostMemory | DeviceMemory) -> Shared:
    """Shares memory of this process; otherwise as `share`."""
    return share(connected, memory.kind, [memory.fd], **memory.words)


def release(connected: socket.socket, region: int) -> None:
    """Gives a region back; when this returns nobody reads or writes it. Otherwise as `share`."""
    _ask(connected, {"release": region}, [])


def new_memfd(num_bytes: int) -> int:
    """A memfd that can be shared; a file that the caller closes."""
    fd = os.memfd_create("blockdex-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except BaseException:
        os.close(fd)
        raise
    return fd


class HostMemory:
    """A memfd that can be shared.

    Args:
        num_bytes: that it has.

    Attributes:
        kind, fd, words: what is said of it to share it.
        address: where it begins.
        bytes: of it.
        buffer: what arrays are made of.
    """

    kind = "memfd"
    words: Mapping[str, Any] = {}

    def __init__(self, num_bytes: int) -> None:
        self.fd = new_memfd(num_bytes)
        weakref.finalize(self, os.close, self.fd).atexit = False
        self.buffer = mmap.mmap(self.fd, num_bytes)
        self.address = int(np.frombuffer(self.buffer, np.uint8).ctypes.data)
        self.bytes = num_bytes


class DeviceMemory:
    """Memory of a GPU that can be shared, and outlives the process that shares it. torch makes a tensor of it.

    It is given back with the last tensor that was made of it.

    Args:
        device: number of the GPU, whose primary context is torch's, too.
        num_bytes: that are wanted; there are whole units of them.

    Attributes:
        kind, fd, words: what is said of it to share it.
        address: where it begins, for the GPU.
        bytes: of it.

    Raises:
        RuntimeError: the driver refuses.
    """

    kind = "cuda_fd"

    def __init__(self, device: int, num_bytes: int) -> None:
        cuda_driver.use_primary_context(device)
        unit = cuda_driver.granularity(device)
        self.bytes = -(-num_bytes // unit) * unit
        handle = cuda_driver.create(device, self.bytes, shared=True)
        self.fd = cuda_driver.export_file(handle)
        self.words = {"bytes": self.bytes, "device": cuda_driver.device_uuid(device).hex()}
        self.address = cuda_driver.reserve(self.bytes, unit)
        cuda_driver.map_memory(self.address, self.bytes, handle, device)
        weakref.finalize(self, _give_back, device, self.fd, self.address, self.bytes).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What torch makes a tensor of, which holds this."""
        return {"shape": (self.bytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}


def _give_back(device: int, fd: int, address: int, num_bytes: int) -> None:
    os.close(fd)
    cuda_driver.use_primary_context(device)
    cuda_driver.call("cuCtxSynchronize")  # kernels that were launched on it may not have run yet
    cuda_driver.unmap(address, num_bytes)


def _ask(connected: socket.socket, words: Words, files: Sequence[int]) -> Words:
    body = json.dumps(words).encode()
    said = len(body).to_bytes(LENGTH_BYTES, "little") + body
    sent = socket.send_fds(connected, [said], list(files)) if files else 0
    connected.sendall(said[sent:])
    while True:
        answer: Words = json.loads(_exactly(connected, int.from_bytes(_exactly(connected, LENGTH_BYTES), "little")))
        match answer:
            case {"answer": dict(told)}:
                return told
            case {"failed": str(message), "reason": str(reason), "code": int(code)}:
                raise error_of(code, message, reason, {})


def _exactly(connected: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        more = connected.recv(size - len(received))
        if not more:
            raise ConnectionResetError("link: the engine went away")
        received += more
    return received
