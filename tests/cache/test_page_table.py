"""Page tables in extents against plain lists, and against a copy that follows their changes."""

from __future__ import annotations

import random

import numpy as np

from blockdex.cache.page_table import PageTables
from support.cache_state import check_tables, first_blocks


def test_against_plain_lists() -> None:
    """Tables of 0 to 400 blocks grow, shrink and go, with the numbers round a row's edge drawn most often."""
    draw = random.Random(11)
    tables = PageTables(5)
    model: list[list[int]] = [[] for _ in range(5)]
    copy = tables.cells.copy()
    for step in range(1, 1500):
        if step % 300 == 0:
            tables.double_entries()
            model += [[] for _ in model]
        slot = draw.randrange(len(model))
        kept = min(draw.choice((0, 1, 63, 64, 65, 127, 128, 400)), len(model[slot]))
        fresh = [draw.randrange(1, 2**31) for _ in range(draw.choice((0, 1, 2, 63, 64, 65, 400 - kept)))]
        tables.resize(slot, len(model[slot]), kept + len(fresh))
        tables.set(slot, np.arange(kept, kept + len(fresh)), np.array(fresh, np.int32))
        model[slot] = model[slot][:kept] + fresh
        changes = tables.take_changes()
        copy = np.pad(copy, (0, len(tables.cells) - len(copy)))
        copy[changes] = tables.cells[changes]
        if not any(model):
            continue

        rows = check_tables(tables, np.array([len(pages) for pages in model]))
        assert [row[: len(pages)].tolist() for row, pages in zip(rows, model, strict=True)] == model
        assert not any(row[len(pages) :].any() for row, pages in zip(rows, model, strict=True))
        for other, pages in enumerate(model):
            first = 64 * tables.first_rows[other]
            assert copy[first : first + len(pages)].tolist() == pages
        filled = [other for other, pages in enumerate(model) if pages]
        blocks = [draw.randrange(len(model[other])) for other in filled]
        expected = [model[other][block] for other, block in zip(filled, blocks, strict=True)]
        assert tables.get(np.array(filled), np.array(blocks)).tolist() == expected
        width = draw.randrange(1, 1 + max(map(len, model)))
        chosen = draw.sample(range(len(model)), 3)
        padded = [(model[other] + [0] * width)[:width] for other in chosen]
        assert first_blocks(tables, np.array(chosen), width).tolist() == padded


def test_a_long_one_takes_room_for_itself() -> None:
    tables = PageTables(10_000)
    tables.resize(7, 0, 8192)
    assert sum(array.nbytes for array in vars(tables).values() if isinstance(array, np.ndarray)) < 16 * 2**20
