"""The numbers of `blockdex_device.cuh`, and of the kernels in Triton, are those of the layout."""

from __future__ import annotations

import inspect
import re

import pytest

from blockdex.device_channel import kernels
from blockdex.ring import channel_layout
from blockdex.ring.channel_layout import CONTROL_AT
from blockdex.ring.layout import AT, HEADER_BYTES, REQUEST, SLOT_BYTES
from support.channel_twins import HEADER

SOURCE = HEADER.read_text(encoding="utf-8")
ERRORS = ("TIMED_OUT", "REFUSED", "UNANSWERED", "ENGINE_GONE", "CLOSED", "INVALID_LENGTHS")
WRITTEN = (
    *("ticket", "kind", "layer", "first_head", "sequence_id", "payload_bytes", "keys_bytes", "queries_bytes"),
    *("keys_region", "block_ids_region", "keys_offset", "queries_offset", "block_ids_offset", "scores_offset"),
)
"""Fields of a request that a GPU writes, and that begin a word."""


def test_offsets_and_errors_of_the_header() -> None:
    found = {name: int(number) for name, number in re.findall(r"BLOCKDEX_(\w+) = (\d+)", SOURCE)}
    offsets = {f"AT_{name.upper()}": at for name, at in (AT | CONTROL_AT).items()}
    others = {"AT_SLOTS": HEADER_BYTES, "DEVICE_SLOT_BYTES": SLOT_BYTES, "TIMED_OUT": channel_layout.TIMED_OUT}
    assert found.items() <= (offsets | others).items()
    assert {f"AT_{name.upper()}" for name in CONTROL_AT} <= found.keys()
    numbered = re.search(r"enum \{\s+BLOCKDEX_TIMED_OUT = 1,(.+?)\}", SOURCE, re.DOTALL)
    assert numbered
    names = ["TIMED_OUT", *re.findall(r"BLOCKDEX_(\w+)", numbered[1])]
    assert names == list(ERRORS)
    assert [getattr(channel_layout, name) for name in names] == list(range(1, len(names) + 1))


@pytest.mark.parametrize(
    ("source", "word"), [(SOURCE, r"word\[(\d+)\] ="), (inspect.getsource(kernels), r"word == (\d+)")]
)
def test_words_of_a_slot(source: str, word: str) -> None:
    at = {field.name: field.offset for field in REQUEST}
    assert all(at[name] % 8 == 0 for name in WRITTEN)
    assert [int(number) for number in re.findall(word, source)] == [at[name] // 8 for name in WRITTEN]
