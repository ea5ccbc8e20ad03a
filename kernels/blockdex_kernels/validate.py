"""What a kernel is given is checked here: every backend refuses wrong arguments with the same words."""

from __future__ import annotations

from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels.interface import Order, Spans
from blockdex_kernels.spec import IndexSpec

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


class Run(NamedTuple):
    """One row of `Spans`."""

    layer: int
    start: int
    length: int


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


def check_copies(sources: torch.Tensor, destinations: torch.Tensor, num_pages: int) -> None:
    """Refuses page ids that are not int64 `[pages]` on the host, not below `num_pages`, or not as many on either side.

    Raises:
        ValueError: names the argument.
    """
    for name, page_ids in (("sources", sources), ("destinations", destinations)):
        _check_tensor(name, page_ids, torch.device("cpu"), (torch.int64,))
        if page_ids.ndim != 1:
            raise ValueError(f"{name}: shape must be [pages], got {list(page_ids.shape)}")
        bad = (page_ids < 0) | (page_ids >= num_pages)
        if bad.any():
            raise ValueError(f"{name}: page must be 0 to {num_pages - 1}, got {int(page_ids[bad][0])}")
    if len(sources) != len(destinations):
        raise ValueError(f"destinations: must be as many as sources, got {len(destinations)} and {len(sources)}")


def read_runs(
    spans: Spans, spec: IndexSpec, *, num_pages: int, num_tokens: int, writing: bool
) -> tuple[list[Run], NDArray[np.int32]]:
    """The spans on the host, their numbers checked too. Costs a copy where they are on a GPU.

    Args:
        spans: of the right form (`check_keys`, `check_queries`).
        spec: the indexer.
        num_pages: pages of the cache.
        num_tokens: rows of the packed tensor beside the spans.
        writing: whether only the pages of the runs' own positions are used, or all up to them.

    Returns:
        The runs, and the page table.

    Raises:
        ValueError: names the argument, the run and both numbers.
    """
    page_table: NDArray[np.int32] = spans.own_tables().cpu().numpy()
    room = min(page_table.shape[1] * spec.block_size, spec.max_sequence_tokens)
    runs = list(map(Run, spans.layers.tolist(), spans.starts.tolist(), spans.lengths.tolist()))
    total = 0
    for row, (layer, start, length) in enumerate(runs):
        if not 0 <= layer < spec.num_layers:
            raise ValueError(f"spans.layers: run {row}: must be 0 to {spec.num_layers - 1}, got {layer}")
        if start < 0:
            raise ValueError(f"spans.starts: run {row}: must be at least 0, got {start}")
        if length < 1:
            raise ValueError(f"spans.lengths: run {row}: must be at least 1, got {length}")
        if start + length > room:
            raise ValueError(f"spans.lengths: run {row}: start + length must be at most {room}, got {start} + {length}")
        total += length
    if total != num_tokens:
        raise ValueError(f"spans.lengths: must sum to the {num_tokens} rows beside them, got {total}")
    _check_pages(runs, page_table, spec.block_size, num_pages, writing=writing)
    return runs, page_table


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
    table = spans.page_table
    if spans.table_rows is not None:
        _check_table_rows(spans, device)
    elif table.ndim != 2 or len(table) != num_runs:
        raise ValueError(f"spans.page_table: shape must be [{num_runs}, blocks], got {list(table.shape)}")
    # Kernels step through these by ones; a row of the page table may begin anywhere.
    for name in ("layers", "starts", "lengths", "page_table"):
        column = getattr(spans, name)
        if column.shape[-1] > 1 and column.stride(-1) != 1:
            raise ValueError(f"spans.{name}: stride of the last dimension must be 1, got {column.stride(-1)}")


def _check_table_rows(spans: Spans, device: torch.device) -> None:
    rows, table = spans.table_rows, spans.page_table
    assert rows is not None
    _check_tensor("spans.table_rows", rows, device, (torch.int32,))
    if rows.shape != spans.layers.shape:
        raise ValueError(f"spans.table_rows: shape must be {list(spans.layers.shape)}, got {list(rows.shape)}")
    if table.ndim != 2 or not table.is_contiguous():
        raise ValueError(f"spans.page_table: beside table_rows it must be contiguous, got strides {table.stride()}")
    if spans.max_blocks is None or not 1 <= spans.max_blocks <= table.numel():
        raise ValueError(f"spans.max_blocks: beside table_rows it must be 1 to {table.numel()}, got {spans.max_blocks}")


def _check_pages(
    runs: list[Run], page_table: NDArray[np.int32], block_size: int, num_pages: int, *, writing: bool
) -> None:
    width = max((-(-(run.start + run.length) // block_size) for run in runs), default=0)
    if page_table[:, :width].view(np.uint32).max(initial=0) < num_pages:
        return
    for row, run in enumerate(runs):
        first = run.start // block_size if writing else 0
        pages = page_table[row, first : -(-(run.start + run.length) // block_size)]
        wrong = pages.view(np.uint32) >= num_pages
        if wrong.any():
            block = int(wrong.argmax())
            raise ValueError(
                f"spans.page_table: run {row}, block {first + block}: must be 0 to {num_pages - 1}, got {pages[block]}"
            )
