"""The client's way to a device channel: over the socket of a real server, whose device is a CPU here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from blockdex import AsyncClient, Client
from blockdex.contract.errors import FailedPreconditionError, OutOfRangeError
from blockdex.device_channel import channel as module
from support.channel_twins import launch_numpy
from support.serving import serve

LAYER = 1


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "launch", launch_numpy)


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize("processes", ["single", "split"])
def test_a_channel_of_a_client(processes: str) -> None:
    with serve(f"--processes={processes}") as server, Client(server.grpc_address, tenant="mine") as client:
        client.open_sequences([1, 2])
        keys, queries = torch.randn(2, 4, 128).bfloat16(), torch.randn(2, 4, 4, 128).bfloat16()
        channel = client.device_channel(device="cpu", max_tokens=8)
        ids = channel.append_and_select(
            LAYER, sequences=numbers(1, 2), starts=numbers(0, 0), lengths=numbers(4, 3), keys=keys, queries=queries
        )
        channel.check()
        sent = torch.cat((queries[0], queries[1, :3]))
        expected = client.select_blocks(LAYER, sequences=[1, 2], lengths=[4, 3], starts=[0, 0], queries=sent)
        assert torch.equal(torch.cat((ids[0], ids[1, :3])), torch.as_tensor(np.asarray(expected)))
        assert client.get_sequence(2).lengths[:3] == (0, 3, 0)
        channel.append_keys(
            LAYER, sequences=numbers(1, 2), starts=numbers(9, 9), lengths=numbers(1, 1), keys=keys[:, :1].contiguous()
        )
        with pytest.raises(OutOfRangeError, match="sequence 1, layer 1: append starts at 9, length is 4"):
            channel.check()
        client.reopen_channel(channel)
        channel.check()
        channel.close()
        with pytest.raises(FailedPreconditionError, match="channel: it is closed"):
            channel.check()


async def test_a_channel_of_an_asyncio_client() -> None:
    with serve("--processes=single") as server:
        async with AsyncClient(server.grpc_address, tenant="mine") as client:
            await client.open_sequence(1)
            channel = await client.device_channel(device="cpu", max_tokens=8, first_head=1, num_heads=2)
            asked: dict[str, Any] = {"sequences": numbers(1), "starts": numbers(0), "lengths": numbers(2)}
            keys, queries = torch.randn(1, 2, 128).bfloat16(), torch.randn(1, 2, 2, 128).bfloat16()
            ids = channel.append_and_select(LAYER, **asked, keys=keys, queries=queries)
            channel.check()
            assert ids[0, :, :, 0].tolist() == [[0, 0], [0, 0]]
            asked["starts"] = numbers(7)
            channel.append_keys(LAYER, **asked, keys=keys)
            with pytest.raises(OutOfRangeError, match="append starts at 7, length is 2"):
                channel.check()
            await client.reopen_channel(channel)
            channel.check()
            channel.close()
