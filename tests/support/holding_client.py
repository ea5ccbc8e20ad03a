"""A client whose calls wait for keys that do not come, each over a link of its own and in memory that it shares."""

from __future__ import annotations

import sys
import threading

import numpy as np

import blockdex


def main() -> None:
    address, count = sys.argv[1], int(sys.argv[2])
    client = blockdex.Client(address, tenant="holding", transport="ring", timeout=600)
    region = client.share(1 << 20)
    client.open_sequences(range(1, count + 1))

    def hold(sequence: int) -> None:
        queries, out = region.empty((1, 4, 128), np.float32), region.empty((1, 4, 16), np.int32)
        client.select_blocks(0, sequences=sequence, queries=queries, starts=0, wait_for_keys=True, out=out)

    for sequence in range(1, count + 1):
        threading.Thread(target=hold, args=(sequence,)).start()


if __name__ == "__main__":
    main()
