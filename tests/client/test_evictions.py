"""Clients that stream hear of evictions, and say so before they send what can only be refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import blockdex
from support.clients import Flavour, Transport, connect
from support.processes import eventually
from support.serving import Serving, serve

PAGES, PAGE_BYTES = 8, 3 * 128 * 128 * 2
KEYS = np.ones((4 * 128, 128), np.float32)


@pytest.fixture(scope="module")
def short_of_pages() -> Iterator[Serving]:
    """A server of few pages, whose sequences are soon idle."""
    flags = ("--num-layers", "3", "--cache-bytes", str(PAGES * PAGE_BYTES), "--device", "cpu")
    with serve(*flags, "--lease-seconds", "0.2") as serving:
        yield serving


@pytest.mark.parametrize("kind", [blockdex.Client, blockdex.AsyncClient])
@pytest.mark.parametrize("transport", ["ring", "stream"])
def test_what_was_evicted_is_said_so(kind: type[Any], transport: Transport, short_of_pages: Serving) -> None:
    with connect(Flavour(kind, transport), short_of_pages.grpc_address, tenant="red") as client:
        client.open_sequences([1, 2, 3])
        for sequence in (1, 2):
            client.append_keys(0, sequences=sequence, keys=KEYS)

        def evicted() -> bool:
            """Whether the client has heard of it, while the server's own word would be another."""
            try:
                client.append_keys(0, sequences=3, keys=KEYS, starts=0, rollback=True)
                client.select_blocks(0, sequences=1, queries=np.ones((1, 4, 128), np.float32))
            except blockdex.ResourceExhaustedError:
                return False  # its lease is not over
            except blockdex.NotFoundError as error:
                return error.message == "sequence 1, layer 0: the server has evicted it"
            return False

        eventually(evicted, "it hears of it")
        with pytest.raises(blockdex.NotFoundError, match="unknown"):
            client.get_sequence(1)
        client.select_blocks(0, sequences=2, queries=np.ones((1, 4, 128), np.float32))
        client.close_sequences([1, 2, 3])
