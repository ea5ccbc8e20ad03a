"""A small engine round vLLM's real indexer: its configuration, layers, builders, metadata and caches.

Only what feeds them is ours: sequences, a pool of pages, and torch code in place of the fused kernel that writes index
keys into their slots. Pages start as NaN, are handed out in random order, and keep what an earlier owner left.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.forward_context import set_forward_context
from vllm.models.minimax_m3.common.indexer import MiniMaxM3Indexer
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheTensor, create_kv_cache_views
from vllm.v1.kv_cache_layout import KVCacheLayout

from blockdex_kernels.reference import Reference, count_flips, select
from blockdex_vllm.indexer import BlockdexIndexerImpl, BlockdexIndexerMetadata
from blockdex_vllm.verification import vllm_selection
from support.triton_device import DEVICE

BLOCK = 128
UNUSED = -1
"""What a block table holds where a request has no block."""


@dataclass
class Request:
    """One request: all its keys, whose pages they are in, and how many of them have been computed."""

    keys: torch.Tensor
    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class Step:
    """What one forward of one layer answered.

    Attributes:
        ours: int32 `[T, H, topk]`, vLLM's buffer after our forward.
        theirs: the same from vLLM's own kernels, which the interpreter takes seconds for; None where not asked for.
        decode: a copy of what forward returned for the decodes, or None.
        prefill: and for the rest.
        metadata: of the step.
    """

    ours: torch.Tensor
    theirs: torch.Tensor | None
    decode: torch.Tensor | None
    prefill: torch.Tensor | None
    metadata: BlockdexIndexerMetadata


def config_of(
    folder: Path, *, sparse: dict[str, Any] | None = None, drafts: int = 0, additional: dict[str, Any] | None = None
) -> VllmConfig:
    """vLLM's configuration for a MiniMax-M3 of few layers, on the CPU.

    Args:
        folder: gets its config.json.
        sparse: fields of its `sparse_attention_config` that differ.
        drafts: speculative tokens.
        additional: `--additional-config`.
    """
    fields = {
        "sparse_num_index_heads": 2,
        "sparse_index_dim": 128,
        "sparse_block_size": BLOCK,
        "sparse_topk_blocks": 4,
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_score_type": "max",
        "sparse_attention_freq": [0, 1, 1],
    }
    text = {
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_attention_heads": 8,
        "sparse_attention_config": fields | (sparse or {}),
        "max_position_embeddings": 16384,
        "dtype": "bfloat16",
    }
    architecture = "MiniMaxM3SparseForConditionalGeneration"
    config = {"model_type": "minimax_m3_vl", "architectures": [architecture], "text_config": text, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, max_model_len=4096, dtype="bfloat16")
    parallel = ParallelConfig()
    speculative = None
    if drafts:
        speculative = SpeculativeConfig(
            method="ngram", num_speculative_tokens=drafts, target_model_config=model, target_parallel_config=parallel
        )
    return VllmConfig(
        model_config=model,
        cache_config=CacheConfig(block_size=BLOCK),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=4096, max_num_seqs=64, max_model_len=4096, is_encoder_decoder=False
        ),
        parallel_config=parallel,
        device_config=DeviceConfig(DEVICE.type),
        speculative_config=speculative,
        additional_config=additional or {},
    )


def build_layers(config: VllmConfig, dtype: str = "bf16", **changed: Any) -> list[MiniMaxM3Indexer]:
    """The indexers of a model's sparse layers, as its attention layers make them, which share a buffer of ids."""
    text = config.model_config.hf_text_config
    sparse = text.sparse_attention_config
    heads, topk = sparse["sparse_num_index_heads"], sparse["sparse_topk_blocks"]
    options = {
        "num_kv_heads": heads,
        "scale": 1.0,
        "topk_blocks": topk,
        "sparse_block_size": sparse["sparse_block_size"],
        "num_index_heads": heads,
        "index_head_dim": sparse["sparse_index_dim"],
        "init_blocks": sparse["sparse_init_block"],
        "local_blocks": sparse["sparse_local_block"],
        "score_type": sparse["sparse_score_type"],
        "indexer_kv_dtype": dtype,
        "topk_indices_buffer": torch.full((4096, heads, topk), -7, dtype=torch.int32, device=device_of(config)),
    }
    freq = sparse["sparse_attention_freq"]
    names = [f"model.layers.{number}.self_attn.attn" for number, sparse_layer in enumerate(freq) if sparse_layer]
    with set_current_vllm_config(config):
        return [MiniMaxM3Indexer(prefix=name, **(options | changed)) for name in names]


def device_of(config: VllmConfig) -> torch.device:
    """Where the configuration has its tensors."""
    return torch.device(config.device_config.device)


class Engine:
    """Layers of one model over one pool of pages.

    Args:
        config: vLLM's.
        dtype: of the index cache, `bf16` or `fp8`.
        layout: how vLLM lays layers and blocks out; not each is dense from page to page.
        num_pages: of the pool.
        seed: of everything random.
    """

    def __init__(
        self,
        config: VllmConfig,
        *,
        dtype: str = "bf16",
        layout: KVCacheLayout = KVCacheLayout.LBHNC,
        num_pages: int = 40,
        seed: int = 0,
    ) -> None:
        self.config, self.device = config, device_of(config)
        self.generator = torch.Generator().manual_seed(seed)
        self.layers = build_layers(config, dtype)
        caches = [layer.index_cache for layer in self.layers]
        names = [cache.prefix for cache in caches]
        spec = caches[0].get_kv_cache_spec(config)
        page = spec.page_size_bytes
        # Layers inside a block lie among others' pages, here as many again.
        strides = (page * num_pages, page) if layout.is_layer_compact else (page, 2 * page * len(caches))
        size = 2 * page * len(caches) * num_pages
        raw = torch.full((size,), -1, dtype=torch.int8, device=self.device)  # NaN in either dtype
        tensor = KVCacheTensor(size, names, *strides)
        for cache, view in zip(caches, create_kv_cache_views(raw, spec, num_pages, layout, tensor), strict=True):
            cache.bind_kv_cache(view)
        builder = self.layers[0].impl.indexer_backend_cls.get_builder_cls()
        with set_current_vllm_config(config):
            self.builder = builder(spec, names, config, self.device)
        self.free = torch.randperm(num_pages, generator=self.generator).tolist()
        self.users: Counter[int] = Counter()
        self.rows = 0
        self.flips = 0

    def open(self, computed: int) -> Request:
        """A request of which so many tokens have been computed, all layers' keys being in the cache."""
        sequence = Request(torch.randn(4096, 128, generator=self.generator))
        self._take_pages(sequence, computed)
        for layer in range(len(self.layers)):
            self.write_keys(layer, [(sequence, computed)])
        return sequence

    def _take_pages(self, sequence: Request, tokens: int) -> None:
        sequence.length += tokens
        while len(sequence.pages) * BLOCK < sequence.length:
            sequence.pages.append(self.free.pop())
            self.users[sequence.pages[-1]] += 1

    def fork(self, parent: Request) -> Request:
        """A request that hits the prefix cache: it shares the parent's full pages, and goes on otherwise."""
        shared = parent.length // BLOCK
        self.users.update(parent.pages[:shared])
        keys = torch.randn(4096, 128, generator=self.generator)
        keys[: shared * BLOCK] = parent.keys[: shared * BLOCK]
        return Request(keys, parent.pages[:shared], shared * BLOCK)

    def preempt(self, sequence: Request) -> None:
        """Gives the pages back, with the keys in them; the request begins anew."""
        for page in sequence.pages:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)  # The next to be handed out.
        sequence.pages, sequence.length = [], 0

    def common(
        self, batch: Sequence[tuple[Request, int]], *, padded_to: int = 0, pad_queries: int = 0
    ) -> CommonAttentionMetadata:
        """Takes pages for the queries of a batch and describes it as vLLM's runner does.

        Args:
            batch: sequences, and how many of their tokens come next: decodes first.
            padded_to: requests that a captured graph has; those beyond the batch's have no token.
            pad_queries: queries that the graph has for each request.
        """
        lengths = [queries for _, queries in batch] + [0] * max(padded_to - len(batch), 0)
        ends, tables = [], []
        for sequence, queries in batch:
            self._take_pages(sequence, queries)
            ends.append(sequence.length)
            tables.append(torch.tensor(sequence.pages, dtype=torch.int32))
        ends += [0] * (len(lengths) - len(ends))
        width = 4096 // BLOCK
        table = torch.full((len(lengths), width), UNUSED, dtype=torch.int32)
        for row, pages in enumerate(tables):
            table[row, : len(pages)] = pages
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        num_tokens = max(int(starts[-1]), padded_to * pad_queries)
        seq_lens = torch.tensor(ends, dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(self.device),
            num_reqs=len(lengths),
            num_actual_tokens=num_tokens,
            max_query_len=max(lengths),
            max_seq_len=max(ends),
            block_table_tensor=table.to(self.device),
            slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64, device=self.device),
            seq_lens_cpu_upper_bound=seq_lens,
        )

    def write_keys(self, layer: int, batch: Sequence[tuple[Request, int]]) -> None:
        """Puts the keys of the batch's tokens into their slots: what vLLM's fused kernel does."""
        cache = self.layers[layer].index_cache.kv_cache
        for sequence, queries in batch:
            positions = torch.arange(sequence.length - queries, sequence.length)
            pages = torch.tensor(sequence.pages, dtype=torch.long)[positions // BLOCK]
            keys = self.layer_keys(layer, sequence)[positions].to(self.device)
            # As bytes, which every dtype can be indexed as.
            bytes_of_page = cache.view(torch.uint8)
            bytes_of_page[pages, positions % BLOCK] = keys.view(torch.uint8)

    def layer_keys(self, layer: int, sequence: Request) -> torch.Tensor:
        """Each layer has keys of its own, in the cache's dtype."""
        dtype = self.layers[layer].index_cache.dtype
        return (sequence.keys[: sequence.length].roll(layer, dims=1) * 2).to(dtype)

    def queries(self, num_tokens: int) -> torch.Tensor:
        """Random queries `[tokens, H * D]` in the cache's dtype."""
        heads = self.layers[0].num_index_heads
        return (torch.randn(num_tokens, heads * 128, generator=self.generator) * 8).to(self.layers[0].index_cache.dtype)

    def step(self, batch: Sequence[tuple[Request, int]], **padding: int) -> list[Step]:
        """Runs all layers for a batch and compares each with the reference, the first with vLLM's kernels too."""
        common = self.common(batch, **padding)
        metadata = self.builder.build(0, common)
        steps = []
        for layer in range(len(self.layers)):
            self.write_keys(layer, batch)
            queries = self.queries(common.num_actual_tokens)
            step = self.forward(layer, queries, metadata, beside_vllm=layer == 0)
            self._judge(layer, batch, queries, step)
            steps.append(step)
        return steps

    def forward(
        self, layer: int, queries: torch.Tensor, metadata: BlockdexIndexerMetadata, *, beside_vllm: bool = True
    ) -> Step:
        """One layer's selections by vLLM's module, as its attention calls it, and by vLLM's kernels."""
        module = self.layers[layer]
        impl = module.impl
        assert isinstance(impl, BlockdexIndexerImpl)
        buffer = impl.topk_indices_buffer
        assert buffer is not None
        buffer.fill_(-7)
        queries = queries.to(self.device)
        names = {each.index_cache.prefix: metadata for each in self.layers}
        num_tokens = metadata.num_actual_tokens
        with set_forward_context(names, self.config, num_tokens=num_tokens):
            decode, prefill = module(queries)
        heads = impl.num_index_heads
        backend = impl._backend_over(module.index_cache.kv_cache)
        theirs = None
        if beside_vllm:
            theirs = vllm_selection(queries[:num_tokens].view(-1, heads, 128), backend, metadata).cpu()
        assert (buffer[num_tokens:] == -7).all()
        # Copies, since the next layer writes into the same buffer.
        decode, prefill = (None if ids is None else ids.cpu().clone() for ids in (decode, prefill))
        return Step(buffer[:num_tokens].cpu().clone(), theirs, decode, prefill, metadata)

    def _judge(self, layer: int, batch: Sequence[tuple[Request, int]], queries: torch.Tensor, step: Step) -> None:
        heads, backend = self.layers[layer].num_index_heads, self.layers[layer].impl._backend
        first = 0
        for sequence, length in batch:
            own = slice(first, first + length)
            first += length
            reference = self.reference(layer, sequence, queries[own].view(-1, heads, 128))
            others = [reference.block_ids] if step.theirs is None else [reference.block_ids, step.theirs[own]]
            for other in others:
                self.flips += count_flips(step.ours[own], other, reference)
            self.rows += length * heads
        assert (step.ours[first:] == -1).all(), "padding"
        rising = step.ours.masked_fill(step.ours < 0, 2**30)
        assert (rising[..., 1:] >= rising[..., :-1]).all(), "ascending"
        assert backend is not None

    def reference(self, layer: int, sequence: Request, queries: torch.Tensor) -> Reference:
        """What the last queries of a sequence must select."""
        impl = self.layers[layer].impl
        tolerance = impl._backend.flip_tolerance
        start = sequence.length - len(queries)
        keys = self.layer_keys(layer, sequence)
        return select(keys, queries, start, impl._spec, flip_tolerance=tolerance)
