"""What large messages took is given back."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from support.serving import Serving
from support.wire import Wire, append, keys_of, poll

MESSAGE_BYTES = 64 << 20
MESSAGES = 4
KEPT_BYTES = 48 << 20
"""Less than one of them."""


def own_bytes(server: Serving) -> int:
    """Private memory of all processes of a server."""
    return sum(
        1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text("ascii"))[0])
        for pid in server.pids()
    )


def test_memory_of_large_messages_is_given_back(server: Serving, tenant: Wire, random: np.random.Generator) -> None:
    request = append(0, [(404, 0, 1)], keys_of(random, 1))
    request.spans.lengths[0] = MESSAGE_BYTES // 256
    request.keys.data = bytes(MESSAGE_BYTES)
    before = own_bytes(server)
    for _ in range(MESSAGES):
        assert tenant.refusal(request).reason == "UNKNOWN_SEQUENCE"
    poll(lambda: own_bytes(server) - before < KEPT_BYTES)
