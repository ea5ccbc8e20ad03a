"""Page tables that lie in one tensor, each from a row of its own on: answers are those of tables side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockdex_kernels import IndexSpec
from blockdex_kernels.cpu import CpuBackend
from blockdex_kernels.interface import Backend, Spans
from support.kernel_cases import UNREADABLE, load, poison, random_run, spans_of
from support.triton_device import DEVICE, backend_for

SPEC = IndexSpec(
    num_layers=2, num_index_heads=2, head_dim=16, block_size=16, topk=4, init_blocks=1, max_sequence_tokens=4096
)
ROW = 4
LENGTHS = (300, 17, 1, 130)


def on_cpu(pages: int) -> Backend:
    return CpuBackend(SPEC, pages, reason="tested")


def in_triton(pages: int) -> Backend:
    return backend_for(SPEC, [], spare_pages=pages)


def laid_out(spans: Spans) -> Spans:
    """The same tables in rows of 4 cells, in another order and with a row of nobody between them."""
    tables = spans.page_table.cpu()
    room = -(-tables.shape[1] // ROW)
    cells = torch.full((len(tables) * (room + 1), ROW), UNREADABLE, dtype=torch.int32)
    rows: list[int] = []
    for place, row in enumerate(reversed(range(len(tables)))):
        first = place * (room + 1) + 1
        cells[first : first + room].view(-1)[: tables.shape[1]] = tables[row]
        rows.insert(0, first)
    return dataclasses.replace(
        spans,
        page_table=cells.to(spans.page_table.device),
        table_rows=torch.tensor(rows, dtype=torch.int32, device=spans.page_table.device),
        max_blocks=tables.shape[1],
    )


@pytest.mark.parametrize("make", [on_cpu, in_triton])
def test_answers_are_those_of_tables_side_by_side(make: Callable[[int], Backend], generator: torch.Generator) -> None:
    runs = [random_run(generator, SPEC, length, min(length, 3), layer=row % 2) for row, length in enumerate(LENGTHS)]
    backend = make(40)
    spans = load(backend, runs, generator)
    queries = torch.cat([run.queries for run in runs]).to(backend.device)
    written = backend.pages.view(torch.uint8).clone()

    elsewhere = laid_out(spans)

    for phase in (backend.decode, backend.prefill):
        expected = phase(queries, spans, order="score", return_scores=True)
        answer = phase(queries, elsewhere, order="score", return_scores=True)
        assert torch.equal(answer.block_ids, expected.block_ids)
        assert answer.scores is not None
        assert expected.scores is not None
        assert torch.equal(answer.scores, expected.scores)
    poison(backend)
    whole = spans_of([run.layer for run in runs], [0] * len(runs), list(LENGTHS), spans.page_table)
    backend.append(torch.cat([run.keys for run in runs]).to(backend.device), laid_out(whole))
    assert torch.equal(backend.pages.view(torch.uint8), written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table_rows": torch.zeros(2).int()}, r"spans.table_rows: shape must be \[4\], got \[2\]"),
        ({"table_rows": torch.zeros(4)}, "spans.table_rows: dtype must be one of int32, got float32"),
        ({"max_blocks": None}, "spans.max_blocks: beside table_rows it must be 1 to [0-9]+, got None"),
        ({"max_blocks": 10**6}, "spans.max_blocks: beside table_rows it must be 1 to [0-9]+, got 1000000"),
    ],
)
def test_refusals(change: dict[str, Any], message: str, generator: torch.Generator) -> None:
    runs = [random_run(generator, SPEC, length, 1) for length in LENGTHS]
    backend = on_cpu(40)
    spans = dataclasses.replace(laid_out(load(backend, runs, generator)), **change)
    queries = torch.cat([run.queries for run in runs])
    with pytest.raises(ValueError, match=message):
        backend.decode(queries, spans, order="ascending", return_scores=False)


def test_refuses_tables_with_gaps(generator: torch.Generator) -> None:
    runs = [random_run(generator, SPEC, length, 1) for length in LENGTHS]
    backend = in_triton(40)
    spans = laid_out(load(backend, runs, generator))
    spans = dataclasses.replace(spans, page_table=torch.cat([spans.page_table] * 2, dim=1)[:, :ROW])
    queries = torch.cat([run.queries for run in runs]).to(DEVICE)
    with pytest.raises(ValueError, match="beside table_rows it must be contiguous"):
        backend.decode(queries, spans, order="ascending", return_scores=False)
