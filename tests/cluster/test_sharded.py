"""One sequence over several servers answers as one server does, ids and raw scores."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blockdex
from blockdex.cluster.merge import merge
from blockdex.cluster.sharded import Shard, ShardedSequence
from blockdex.contract.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    Reason,
)
from blockdex_kernels import IndexSpec
from support.serving import Serving, serve

IDS = itertools.count(1000)
FEW = ("--num-layers", "2", "--cache-bytes", "32MiB", "--device", "cpu")


@pytest.fixture(scope="module", params=["bf16", "fp8_e4m3"])
def clients(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[blockdex.Client]]:
    """Five clients, each with a tenant of its own, as five servers have; in fp8 more blocks are forced."""
    # Few places, so that each server has more blocks than it answers with.
    forced = {"sparse_init_block": 1, "sparse_local_block": 2} if request.param == "fp8_e4m3" else {}
    config = tmp_path_factory.mktemp("model") / "config.json"
    config.write_text(json.dumps({"sparse_attention_config": {"sparse_topk_blocks": 4, **forced}}))
    flags = [*FEW, "--key-dtype", request.param, "--model-config", str(config)]
    with ExitStack() as stack:
        serving = stack.enter_context(serve(*flags))
        yield [
            stack.enter_context(blockdex.Client(serving.grpc_address, tenant=f"shard-{number}")) for number in range(5)
        ]


def tied(random: np.random.Generator, count: int, *shape: int) -> np.ndarray:
    """Vectors of few values, so that scores tie, some of them NaN."""
    values = random.integers(-1, 2, (count, *shape, 128)).astype(np.float32)
    values[..., 4:] = 0
    values[random.random((count, *shape)) < 0.1] = np.nan
    return values.astype(ml_dtypes.bfloat16)


def plain(random: np.random.Generator, count: int, *shape: int) -> np.ndarray:
    return random.standard_normal((count, *shape, 128)).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("vectors", [tied, plain])
def test_as_one_server(clients: list[blockdex.Client], vectors: object, count: int) -> None:
    """Prefill chunks, drafts that are rolled back, single tokens: each answer is compared."""
    assert callable(vectors)
    random = np.random.default_rng(count)
    one, sequence = clients[4], next(IDS)
    many = ShardedSequence(clients[:count], sequence)
    one.open_sequence(sequence)
    many.open()
    length = 0
    for chunk in [700, 600, 8, 1, 130, *random.integers(1, 300, 3).tolist()]:
        start = max(0, length - int(random.integers(0, 500))) if random.random() < 0.4 else length
        keys, queries = vectors(random, chunk), vectors(random, chunk, 4)
        expected = one.append_and_select(
            0, sequences=sequence, starts=start, keys=keys, queries=queries, rollback=True, return_scores="raw"
        )
        got = many.append_and_select(0, keys, queries, start=None if start == length else start, return_scores="raw")
        length = start + chunk
        np.testing.assert_array_equal(got[0], expected[0])
        # On a CPU how a batch is cut may round a score otherwise.
        np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)
        last = vectors(random, 1, 4)
        scored = one.select_blocks(0, sequences=sequence, queries=last, order="score")
        np.testing.assert_array_equal(many.select_blocks(0, last, order="score"), scored)
        keys = vectors(random, 50)
        one.append_keys(0, sequences=sequence, keys=keys)
        many.append_keys(0, keys)
        length += 50
    cut = length - 333
    one.truncate_sequence(sequence, cut)
    many.truncate(cut)
    keys, queries = vectors(random, 3), vectors(random, 3, 4)
    expected = one.append_and_select(0, sequences=sequence, keys=keys, queries=queries)
    np.testing.assert_array_equal(many.append_and_select(0, keys, queries), expected)
    many.close()
    one.close_sequence(sequence)


def test_another_process_continues_and_torch_is_answered_in_kind(clients: list[blockdex.Client]) -> None:
    random, sequence = np.random.default_rng(5), next(IDS)
    first = ShardedSequence(clients[:3], sequence)
    first.open()
    first.append_keys(1, plain(random, 1000))
    second = ShardedSequence(clients[:3], sequence)
    keys, queries = plain(random, 2), plain(random, 2, 4)
    with pytest.raises(FailedPreconditionError, match="layer 1: length is not known, name the start"):
        second.append_keys(1, keys)
    got = second.append_and_select(1, torch.ones(2, 128), torch.from_numpy(queries.astype(np.float32)), start=1000)
    assert isinstance(got, torch.Tensor) and got.dtype == torch.int32 and got[0, 0, 3] == 7
    second.close()


def test_what_cannot_be(clients: list[blockdex.Client], server: Serving) -> None:
    random, sequence = np.random.default_rng(6), next(IDS)
    with pytest.raises(InvalidArgumentError, match="clients: there must be at least one, got 0"):
        ShardedSequence([], 1)
    with (
        blockdex.Client(server.grpc_address) as other,
        pytest.raises(InvalidArgumentError, match="server 1 has spec"),
    ):
        ShardedSequence([clients[0], other], 1)
    many = ShardedSequence(clients[:2], sequence)
    with pytest.raises(NotFoundError):
        many.append_keys(0, plain(random, 1), start=0)
    many.open()
    many.append_keys(0, plain(random, 600))
    with pytest.raises(OutOfRangeError, match="layer 0: append starts at 601, length is 600") as gap:
        many.append_keys(0, plain(random, 1), start=601)
    assert gap.value.reason == Reason.APPEND_BEYOND_LENGTH
    with pytest.raises(OutOfRangeError, match="queries from 400 on, server 0 has its last block from 512 on"):
        many.select_blocks(0, plain(random, 200, 4))
    with pytest.raises(OutOfRangeError, match="601 queries, length is 600"):
        many.select_blocks(0, plain(random, 601, 4))
    with pytest.raises(InvalidArgumentError, match="must be as many as the 1 keys, got 2"):
        many.append_and_select(0, plain(random, 1), plain(random, 2, 4))
    with pytest.raises(InvalidArgumentError, match="layer: must be 0 to 1, got 2"):
        many.append_keys(2, plain(random, 1))
    many.append_keys(0, plain(random, 1))
    many.close()


@given(st.data())
@settings(max_examples=200)
def test_candidates_merge_in_the_total_order(data: st.DataObject) -> None:
    """Against a sort of all blocks in plain Python, for any forced blocks, ties and scores that are not finite."""
    init, local = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    spec = IndexSpec(topk=8, init_blocks=init, local_blocks=local)
    servers, blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    score = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 1.0, 2.0])
    scores = data.draw(st.lists(score, min_size=blocks, max_size=blocks))

    def answer(ids: list[int], last: int) -> list[int]:
        forced = [b for b in ids if b < init] + [b for b in ids if b >= init and b > last - local]
        rest = sorted((b for b in ids if b not in forced), key=lambda b: (-scores[b], b))
        return (forced + rest)[:8]

    ids = np.full((servers, 1, 1, 8), -1, np.int32)
    raw = np.full((servers, 1, 1, 8), -np.inf, np.float32)
    for index in range(servers):
        kept = answer(list(range(index, blocks, servers)), blocks - 1)
        ids[index, 0, 0, : len(kept)] = kept
        raw[index, 0, 0, : len(kept)] = [scores[b] for b in kept]
    expected = answer(list(range(blocks)), blocks - 1)
    for order, wanted in (("score", expected), ("ascending", sorted(expected))):
        got, ranks = merge(ids, raw, np.array([blocks * 128 - 1]), spec, order)  # type: ignore[arg-type]
        assert got[0, 0].tolist() == wanted + [-1] * (8 - len(wanted))
        assert ranks[0, 0].tolist() == [scores[b] for b in wanted] + [-np.inf] * (8 - len(wanted))


@given(st.integers(1, 6), st.integers(0, 3000), st.integers(1, 3000))
def test_every_token_is_of_one_server_and_seen_by_all_that_began(count: int, start: int, length: int) -> None:
    owned = np.zeros(length, int)
    for shard in (Shard(index, count, 128) for index in range(count)):
        covered = 0
        for run in shard.runs(start, length):
            owned[run.first : run.first + run.own] += 1
            covered += run.last - run.first
            blocks = {(start + token) // 128 % count for token in range(run.first, run.first + run.own)}
            assert blocks <= {shard.index}
        assert covered == max(0, start + length - max(start, shard.index * 128))
    assert owned.tolist() == [1] * length
