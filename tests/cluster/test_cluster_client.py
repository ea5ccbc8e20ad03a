"""Clients of a cluster on real servers: batches, forks, members that come, go and die."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import blockdex
from blockdex.cluster import AsyncClusterClient, ClusterClient, FileDirectory, StaticDirectory, View
from blockdex.cluster.views import Member
from blockdex.contract.errors import (
    BlockdexError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from support.clusters import MEMBER
from support.serving import Serving, serve

COUNTER = itertools.count(1)
SECONDS = 20.0


class Views:
    """A directory whose views a test changes."""

    def __init__(self, *views: View) -> None:
        self.told = views

    def views(self) -> tuple[View, ...]:
        return self.told


def members(servers: list[Serving]) -> dict[str, str]:
    return {f"m{number}": server.grpc_address for number, server in enumerate(servers)}


@pytest.fixture
def tenant() -> str:
    return f"cluster-{next(COUNTER)}"


@pytest.fixture
def cluster(servers: list[Serving], tenant: str) -> Iterator[ClusterClient]:
    with ClusterClient(StaticDirectory(members(servers)), tenant=tenant) as client:
        yield client


def rows(random: np.random.Generator, count: int, *shape: int) -> Any:
    return random.standard_normal((count, *shape, 128)).astype(np.float32)


@pytest.mark.parametrize("kind", ["numpy", "bf16", "torch", "torch fp8"])
def test_a_batch_is_answered_as_one_server_would(
    cluster: ClusterClient, server: Serving, random: np.random.Generator, tenant: str, kind: str
) -> None:
    ids = list(range(1, 25))
    lengths = [int(each) for each in random.integers(1, 400, len(ids))]
    keys, queries = rows(random, sum(lengths)), rows(random, len(ids), 4)
    if kind == "bf16":
        keys, queries = keys.astype(ml_dtypes.bfloat16), queries.astype(ml_dtypes.bfloat16)
    if kind.startswith("torch"):
        keys, queries = torch.from_numpy(keys), torch.from_numpy(queries)
    if kind == "torch fp8":
        keys, queries = keys.to(torch.float8_e4m3fn), queries.to(torch.float8_e4m3fn)
    ones = [1] * len(ids)
    with blockdex.Client(server.grpc_address, tenant=tenant) as one:
        answers = []
        for client in (one, cluster):
            client.open_sequences(ids)
            client.append_keys(0, sequences=ids, lengths=lengths, keys=keys)
            starts = [length - 1 for length in lengths]
            bare = client.select_blocks(0, sequences=ids, lengths=ones, queries=queries)
            pair = client.select_blocks(
                0, sequences=ids, lengths=ones, starts=starts, queries=queries, return_scores=True, order="score"
            )
            answers.append((bare, *pair))
            client.close_sequences(ids)
        one.open_sequences(ids)
        one.close_sequences(ids)
    assert len({cluster.owner(each) for each in ids}) == 3
    for expected, got in zip(*answers, strict=True):
        assert type(got) is type(expected) and got.dtype == expected.dtype
        assert np.array_equal(np.asarray(got), np.asarray(expected))


def test_forks_are_beside_their_parents_for_any_client(
    cluster: ClusterClient, servers: list[Serving], tenant: str
) -> None:
    keys = np.ones((300, 128), np.float32)
    cluster.open_sequences(range(100, 110))
    for parent in range(100, 110):
        cluster.append_keys(0, sequences=parent, keys=keys)
        cluster.append_keys(1, sequences=parent, keys=keys)
        assert cluster.fork_sequence(parent, parent + 100, 200) == (200, 200)
        assert cluster.fork_sequence(parent + 100, parent + 200, 100) == (100, 100)
    with ClusterClient(StaticDirectory(members(servers)), tenant=tenant) as other:
        for parent in range(100, 110):
            assert other.get_sequence(parent + 200, root_id=parent).lengths == (100, 100)
            other.append_keys(0, sequences=[parent + 200], lengths=[1], keys=keys[:1], root_id=[parent])
        assert other.truncate_sequence(300, 50, root_id=100) == (50, 50)
    with ClusterClient(StaticDirectory(members(servers)), tenant=tenant) as third:
        astray = next(parent for parent in range(100, 110) if third.owner(parent) != third.owner(parent + 100))
        with pytest.raises(NotFoundError) as refused:  # without its root, it is looked for where it would be a root
            third.get_sequence(astray + 100)
        assert refused.value.reason == Reason.UNKNOWN_SEQUENCE
    everything = [*range(100, 110), *range(200, 210), *range(300, 310)]
    cluster.close_sequences(everything)
    cluster.close_sequences(everything)


def test_a_member_that_joins_gets_new_roots_and_old_ones_are_found(servers: list[Serving], tenant: str) -> None:
    old = View(1, tuple(Member(name, address) for name, address in list(members(servers).items())[:2]))
    new = View(2, tuple(Member(name, address) for name, address in members(servers).items()))
    keys = np.ones((3, 128), np.float32)
    directory = Views(old)
    ids = list(range(1, 31))
    with ClusterClient(directory, tenant=tenant, interval=0.02) as early:
        early.open_sequences(ids)
        early.append_keys(0, sequences=ids, lengths=[3] * 30, keys=np.tile(keys, (30, 1)))
        places = {each: early.owner(each) for each in ids}
        directory.told = (new, old)
        wait_for(lambda: len(early.members) == 3)
        moved = [each for each in ids if early.owner(each) != places[each]]
        assert moved and all(early.owner(each) == "m2" for each in moved)
        with ClusterClient(Views(new, old), tenant=tenant) as late:
            for client in (early, late):
                for each in ids:
                    assert client.get_sequence(each).lengths == (3, 0)
            with pytest.raises(NotFoundError):
                late.get_sequence(99)
            late.open_sequences(range(101, 131))
            on_third = [each for each in range(101, 131) if late.owner(each) == "m2"]
            assert on_third
            for each in on_third:
                assert late.member("m2").get_sequence(each).lengths == (0, 0)
            late.close_sequences([*ids, *range(101, 131)])


def test_what_a_cluster_cannot_do(cluster: ClusterClient) -> None:
    with pytest.raises(UnavailableError, match="member m9: is not in the cluster"):
        cluster.member("m9")
    keys = np.ones((4, 128), np.float32)
    cluster.open_sequences(range(1, 5))
    for wrong in ({"lengths": [1, 1, 2]}, {}, {"lengths": [1] * 4, "starts": [0, 0]}):
        with pytest.raises(InvalidArgumentError) as refused:
            cluster.append_keys(0, sequences=range(1, 5), keys=keys, **wrong)
        assert refused.value.reason == Reason.INVALID_SPANS
    with pytest.raises(InvalidArgumentError, match="root_ids: one for each of 4 sequences, got 2"):
        cluster.append_keys(0, sequences=range(1, 5), lengths=[1] * 4, keys=keys, root_id=[1, 2])
    with pytest.raises(InvalidArgumentError):
        cluster.append_keys(7, sequences=range(1, 5), lengths=[1] * 4, keys=keys)
    with pytest.raises(FailedPreconditionError) as mismatch:
        cluster.get_sequence(1, epoch=1)
    assert mismatch.value.reason == Reason.EPOCH_MISMATCH
    assert all(cluster.get_sequence(each).lengths == (0, 0) for each in range(1, 5))
    assert {info.device for info in cluster.info().values() if not isinstance(info, BlockdexError)} == {"cpu"}


def wait_for(condition: Any) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_member_that_dies_takes_nobody_with_it(servers: list[Serving], tenant: str) -> None:
    keys = np.ones((30, 128), np.float32)
    ids = list(range(1, 31))
    with serve(*MEMBER) as victim:
        addresses = {**members(servers[:2]), "victim": victim.grpc_address}
        directory = Views(View(1, tuple(Member(name, address) for name, address in addresses.items())))
        with ClusterClient(directory, tenant=tenant, timeout=5, interval=0.02) as client:
            client.open_sequences(ids)
            lost = [each for each in ids if client.owner(each) == "victim"]
            kept = [each for each in ids if each not in lost]
            victim.process.kill()
            victim.process.wait()
            with pytest.raises(UnavailableError) as failed:
                client.append_keys(0, sequences=ids, lengths=[1] * 30, keys=keys)
            assert failed.value.metadata["member"] == "victim"
            assert failed.value.metadata["failed"] == ",".join(map(str, lost))
            assert failed.value.metadata["done"] == ",".join(map(str, kept))
            assert all(client.get_sequence(each).lengths == (1, 0) for each in kept)
            client.append_keys(0, sequences=kept, lengths=[1] * len(kept), keys=keys[: len(kept)])
            port = victim.grpc_address
            with serve(*MEMBER, "--grpc-address", port):  # it comes back, and has lost its cache
                with pytest.raises(NotFoundError) as unknown:
                    client.get_sequence(lost[0])
                assert unknown.value.reason == Reason.UNKNOWN_SEQUENCE
                client.open_sequences(lost)
                client.append_keys(0, sequences=lost, lengths=[1] * len(lost), keys=keys[: len(lost)])
            directory.told = (View(2, directory.told[0].members[:2]), *directory.told)
            wait_for(lambda: len(client.members) == 2)
            with pytest.raises(NotFoundError):  # it has left for good
                client.get_sequence(lost[0])
            client.open_sequences(lost)
            client.close_sequences(ids)


async def test_asyncio(servers: list[Serving], tenant: str, random: np.random.Generator) -> None:
    keys, queries = rows(random, 10), rows(random, 10, 4)
    async with AsyncClusterClient(StaticDirectory(members(servers)), tenant=tenant) as client:
        assert client.members == ("m0", "m1", "m2") and not client.problem and client.owner(1) in client.members
        await client.open_sequences(range(1, 11))
        await client.open_sequence(77)
        await client.append_keys(0, sequences=range(1, 11), lengths=[1] * 10, keys=keys)
        got = await client.append_and_select(0, sequences=range(1, 11), lengths=[1] * 10, keys=keys, queries=queries)
        assert np.array_equal(got[..., 0], np.zeros((10, 4))) and np.all(got[..., 1:] == -1)
        again = await client.select_blocks(0, sequences=range(1, 11), lengths=[1] * 10, queries=queries)
        assert np.array_equal(again, got)
        assert await client.fork_sequence(1, 20, 1) == (1, 0)
        assert await client.truncate_sequence(20, 0) == (0, 0)
        assert (await client.get_sequence(20)).lengths == (0, 0)
        assert set(await client.info()) == {"m0", "m1", "m2"}
        await client.close_sequence(20)
        await client.close_sequences([77, *range(1, 11)])


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ClusterClient(FileDirectory(tmp_path / "none"))
