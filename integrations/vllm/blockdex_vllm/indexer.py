"""The indexer of a MiniMax-M3 layer in vLLM: its metadata, planned once a step, and the selection of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.models.minimax_m3.common.indexer import (
    MiniMaxM3IndexerBackend,
    MiniMaxM3IndexerCache,
    MiniMaxM3IndexerImpl,
    MiniMaxM3IndexerMetadata,
    MiniMaxM3IndexerTritonMetadataBuilder,
)
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from blockdex_kernels import IndexSpec
from blockdex_kernels.interface import Spans
from blockdex_kernels.triton.foreign import Batch, ForeignBackend, Planner
from blockdex_vllm.model import num_sparse_layers, require, spec_of_rank
from blockdex_vllm.settings import Settings
from blockdex_vllm.verification import Verifier


def spec_of(config: VllmConfig, dtype: torch.dtype) -> IndexSpec:
    """What a layer of the model selects on this rank, its index cache being of a dtype."""
    return spec_of_rank(
        config.model_config.hf_text_config,
        tensor_parallel=config.parallel_config.tensor_parallel_size,
        max_model_len=config.model_config.max_model_len,
        fp8=dtype == torch.float8_e4m3fn,
    )


@dataclass
class BlockdexIndexerMetadata(MiniMaxM3IndexerMetadata):
    """vLLM's metadata, and what the kernels read of it.

    Attributes:
        batch: the step, as the kernels take it.
    """

    batch: Batch | None = None


class BlockdexIndexerMetadataBuilder(MiniMaxM3IndexerTritonMetadataBuilder):
    """Plans a step for all layers of a cache group.

    Decodes, drafts to be verified among them, are read from device tensors at addresses that stay, so that a captured
    graph replays with other numbers in them; they may have any number of queries each, and rows without are padding.
    What has more queries than a decode may have is prefill, whose numbers vLLM's host knows exactly.

    Raises:
        ValueError: the layers that have an indexer are not as many as the model's configuration has.
    """

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        _require_layers(vllm_config)
        self._planner = Planner(spec_of(vllm_config, kv_cache_spec.dtype), device)
        # As long as vLLM's own buffer of context lengths: no batch has more requests than tokens.
        self._lengths = torch.zeros_like(self.context_len_buffer)
        self._layers = torch.zeros_like(self.context_len_buffer)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> BlockdexIndexerMetadata:
        """As vLLM's builder, with `batch` besides."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return BlockdexIndexerMetadata(**vars(metadata), batch=self._plan(common_attn_metadata))

    def _plan(self, common: CommonAttentionMetadata) -> Batch:
        num_reqs, ends = common.num_reqs, common.query_start_loc
        torch.sub(ends[1 : num_reqs + 1], ends[:num_reqs], out=self._lengths[:num_reqs])
        host_ends = common.query_start_loc_cpu[: num_reqs + 1].numpy()
        host_lengths = np.diff(host_ends)
        is_prefill = host_lengths > self.reorder_batch_threshold
        first = int(is_prefill.argmax()) if is_prefill.any() else num_reqs
        blocks = max(-(-common.max_seq_len // 128), 1)
        table = common.block_table_tensor[:, :blocks]
        decode, num_decode_tokens = None, 0
        if first:
            # All rows of a batch without a prefill: those behind the last request are padding.
            num_decode_tokens = common.num_actual_tokens if first == num_reqs else int(host_ends[first])
            decode = Spans(
                self._layers[:first],
                self.context_len_buffer[:first],
                self._lengths[:first],
                table[:first],
                # Drafts may be dealt out on the device: the host's lengths bound nothing but their sum.
                max_length=1 if host_lengths[:first].max() <= 1 else self.reorder_batch_threshold,
            )
        host_lengths = host_lengths[first:]
        known = common.seq_lens_cpu_upper_bound
        seq_lens = (common.seq_lens if known is None else known)[first:num_reqs].cpu().numpy()
        return self._planner.plan(
            decode, num_decode_tokens, seq_lens - host_lengths, host_lengths, table[first:num_reqs]
        )


class BlockdexIndexerBackend(MiniMaxM3IndexerBackend):
    """vLLM's backend of the index cache, with our builder."""

    @staticmethod
    def get_name() -> str:
        return "BLOCKDEX_MINIMAX_M3_INDEXER"

    @staticmethod
    def get_impl_cls() -> type[BlockdexIndexerImpl]:
        return BlockdexIndexerImpl

    @staticmethod
    def get_builder_cls() -> type[BlockdexIndexerMetadataBuilder]:
        return BlockdexIndexerMetadataBuilder


class BlockdexIndexerImpl(MiniMaxM3IndexerImpl):
    """Selects the blocks of one layer, into vLLM's buffer.

    Raises:
        ValueError: the layer is not the one that the model's configuration describes, or not one that the kernels are
            made for.
    """

    indexer_backend_cls: ClassVar[type[AttentionBackend]] = BlockdexIndexerBackend

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        config = get_current_vllm_config()
        self._spec = spec_of(config, self.index_cache.dtype)
        self._verifier = Verifier.of(Settings.from_config(config.additional_config).verify)
        self._backend: ForeignBackend | None = None
        self._bound: torch.Tensor | None = None
        layer = self.index_cache.prefix
        require(
            layer,
            num_index_heads=(self.num_index_heads, self._spec.num_index_heads),
            num_kv_heads=(self.num_kv_heads, self._spec.num_index_heads),
            head_dim=(self.index_head_dim, self._spec.head_dim),
            block_size=(self.block_size, self._spec.block_size),
            topk=(self.topk_blocks, self._spec.topk),
            init_blocks=(self.init_blocks, self._spec.init_blocks),
            local_blocks=(self.local_blocks, self._spec.local_blocks),
            score=(self.score_type, self._spec.score),
        )
        if (buffer := self.topk_indices_buffer) is not None:
            shape = [self._spec.num_index_heads, self._spec.topk]
            if list(buffer.shape[1:]) != shape or not buffer.is_contiguous():
                found = f"{list(buffer.shape)}, strides {buffer.stride()}"
                raise ValueError(f"{layer}: topk_indices_buffer must be [tokens, {shape[0]}, {shape[1]}], got {found}")

    def forward(self, index_query: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Selects for the step of the current forward context.

        Args:
            index_query: `[T, H * D]` in the cache's dtype; rows beyond the step's tokens are not read.

        Returns:
            Ids of the decodes and of the rest, `[H, tokens, topk]`, as views of the buffer; None without any, and both
            None in a profiling run.
        """
        steps = get_forward_context().attn_metadata
        if not isinstance(steps, dict):
            return None, None
        metadata = steps[self.index_cache.prefix]
        assert isinstance(metadata, BlockdexIndexerMetadata) and metadata.batch is not None
        num_tokens, nd = metadata.num_actual_tokens, metadata.num_decode_tokens
        queries = index_query[:num_tokens].view(-1, self._spec.num_index_heads, self._spec.head_dim)
        if self.topk_indices_buffer is not None:
            block_ids = self.topk_indices_buffer[:num_tokens]
        else:
            shape = (num_tokens, self._spec.num_index_heads, self._spec.topk)
            block_ids = torch.empty(shape, dtype=torch.int32, device=queries.device)
        backend = self._backend_over(self.index_cache.kv_cache)
        backend.select_into(block_ids, queries, metadata.batch)
        if self._verifier.is_due():
            self._verifier.check(block_ids, queries, backend, metadata)
        by_head = block_ids.transpose(0, 1)
        return by_head[:, :nd] if metadata.num_decodes else None, by_head[:, nd:] if metadata.num_prefills else None

    def _backend_over(self, pages: torch.Tensor) -> ForeignBackend:
        """The kernels over the cache that is bound now; vLLM may bind another one when it wakes up."""
        if self._backend is None or self._bound is not pages:
            self._backend, self._bound = ForeignBackend(self._spec, pages), pages
        return self._backend


def _require_layers(config: VllmConfig) -> None:
    """Refuses a process whose indexers are not as many as the configuration has; a pipeline stage has only some."""
    if config.parallel_config.pipeline_parallel_size > 1:
        return
    drafts = config.speculative_config
    draft_config = drafts.draft_model_config.hf_config if drafts is not None and drafts.method == "mtp" else None
    layers = config.compilation_config.static_forward_context.values()
    found = sum(isinstance(layer, MiniMaxM3IndexerCache) for layer in layers)
    expected = num_sparse_layers(config.model_config.hf_text_config, draft_config)
    require("blockdex", layers_with_an_indexer=(found, expected))
