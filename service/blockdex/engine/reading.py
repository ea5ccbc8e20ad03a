"""Selections that share one read of the keys, and what they hand to the kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex.cache import Cache
from blockdex.engine.entry import Entry, Outcome, too_late
from blockdex.messages import Queries, Spans, TensorData, TokenAnswer, TokenRequest
from blockdex_kernels.backend import Selection
from blockdex_kernels.backend import Spans as KernelSpans

# Received bytes are read-only, and nothing here writes through a view of them. torch says so once a process: let it be
# here, whatever the process makes of warnings.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

_COLUMN_STEP = 4
_TABLE_STEP = 16

TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,
}


def view(tensor: TensorData, *shape: int) -> torch.Tensor:
    """The received bytes as a tensor, not copied."""
    return torch.frombuffer(tensor.data, dtype=TORCH_DTYPES[tensor.dtype]).view(shape)


def side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`[T, heads, D]` of several callers as one tensor; as bytes, since torch joins no fp8."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.view(torch.uint8) for part in parts], dim=1).view(parts[0].dtype)


def rows_of(spans: Spans, chosen: NDArray[np.bool_]) -> torch.Tensor:
    """int64, the rows of the packed tensor beside `spans` that belong to the chosen spans."""
    return torch.from_numpy(np.flatnonzero(np.repeat(chosen, spans.lengths)))


def subset(spans: Spans, chosen: NDArray[np.bool_]) -> Spans:
    """The chosen rows of the columns."""
    return Spans(spans.sequence_ids[chosen], spans.starts[chosen], spans.lengths[chosen], spans.revisions[chosen])


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device; nobody waits for what runs there.

    By way of pinned memory, which torch keeps until the copy is made, whatever becomes of the tensor.
    """
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(selection: Selection) -> Selection:
    """A selection on the host: waits until it is made."""
    scores = selection.scores
    return Selection(selection.block_ids.cpu(), None if scores is None else scores.cpu())


def kernel_spans(cache: Cache, device: torch.device, parts: Sequence[tuple[str, int, Spans]]) -> KernelSpans:
    """Spans of several requests (tenant, layer, columns), one after another, with their page tables as of now.

    All of it crosses to the device in one copy. Columns and rows of the table begin at multiples of 16 bytes there,
    which kernels are compiled for.
    """
    tables = [cache.page_table(tenant, spans) for tenant, _, spans in parts]
    num_runs = sum(len(table) for table in tables)
    width = _rounded_up(max(table.shape[1] for table in tables), _TABLE_STEP)
    height = _rounded_up(num_runs, _COLUMN_STEP)
    numbers = np.zeros(3 * height + num_runs * width, np.int32)
    columns = numbers[: 3 * height].reshape(3, height)[:, :num_runs]
    columns[0] = np.repeat([layer for _, layer, _ in parts], [len(table) for table in tables])
    np.concatenate([spans.starts for _, _, spans in parts], out=columns[1], casting="same_kind")
    np.concatenate([spans.lengths for _, _, spans in parts], out=columns[2], casting="same_kind")
    table = numbers[3 * height :].reshape(num_runs, width)
    row = 0
    for part in tables:
        table[row : row + len(part), : part.shape[1]] = part
        row += len(part)
    there = to_device(torch.from_numpy(numbers), device)
    layers, starts, lengths = there[: 3 * height].view(3, height)[:, :num_runs]
    return KernelSpans(
        layers, starts, lengths, there[3 * height :].view(num_runs, width), columns, int(columns[2].max())
    )


def _rounded_up(count: int, step: int) -> int:
    return -(-count // step) * step


class Reading:
    """Selections of the same tokens of one layer, by one caller or by several that hold different heads.

    Attributes:
        request: the first caller's; tenant, layer and spans are the same for all.
        callers: who still waits for the answer, each with its own heads.
        queries: `[T, heads, D]`, the callers' heads side by side.
        order, return_scores: how all of them are to be answered.
        unread: tokens that no kernel has answered yet.
    """

    def __init__(self, entries: Sequence[Entry], head_dim: int, topk: int) -> None:
        halves = [_queries(entry) for entry in entries]
        request = entries[0].request
        assert isinstance(request, TokenRequest)
        self.request = request
        self.order = halves[0].order
        self.return_scores = halves[0].return_scores
        ends = np.cumsum([half.num_heads for half in halves]).tolist()
        heads = [slice(end - half.num_heads, end) for end, half in zip(ends, halves, strict=True)]
        self.callers = list(zip(entries, heads, strict=True))
        tokens = request.spans.num_tokens
        parts = [view(half.tensor, tokens, half.num_heads, head_dim) for half in halves]
        self.queries = side_by_side(parts)
        shape = (tokens, ends[-1], topk)
        self._block_ids = np.empty(shape, np.int32)
        self._scores = np.empty(shape, np.float32) if self.return_scores else None
        self.unread = tokens

    def drop_gone(self, now: float) -> list[Outcome]:
        """Forgets the callers that have gone or are past their deadline; returns what they are answered."""
        gone = [entry for entry, _ in self.callers if entry.cancelled or entry.deadline <= now]
        if gone:
            self.callers = [(entry, heads) for entry, heads in self.callers if entry not in gone]
        return [(entry, too_late(entry)) for entry in gone]

    def write(self, rows: slice | torch.Tensor, selection: Selection) -> None:
        """Takes a kernel's answer, on the host, for some of the tokens."""
        index = rows if isinstance(rows, slice) else rows.numpy()
        self._block_ids[index] = selection.block_ids.numpy()
        if self._scores is not None and selection.scores is not None:
            self._scores[index] = selection.scores.numpy()
        self.unread -= len(selection.block_ids)

    def outcomes(self, epoch: int) -> list[Outcome]:
        """Every caller's share of the answer; to be called once nothing is unread."""
        result: list[Outcome] = []
        for entry, heads in self.callers:
            scores = None if self._scores is None else self._scores[:, heads]
            result.append((entry, TokenAnswer(epoch, self._block_ids[:, heads], scores)))
        return result


def readings(entries: Iterable[Entry], head_dim: int, topk: int) -> list[Reading]:
    """Groups selections whose tokens, order and dtype are the same, so that they share one read of the keys."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        request, half = entry.request, _queries(entry)
        assert isinstance(request, TokenRequest)
        spans = request.spans
        what = (request.tenant, request.layer, half.order, half.return_scores, half.tensor.dtype)
        where = (spans.sequence_ids.tobytes(), spans.starts.tobytes(), spans.lengths.tobytes())
        groups.setdefault((*what, *where), []).append(entry)
    return [Reading(group, head_dim, topk) for group in groups.values()]


def _queries(entry: Entry) -> Queries:
    request = entry.request
    assert isinstance(request, TokenRequest)
    assert request.queries is not None
    return request.queries
