"""Tensor-parallel ranks of one head each, processes with a device channel each: all layers in one CUDA graph.

The first one appends, the others name its revision and wait for its keys. Before each layer all of them meet on the
device, as ranks do that reduce over it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
import triton
import triton.language as tl

from benchmarks.colocated.channel import capture, columns, milliseconds, on_device
from benchmarks.colocated.decode import Decode
from benchmarks.colocated.settings import FIRST_ID, TENANT, Settings
from blockdex import Client
from blockdex.device_channel.kernels import load_acquire, now

RANKS, STEPS, WARM_UP = 4, 100, 20
_BOUND_SECONDS, _START_SECONDS = 15, 40
"""Longest that kernels wait for others, who may still compile theirs; and that a process takes to begin."""
_SPAWN = torch.multiprocessing.get_context("spawn")


@triton.jit(do_not_specialize=["arrived", "meetings", "everyone", "bound"])
def meet(arrived, meetings, everyone, bound):  # type: ignore[no-untyped-def]
    """Waits until all ranks have come here as often as this one, or for so many nanoseconds.

    Args:
        arrived: address of an int64 that all ranks share.
        meetings: address of this rank's own.
        everyone: how many there are.
        bound: nanoseconds.
    """
    own = meetings.to(tl.pointer_type(tl.int64))
    count = tl.load(own) + 1
    tl.store(own, count)
    tl.atomic_add(arrived.to(tl.pointer_type(tl.int64)), 1, sem="acq_rel", scope="sys")
    begin = now()
    while (load_acquire(arrived) < count * everyone) & (now() - begin < bound):
        pass


class Rank:
    """One of them, its graph captured.

    Args:
        number: which head it has.
        settings: of the run.
        arrived: int64 `[1]` on the device, that all share.
        revision: below those of the appends to come.
        barrier: that all pass together.
    """

    def __init__(self, number: int, settings: Settings, arrived: torch.Tensor, revision: int, barrier: Any) -> None:
        device = settings.engine_device
        torch.cuda.set_device(device)
        self._client = Client(settings.grpc, transport="ring", tenant=TENANT, timeout=20)
        spec = self._client.info().spec
        decode = Decode.read(Path(settings.folder) / f"{FIRST_ID}.bin", spec, settings.sequences)
        self._channel = self._client.device_channel(
            device=device,
            max_tokens=settings.sequences,
            first_head=number,
            num_heads=1,
            bound_seconds=_BOUND_SECONDS,
        )
        head = slice(number, number + 1)
        keys = on_device(decode.keys, device)[:, :, None]
        queries = on_device(decode.queries, device)[:, :, None, head].contiguous()
        self._expected = on_device(decode.block_ids, device)[:, :, None, head].contiguous()
        self._ids = torch.zeros_like(self._expected)
        shared, own = arrived.data_ptr(), torch.zeros(1, dtype=torch.int64, device=device)
        self._replays = torch.zeros(1, dtype=torch.int64, device=device)
        asked = columns(settings)
        asked |= {"revisions": torch.full_like(asked["starts"], revision), "replays": self._replays}

        def run() -> None:
            self._replays.add_(1)
            for layer in range(settings.layers):
                meet[(1,)](shared, own.data_ptr(), RANKS, int(1e9 * _BOUND_SECONDS), num_warps=1)
                out: dict[str, Any] = {"queries": queries[layer], "out": self._ids[layer]}
                if number == 0:
                    self._channel.append_and_select(layer, **asked, **out, keys=keys[layer])
                else:
                    self._channel.select_blocks(layer, **asked, **out, wait_for_keys=True)

        self._own = own  # as long as the graph
        barrier.wait(_START_SECONDS)
        self._graph = capture(run)

    def step(self) -> float:
        """Milliseconds of a replay."""
        return milliseconds(self._graph)

    def check(self) -> None:
        """Every answer of one more replay is that of a plain selection."""
        self._ids.fill_(-2)
        self.step()
        self._channel.check()
        if not torch.equal(self._ids, self._expected):
            raise AssertionError("block ids differ from a plain selection's")

    def close(self) -> None:
        """Ends its channel."""
        self._channel.close()
        self._client.close()


def run_rank(number: int, settings: Settings, arrived: torch.Tensor, revision: int, barrier: Any, told: Any) -> None:
    """A process: it tells how long its steps took."""
    try:
        rank = Rank(number, settings, arrived, revision, barrier)
        steps = []
        for step in range(WARM_UP + STEPS):
            barrier.wait(_START_SECONDS)
            took = rank.step()
            if step >= WARM_UP:
                steps.append(took)
        rank.check()
        rank.close()
        told.put(steps)
    except BaseException as error:
        barrier.abort()
        told.put(f"rank {number}: {type(error).__name__}: {error}")
        raise


def main() -> None:
    """Prints the numbers of all ranks' steps."""
    settings = Settings.of_command_line()
    arrived = torch.zeros(1, dtype=torch.int64, device=settings.engine_device)
    torch.cuda.synchronize()
    with Client(settings.grpc, transport="ring", tenant=TENANT, timeout=20) as client:
        revision = max(client.get_sequence(FIRST_ID).revisions)
    barrier, told = _SPAWN.Barrier(RANKS), _SPAWN.Queue()
    arguments = (settings, arrived, revision, barrier, told)
    ranks = [_SPAWN.Process(target=run_rank, args=(number, *arguments), daemon=True) for number in range(RANKS)]
    for rank in ranks:
        rank.start()
    steps = [told.get(timeout=_START_SECONDS) for _ in ranks]
    for rank in ranks:
        rank.join(_START_SECONDS)
    if failures := [said for said in steps if isinstance(said, str)]:
        raise SystemExit("; ".join(failures))
    p50, p99 = np.percentile(np.concatenate(steps), (50, 99))
    print(json.dumps({"step_p50_ms": p50, "step_p99_ms": p99}), flush=True)
    os._exit(0)  # what was shared with processes that are gone is not waited for


if __name__ == "__main__":
    main()
