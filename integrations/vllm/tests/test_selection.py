"""Our kernels in vLLM's real indexer: every kind of batch selects what vLLM's own kernels and the reference do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.forward_context import set_forward_context
from vllm.models.minimax_m3.common import indexer
from vllm.v1.kv_cache_layout import KVCacheLayout

from blockdex_vllm.indexer import BlockdexIndexerImpl
from engine import BLOCK, Engine, config_of


@pytest.mark.parametrize(("dtype", "layout"), [("bf16", KVCacheLayout.BLHNC), ("fp8", KVCacheLayout.LBHNC)])
def test_random_batches(model_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, layout: KVCacheLayout) -> None:
    """Decodes, chunks of prefill, both mixed, preemption onto recycled pages, and prefix hits."""
    if dtype == "fp8":
        # On the CPU, vLLM's own choice would refuse e4m3, which the interpreter can do.
        monkeypatch.setattr(indexer, "select_indexer_impl_cls", lambda **options: BlockdexIndexerImpl)
    engine = Engine(config_of(model_dir), dtype=dtype, layout=layout)
    running = [engine.open(700), engine.open(130)]
    engine.step([(running[0], 1), (running[1], 1)])
    chunked = engine.fork(running[0])
    engine.step([(running[0], 1), (running[1], 1), (chunked, 9)])  # mixed: decodes lead
    engine.step([(running[0], 1), (chunked, 5)])
    engine.preempt(running[0])
    recycled = engine.open(500)  # on pages that hold another's keys behind its last one
    engine.step([(chunked, 1), (recycled, 1)])
    engine.step([(engine.open(0), 6)])
    assert engine.rows == 2 * 2 * (2 + 11 + 6 + 2 + 6)


@pytest.mark.parametrize(("drafts", "queries"), [(3, [4, 4, 4]), (9, [10, 2, 3]), (3, [1, 4, 9])])
def test_drafts_to_be_verified(model_dir: Path, drafts: int, queries: list[int]) -> None:
    """Uniform, as graphs capture them; uneven, with more rows than a tile has; beside a chunk of prefill."""
    engine = Engine(config_of(model_dir, drafts=drafts), seed=sum(queries))
    sequences = [engine.open(600 + 130 * number) for number in range(3)]
    engine.step(list(zip(sequences, queries, strict=True)))
    for sequence in sequences:
        sequence.length -= 1  # One draft is rejected: its key stays behind, and the next step writes over it.
    engine.step([(sequence, 1) for sequence in sequences])


def test_a_captured_size_is_replayed_for_fewer_requests(model_dir: Path) -> None:
    """What a graph reads keeps its addresses; 3 requests in a graph for 8 leave -1 in the rows of the others."""
    engine = Engine(config_of(model_dir))
    sequences = [engine.open(650) for _ in range(4)]
    (captured, _) = engine.step([(sequence, 1) for sequence in sequences], padded_to=8, pad_queries=1)
    (replayed, _) = engine.step([(sequence, 1) for sequence in sequences[:3]], padded_to=8, pad_queries=1)
    for one, other in zip(_decode_tensors(captured), _decode_tensors(replayed), strict=True):
        assert one.data_ptr() == other.data_ptr() and one.shape == other.shape
    assert (replayed.ours[3:] == -1).all()


def _decode_tensors(step: Any) -> list[torch.Tensor]:
    spans = step.metadata.batch.decode
    return [spans.layers, spans.starts, spans.lengths]


def test_a_row_in_the_middle_drops_out(model_dir: Path) -> None:
    """A graph is replayed with no tokens of its own for one row: that row has -1, its neighbours their answers."""
    engine = Engine(config_of(model_dir))
    sequences = [engine.open(620) for _ in range(3)]
    batch = [(sequence, 1) for sequence in sequences]
    common = engine.common(batch)
    common.seq_lens[1] = 0
    metadata = engine.builder.build(0, common)
    engine.write_keys(0, batch)
    queries = engine.queries(3)
    step = engine.forward(0, queries, metadata)
    assert (step.ours[1] == -1).all()
    assert step.theirs is not None and torch.equal(step.ours.sort(2).values, step.theirs.sort(2).values)
    for row in (0, 2):
        reference = engine.reference(0, sequences[row], queries[row : row + 1].view(1, 2, 128))
        assert torch.equal(step.ours[row], reference.block_ids[0])


def test_tokens_and_heads_of_the_same_number(model_dir: Path) -> None:
    """T = H = 4: a buffer of ids read heads first would pass every check of its shape."""
    sparse = {"sparse_num_index_heads": 4}
    engine = Engine(config_of(model_dir, sparse=sparse))
    sequences = [engine.open(590 + BLOCK * number) for number in range(4)]
    for step in engine.step([(sequence, 1) for sequence in sequences]):
        assert step.decode is not None and torch.equal(step.decode, step.ours.transpose(0, 1))
        assert not torch.equal(step.ours, step.ours.transpose(0, 1))


@pytest.mark.parametrize(("init", "local"), [(0, 0), (1, 2)])
def test_forced_blocks(model_dir: Path, init: int, local: int) -> None:
    """Without a forced last block, keys of an earlier owner behind the last position must not count."""
    sparse = {"sparse_init_block": init, "sparse_local_block": local}
    engine = Engine(config_of(model_dir, sparse=sparse), num_pages=14)
    engine.preempt(engine.open(14 * BLOCK))
    sequences = [engine.open(700), engine.open(100)]
    engine.step([(sequences[0], 1), (sequences[1], 1)])
    engine.step([(sequences[1], 1), (sequences[0], 4)])


def test_a_profiling_run_selects_nothing(model_dir: Path) -> None:
    engine = Engine(config_of(model_dir))
    with set_forward_context(None, engine.config, num_tokens=3):
        assert engine.layers[0](engine.queries(3)) == (None, None)


def test_without_a_buffer_the_ids_are_returned(model_dir: Path) -> None:
    """Draft layers of vLLM's have none."""
    engine = Engine(config_of(model_dir))
    sequence = engine.open(640)
    common = engine.common([(sequence, 1)])
    metadata = engine.builder.build(0, common)
    engine.write_keys(0, [(sequence, 1)])
    module, queries = engine.layers[0], engine.queries(1)
    expected = engine.forward(0, queries, metadata, beside_vllm=False).ours
    module.impl.topk_indices_buffer = None
    with set_forward_context({module.index_cache.prefix: metadata}, engine.config, num_tokens=1):
        decode, prefill = module(queries.to(engine.device))
    assert prefill is None and torch.equal(decode.transpose(0, 1).cpu(), expected)
