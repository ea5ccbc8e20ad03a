"""Memory that clients share, opened for the device that an executor runs on."""

from __future__ import annotations

import functools

from blockdex.contract.errors import Reason, UnimplementedError
from blockdex.executor.interface import Executor
from blockdex.ring.regions import KINDS, Offer, Region, map_memfd, refused, unmap


def region_kinds(executor: Executor) -> tuple[str, ...]:
    """Kinds of memory that it takes."""
    return KINDS if executor.imports_memory else KINDS[:1]


def open_region(executor: Executor, offer: Offer) -> Region:
    """Opens what a client offers; on any thread, and it may take its time.

    Raises:
        InvalidArgumentError: it is not what it is said to be (INVALID_REGION).
        ResourceExhaustedError: it has more bytes than the link may share.
        UnimplementedError: the executor's device has no use for it (REGION_UNSUPPORTED).
    """
    if offer.kind == "memfd":
        return _open_memfd(executor, offer)
    if not executor.imports_memory:
        raise UnimplementedError(
            f"{offer.kind}: is for a server on a GPU, this one is on {executor.backend.device}",
            Reason.REGION_UNSUPPORTED,
        )
    if offer.kind == "cuda_fd":
        offer.check_bytes(offer.num_bytes)
    try:
        address, num_bytes, close = executor.import_memory(offer.fd, offer.num_bytes, offer.handle, offer.device)
    except RuntimeError as error:
        raise refused(f"{offer.kind}: {error}") from None
    region = Region(address, num_bytes, True, close)
    offer.check_bytes(num_bytes)
    return region


def _open_memfd(executor: Executor, offer: Offer) -> Region:
    address, num_bytes = map_memfd(offer)
    close = functools.partial(unmap, address, num_bytes)
    try:
        unpin = executor.pin(address, num_bytes)
    except RuntimeError as error:
        close()
        raise refused(f"memfd: {error}") from None

    def unpin_and_close() -> None:
        try:
            unpin()
        finally:
            close()

    return Region(address, num_bytes, False, unpin_and_close)
