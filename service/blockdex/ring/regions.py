"""Memory that a client shares beside its segment: handed over, opened, numbered, given back.

A region belongs to one link. It is closed when nobody holds it any more: neither its link, nor a request on its way,
nor anything that reads or writes it on a device.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import functools
import logging
import mmap
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from blockdex.contract.errors import BlockdexError, InvalidArgumentError, Reason, ResourceExhaustedError
from blockdex.contract.messages import Limits
from blockdex.logs import log_fault
from blockdex.ring.control_channel import Words
from blockdex.ring.server import RingInbox, ServerLink

logger = logging.getLogger(__name__)

T = TypeVar("T")

KINDS = ("memfd", "cuda_fd", "cuda_ipc")
"""Of memory: what of the host's is shared may be pinned, and cannot be swapped out then; the others are a GPU's."""
_RELEASE_SECONDS = 4.0
"""How long a client that gives a region back is kept waiting for the requests that use it."""
_ENTER_SECONDS = 4.0
_HANDLE_BYTES = 64

_opener = ThreadPoolExecutor(1, "blockdex-regions")
"""Opens: what is registered with a device takes its time, and so does what closes it."""
_to_close: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
"""Regions that nobody holds. Finalizers put them there, which run wherever the collector does, in the middle of
anything that takes a lock: of all queues this one may be written to then."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_ssize_t,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a client wants to share.

    Attributes:
        kind: `memfd`, `cuda_fd` (of CUDA's virtual memory management) or `cuda_ipc` (memory of cudaMalloc).
        fd: of the first two: the file, which stays the caller's.
        num_bytes: of `cuda_fd`: how many it has.
        handle: of `cuda_ipc`: the 64 bytes that stand for it.
        device: of the last two: UUID of the GPU whose memory it is, 32 hexadecimal digits.
        most_bytes: that it may have.
        most_of: of how many, and whose, these are what is left.
    """

    kind: str
    fd: int
    num_bytes: int
    handle: bytes
    device: str
    most_bytes: int
    most_of: str

    def check_bytes(self, num_bytes: int) -> None:
        """Refuses what is empty, or more than the link may share.

        Raises:
            InvalidArgumentError: there are none.
            ResourceExhaustedError: there are too many.
        """
        if num_bytes < 1:
            raise refused(f"{self.kind}: must have at least 1 byte, got {num_bytes}")
        if num_bytes > self.most_bytes:
            raise ResourceExhaustedError(
                f"{self.kind}: {num_bytes} bytes, {self.most_bytes} more may be shared of {self.most_of}",
                Reason.OVERLOADED,
                bytes=num_bytes,
            )


class Region:
    """Shared memory that this process has opened. Whoever looks at it holds it; the last one closes it.

    Args:
        address: where it begins, for the host or for the device.
        num_bytes: of it.
        on_device: whether the address is the device's.
        close: gives it back; called beside all other threads.

    Attributes:
        address, bytes, on_device: the same.
        closed: done when it is closed.
    """

    def __init__(self, address: int, num_bytes: int, on_device: bool, close: Callable[[], None]) -> None:
        self.address = address
        self.bytes = num_bytes
        self.on_device = on_device
        self.closed: Future[None] = Future()
        _start_closing()
        weakref.finalize(self, _to_close.put, (close, self.closed)).atexit = False
        interface = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        # What numpy, or torch, makes an array of, which holds the region.
        setattr(self, "__cuda_array_interface__" if on_device else "__array_interface__", interface)


@functools.cache
def _start_closing() -> None:
    threading.Thread(target=_close_all, name="blockdex-regions-close", daemon=True).start()


def _close_all() -> None:
    while True:
        close, closed = _to_close.get()
        try:
            close()
        except Exception as error:
            log_fault(logger, "shared memory cannot be given back", error)
        closed.set_result(None)


def refused(message: str) -> InvalidArgumentError:
    """What is said of memory that cannot be shared."""
    return InvalidArgumentError(message, Reason.INVALID_REGION)


def map_memfd(offer: Offer) -> tuple[int, int]:
    """Maps a memfd that its owner cannot shrink; address and bytes.

    Raises:
        InvalidArgumentError: it is none, can be shrunk, cannot be written to, or has no bytes.
        ResourceExhaustedError: it is too large, or there is no memory left.
    """
    try:
        seals = fcntl.fcntl(offer.fd, fcntl.F_GET_SEALS)
    except OSError:
        raise refused("memfd: the file is none, it cannot be sealed") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise refused(f"memfd: must be sealed against shrinking (F_SEAL_SHRINK), its seals are {seals:#x}")
    if (page := os.fstatvfs(offer.fd).f_bsize) != mmap.PAGESIZE:
        # There may be none left of these when one is touched, which ends the process.
        raise refused(f"memfd: must have pages of {mmap.PAGESIZE} bytes, got {page}")
    size = os.fstat(offer.fd).st_size
    offer.check_bytes(size)
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, offer.fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise refused(f"memfd: cannot be mapped to be read and written ({os.strerror(ctypes.get_errno())})")
    return address, size


def unmap(address: int, num_bytes: int) -> None:
    """Gives back what `map_memfd` has mapped."""
    _libc.munmap(address, num_bytes)


@dataclass(slots=True)
class _Lent:
    bytes: int
    closed: Future[None]
    given_back: bool = False


class LinkRegions:
    """The regions of one link, as they are spoken of on its control channel; used on its asyncio loop.

    Args:
        open_region: opens what is offered, on any thread; raises what `map_memfd` does, and UnimplementedError.
        inbox: has the engine's thread enter and leave regions.
        link: whose they are.
        limits: how many, and how many bytes, it may share.
    """

    def __init__(
        self, open_region: Callable[[Offer], Region], inbox: RingInbox, link: ServerLink, limits: Limits
    ) -> None:
        self._limits = limits
        self._open = open_region
        self._inbox = inbox
        self._link = link
        self._lent: dict[int, _Lent] = {}

    async def reply_to(self, words: Words, files: Sequence[int]) -> Words | None:
        """What is said to a client that shares memory, or gives it back; None to words of something else.

        Args:
            words: the client's.
            files: that came with them; they stay the caller's.
        """
        try:
            match words:
                case {"share": kind}:
                    return {"answer": await self._share(kind, words, files)}
                case {"release": region}:
                    await self._release(region)
                    return {"answer": {}}
        except BlockdexError as error:
            return {"failed": error.message, "reason": error.reason, "code": error.code}
        return None

    async def _share(self, kind: object, words: Words, files: Sequence[int]) -> Words:
        if len(self._lent) >= self._limits.max_link_regions:
            raise ResourceExhaustedError(
                f"regions: a link may share {self._limits.max_link_regions} at once, it shares {len(self._lent)}",
                Reason.OVERLOADED,
            )
        offer = offer_of(kind, words, files, *self._room())
        region = await open_offer(self._open, offer)
        # Another link may have shared more meanwhile.
        most_bytes, most_of = self._room()
        replace(offer, most_bytes=most_bytes, most_of=most_of).check_bytes(region.bytes)
        number = await self._on_engine(lambda: self._link.native.share(region))
        self._lent[number] = _Lent(region.bytes, region.closed)
        self._inbox.counts.regions += 1
        self._inbox.counts.region_bytes += region.bytes
        return {"region": number, "bytes": region.bytes}

    def _room(self) -> tuple[int, str]:
        """Bytes that may be shared now, and of what they are left."""
        own = self._limits.max_link_region_bytes - sum(lent.bytes for lent in self._lent.values())
        all_links = self._limits.max_region_bytes - self._inbox.counts.region_bytes
        if own <= all_links:
            return own, f"the {self._limits.max_link_region_bytes} of a link"
        return all_links, f"the {self._limits.max_region_bytes} of all links"

    async def _release(self, number: object) -> None:
        if not isinstance(number, int) or (lent := self._lent.get(number)) is None:
            raise refused(f"release: the link has no region {number!r}")
        if not lent.given_back:
            await self._on_engine(lambda: self._inbox.give_back(self._link, number))
            lent.given_back = True
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(lent.closed)), _RELEASE_SECONDS)
        except TimeoutError:
            raise ResourceExhaustedError(
                f"release: requests have used region {number} for {_RELEASE_SECONDS:g} s more; ask again",
                Reason.OVERLOADED,
            ) from None
        self._forget(number)

    def drop(self) -> None:
        """The link is over, and its regions with it."""
        for number in list(self._lent):
            self._forget(number)

    def _forget(self, number: int) -> None:
        self._inbox.counts.regions -= 1
        self._inbox.counts.region_bytes -= self._lent.pop(number).bytes

    async def _on_engine(self, errand: Callable[[], T]) -> T:
        """Has the engine's thread do something between its steps."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._inbox.ask(errand)), _ENTER_SECONDS)
        except ValueError as error:
            raise ResourceExhaustedError(str(error), Reason.OVERLOADED) from None
        except TimeoutError:
            message = f"engine: has not turned to a region for {_ENTER_SECONDS:g} s"
            raise ResourceExhaustedError(message, Reason.OVERLOADED) from None


async def open_offer(open_region: Callable[[Offer], Region], offer: Offer) -> Region:
    """Opens what is offered, beside all other threads; raises what `LinkRegions` says."""
    return await asyncio.get_running_loop().run_in_executor(_opener, open_region, offer)


def offer_of(kind: object, words: Words, files: Sequence[int], most_bytes: int, most_of: str) -> Offer:
    """What words and the files with them offer.

    Raises:
        InvalidArgumentError: nothing that can be.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise refused(f"share: must be memfd, cuda_fd or cuda_ipc, got {kind!r}")
    takes = 0 if kind == "cuda_ipc" else 1
    if len(files) != takes:
        raise refused(f"{kind}: {takes} files must come with it, got {len(files)}")
    num_bytes, handle, device = words.get("bytes", 0), words.get("handle", ""), words.get("device", "")
    if not isinstance(num_bytes, int) or not 0 <= num_bytes < 1 << 63:
        raise refused(f"{kind}: bytes must be below {1 << 63}, got {num_bytes!r}")
    try:
        handle_bytes, uuid = bytes.fromhex(handle), bytes.fromhex(device).hex()
    except (TypeError, ValueError):
        raise refused(f"{kind}: handle and device must be hexadecimal digits") from None
    if kind == "cuda_ipc" and len(handle_bytes) != _HANDLE_BYTES:
        raise refused(f"cuda_ipc: handle must have {_HANDLE_BYTES} bytes, got {len(handle_bytes)}")
    return Offer(kind, files[0] if files else -1, num_bytes, handle_bytes, uuid, most_bytes, most_of)
