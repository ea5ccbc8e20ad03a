"""Which indexer a MiniMax-M3 layer gets."""

from __future__ import annotations

from vllm.logger import init_logger
from vllm.models.minimax_m3.common import indexer
from vllm.models.minimax_m3.common.indexer import MiniMaxM3IndexerImpl, MiniMaxM3IndexerTritonImpl
from vllm.platforms import current_platform

from blockdex_vllm.indexer import BlockdexIndexerImpl

_logger = init_logger("vllm.blockdex")
_choose_vllm_impl = indexer.select_indexer_impl_cls


def install() -> None:
    """Puts `select_impl` where `MiniMaxM3Indexer` looks when it is built."""
    indexer.select_indexer_impl_cls = select_impl


def select_impl(*, topk_blocks: int, indexer_kv_dtype: str = "bf16") -> type[MiniMaxM3IndexerImpl]:
    """Ours where vLLM would take its Triton kernels; otherwise its own choice, refusals included.

    fmha_sm100 on Blackwell and the kernels for AMD stay: ours were not measured beside them.
    """
    chosen: type[MiniMaxM3IndexerImpl] = _choose_vllm_impl(topk_blocks=topk_blocks, indexer_kv_dtype=indexer_kv_dtype)
    if chosen is not MiniMaxM3IndexerTritonImpl or current_platform.is_rocm():
        _logger.info_once("blockdex: vLLM keeps its indexer %s", chosen.__name__)
        return chosen
    _logger.info_once("blockdex: selects blocks in place of %s", chosen.__name__)
    return BlockdexIndexerImpl
