"""A share of the answers compared with vLLM's own kernels, counted and logged."""

from __future__ import annotations

import random
from functools import cache

import torch
from vllm.logger import init_logger
from vllm.models.minimax_m3.common.indexer import (
    MiniMaxM3IndexerMetadata,
    minimax_m3_index_decode,
    minimax_m3_index_score,
    minimax_m3_index_topk,
)

from blockdex_kernels.reference import SelectionMismatchError, count_flips, select
from blockdex_kernels.triton.foreign import ForeignBackend

_logger = init_logger("vllm.blockdex")

_LOG_EVERY = 100
"""Checked calls from one line of counts to the next."""
_MOST_JUDGED = 8
"""Rows of one call that are held against the float64 reference, which takes milliseconds for each."""


class Verifier:
    """Compares a share of calls with vLLM's kernels over the same cache. A call that is compared waits for the device.

    Replays of a CUDA graph pass no host and are never compared; calls that are being captured are not either.

    Args:
        share: of the calls, 0 to 1.

    Attributes:
        calls: that were compared.
        rows: selections in them, one a token and head.
        differing: rows whose sets of blocks differ.
        wrong: of those that were judged, rows that differ by more than rounding may exchange.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.calls = self.rows = self.differing = self.wrong = 0

    @classmethod
    @cache
    def of(cls, share: float) -> Verifier:
        """The one of this process, in which all layers count together."""
        return cls(share)

    def is_due(self) -> bool:
        """Whether this call is one of the share."""
        if not self.share or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return False
        return random.random() < self.share

    def check(
        self,
        block_ids: torch.Tensor,
        queries: torch.Tensor,
        backend: ForeignBackend,
        metadata: MiniMaxM3IndexerMetadata,
    ) -> None:
        """Compares one call's answers as sets, and judges rows that differ by the reference in float64.

        Args:
            block_ids: int32 `[T, H, topk]`, ours.
            queries: `[T, H, D]`.
            backend: the kernels that answered, over the layer's cache.
            metadata: of the step.
        """
        theirs = vllm_selection(queries, backend, metadata)
        differ = (block_ids.sort(dim=2).values != theirs.sort(dim=2).values).any(dim=2)
        rows = differ.nonzero().tolist()
        self.calls += 1
        self.rows += differ.numel()
        self.differing += len(rows)
        for token, head in rows[:_MOST_JUDGED]:
            try:
                _judge(block_ids[token, head], theirs[token, head], queries[token, head], token, backend, metadata)
            except SelectionMismatchError as error:
                self.wrong += 1
                _logger.error("blockdex: token %d, head %d: not what vLLM's kernels select: %s", token, head, error)
        if self.calls % _LOG_EVERY == 1:
            _logger.info(
                "blockdex: %d calls compared with vLLM's kernels, %d selections, %d differ, %d by more than rounding",
                self.calls,
                self.rows,
                self.differing,
                self.wrong,
            )


def vllm_selection(queries: torch.Tensor, backend: ForeignBackend, metadata: MiniMaxM3IndexerMetadata) -> torch.Tensor:
    """int32 `[T, H, topk]`: what vLLM's own Triton kernels answer for a step, in their order."""
    spec, pages = backend.spec, backend.pages[:, 0]
    block_ids = torch.full((*queries.shape[:2], spec.topk), -1, dtype=torch.int32, device=queries.device)
    by_head, nd = block_ids.transpose(0, 1), metadata.num_decode_tokens
    forced = (spec.topk, spec.init_blocks, spec.local_blocks)
    if (decode := metadata.decode) is not None:
        minimax_m3_index_decode(
            queries[:nd],
            pages,
            decode.block_table,
            decode.seq_lens,
            decode.max_seq_len,
            *forced,
            spec.num_index_heads,
            decode.decode_query_len,
            decode.max_decode_query_len,
            out=by_head,
        )
    if (prefill := metadata.prefill) is not None:
        score = minimax_m3_index_score(
            queries[nd:],
            pages,
            prefill.block_table,
            prefill.cu_seqlens_q,
            prefill.seq_lens,
            prefill.context_lens,
            prefill.max_query_len,
            prefill.max_seq_len,
            spec.num_index_heads,
        )
        minimax_m3_index_topk(
            score, prefill.cu_seqlens_q, prefill.context_lens, prefill.max_query_len, *forced, out=by_head[:, nd:]
        )
    return block_ids


def _judge(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    query: torch.Tensor,
    token: int,
    backend: ForeignBackend,
    metadata: MiniMaxM3IndexerMetadata,
) -> None:
    """Raises `SelectionMismatchError` where two selections of one query differ by more than rounding."""
    position, table = _place(token, metadata)
    spec = backend.spec
    if position < 0:
        raise SelectionMismatchError(f"{ours.tolist()} and {theirs.tolist()} for a token that is padding")
    blocks = table[: position // spec.block_size + 1].long()
    keys = backend.pages[blocks, 0].reshape(-1, spec.head_dim)[: position + 1].cpu()
    reference = select(keys, query[None, None].cpu(), position, spec, flip_tolerance=backend.flip_tolerance)
    count_flips(ours[None, None].cpu(), theirs[None, None].cpu(), reference)


def _place(token: int, metadata: MiniMaxM3IndexerMetadata) -> tuple[int, torch.Tensor]:
    """A token's position, below 0 where it is padding, and its request's row of the block table."""
    if (decode := metadata.decode) is not None and token < metadata.num_decode_tokens:
        row, number = divmod(token, decode.decode_query_len)
        return int(decode.seq_lens[row]) - decode.decode_query_len + number, decode.block_table[row]
    assert metadata.prefill is not None
    ends = metadata.prefill.cu_seqlens_q[1:].tolist()
    token -= metadata.num_decode_tokens
    row = next(row for row, end in enumerate(ends) if token < end)
    first = int(metadata.prefill.cu_seqlens_q[row])
    return int(metadata.prefill.context_lens[row]) + token - first, metadata.prefill.block_table[row]
