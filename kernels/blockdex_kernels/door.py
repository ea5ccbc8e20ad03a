"""Checks at the door to the kernels: every backend refuses wrong arguments with the same words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels.backend import Order, Spans
from blockdex_kernels.spec import IndexSpec

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)

_LEAST = np.array([[0], [0], [1]])  # Layer, start, length.


@dataclass(frozen=True, slots=True)
class Runs:
    """The columns of `Spans` on the host, checked against spec and cache; R = runs.

    Attributes:
        layers: int64 `[R]`.
        starts: int64 `[R]`.
        lengths: int64 `[R]`.
        page_table: int32 `[R, max_blocks]`.
    """

    layers: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    page_table: NDArray[np.int32]


def check_keys(keys: torch.Tensor, spans: Spans, spec: IndexSpec, device: torch.device) -> None:
    """Refuses keys that are not `[tokens, head_dim]` of a float dtype on the device, and spans of a wrong form.

    Raises:
        ValueError: names the argument.
    """
    _check_tensor("keys", keys, device, FLOAT_DTYPES)
    if keys.ndim != 2 or keys.shape[1] != spec.head_dim:
        raise ValueError(f"keys: shape must be [tokens, {spec.head_dim}], got {list(keys.shape)}")
    _check_spans(spans, device)


def check_queries(queries: torch.Tensor, spans: Spans, order: str, spec: IndexSpec, device: torch.device) -> None:
    """Refuses queries that are not `[tokens, heads, head_dim]` of a float dtype on the device, such spans and orders.

    Raises:
        ValueError: names the argument.
    """
    _check_tensor("queries", queries, device, FLOAT_DTYPES)
    if queries.ndim != 3 or queries.shape[1] < 1 or queries.shape[2] != spec.head_dim:
        raise ValueError(f"queries: shape must be [tokens, heads, {spec.head_dim}], got {list(queries.shape)}")
    if order not in get_args(Order):
        raise ValueError(f"order: must be {' or '.join(get_args(Order))}, got {order!r}")
    _check_spans(spans, device)


def check_page_ids(name: str, page_ids: torch.Tensor, device: torch.device, num_pages: int) -> None:
    """Refuses page ids that are not int64 `[pages]` on the device, or not below `num_pages`.

    Raises:
        ValueError: names the argument.
    """
    _check_tensor(name, page_ids, device, (torch.int64,))
    if page_ids.ndim != 1:
        raise ValueError(f"{name}: shape must be [pages], got {list(page_ids.shape)}")
    bad = (page_ids < 0) | (page_ids >= num_pages)
    if bad.any():
        raise ValueError(f"{name}: page must be 0 to {num_pages - 1}, got {int(page_ids[bad][0])}")


def read_runs(spans: Spans, spec: IndexSpec, *, num_pages: int, num_tokens: int, writing: bool) -> Runs:
    """The spans on the host, their numbers checked too. Costs a copy where they are on a GPU.

    Args:
        spans: of the right form (`check_keys`, `check_queries`).
        spec: the indexer.
        num_pages: pages of the cache.
        num_tokens: rows of the packed tensor beside the spans.
        writing: whether only the pages of the runs' own positions are used, or all up to them.

    Raises:
        ValueError: names the argument, the run and both numbers.
    """
    columns = torch.stack((spans.layers, spans.starts, spans.lengths)).cpu().numpy().astype(np.int64)
    runs = Runs(columns[0], columns[1], columns[2], spans.page_table.cpu().numpy())
    room = min(runs.page_table.shape[1] * spec.block_size, spec.max_sequence_tokens)
    wrong = (columns < _LEAST).any(axis=0) | (runs.layers >= spec.num_layers) | (runs.starts + runs.lengths > room)
    if wrong.any():
        _refuse_run(runs, int(wrong.argmax()), spec, room)
    if runs.lengths.sum() != num_tokens:
        raise ValueError(f"spans.lengths: must sum to the {num_tokens} rows beside them, got {runs.lengths.sum()}")
    _check_pages(runs, spec.block_size, num_pages, writing=writing)
    return runs


def _check_tensor(name: str, tensor: torch.Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: must be on {device}, got {tensor.device}")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: dtype must be one of {allowed}, got {str(tensor.dtype).removeprefix('torch.')}")


def _check_spans(spans: Spans, device: torch.device) -> None:
    for name in ("layers", "starts", "lengths", "page_table"):
        _check_tensor(f"spans.{name}", getattr(spans, name), device, (torch.int32,))
    if spans.layers.ndim != 1:
        raise ValueError(f"spans.layers: shape must be [runs], got {list(spans.layers.shape)}")
    num_runs = len(spans.layers)
    for name in ("starts", "lengths"):
        shape = getattr(spans, name).shape
        if shape != (num_runs,):
            raise ValueError(f"spans.{name}: shape must be [{num_runs}], got {list(shape)}")
    if spans.page_table.ndim != 2 or len(spans.page_table) != num_runs:
        raise ValueError(f"spans.page_table: shape must be [{num_runs}, blocks], got {list(spans.page_table.shape)}")


def _refuse_run(runs: Runs, run: int, spec: IndexSpec, room: int) -> NoReturn:
    layer, start, length = int(runs.layers[run]), int(runs.starts[run]), int(runs.lengths[run])
    if not 0 <= layer < spec.num_layers:
        raise ValueError(f"spans.layers: run {run}: must be 0 to {spec.num_layers - 1}, got {layer}")
    if start < 0:
        raise ValueError(f"spans.starts: run {run}: must be at least 0, got {start}")
    if length < 1:
        raise ValueError(f"spans.lengths: run {run}: must be at least 1, got {length}")
    raise ValueError(f"spans.lengths: run {run}: start + length must be at most {room}, got {start} + {length}")


def _check_pages(runs: Runs, block_size: int, num_pages: int, *, writing: bool) -> None:
    last = (runs.starts + runs.lengths - 1) // block_size
    width = int(last.max(initial=-1)) + 1
    if runs.page_table[:, :width].view(np.uint32).max(initial=0) < num_pages:
        return
    first = runs.starts // block_size if writing else np.zeros_like(last)
    for run, (begin, end) in enumerate(zip(first.tolist(), (last + 1).tolist(), strict=True)):
        pages = runs.page_table[run, begin:end]
        wrong = pages.view(np.uint32) >= num_pages
        if wrong.any():
            block = int(wrong.argmax())
            raise ValueError(
                f"spans.page_table: run {run}, block {begin + block}: must be 0 to {num_pages - 1}, got {pages[block]}"
            )
