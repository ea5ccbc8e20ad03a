"""Pages in someone else's cache: any distance from each other, any beginning, planned once for all layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from blockdex_kernels import IndexSpec
from blockdex_kernels.casts import TORCH_DTYPES, cast_keys
from blockdex_kernels.interface import PrefillKernel, Spans
from blockdex_kernels.reference import count_flips, select
from blockdex_kernels.spec import KeyDtype
from blockdex_kernels.triton.foreign import Batch, ForeignBackend, Planner
from support.kernel_cases import TALLY, UNREADABLE
from support.triton_device import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LENGTHS, QUERIES = (300, 17, 90, 223), (1, 2, 40, 7)
"""Tokens of each sequence, by 16 of a block, and its last queries: two decodes, then two prefills."""

KERNELS: list[tuple[int, PrefillKernel]] = [(16, "portable")]
"""Tokens of a block and the kernel; Hopper's takes blocks of 128."""
if DEVICE.type == "cuda":
    KERNELS += [(128, "portable"), (128, "hopper")]


def a_spec(key_dtype: KeyDtype, **fields: Any) -> IndexSpec:
    sizes: dict[str, Any] = {"num_layers": 1, "num_index_heads": 2, "head_dim": 32, "block_size": 16, "topk": 4}
    return IndexSpec(key_dtype=key_dtype, **(sizes | fields))


def lengths_of(spec: IndexSpec) -> list[int]:
    return [length * spec.block_size // 16 for length in LENGTHS]


def pages_apart(spec: IndexSpec, num_pages: int, gap: int, offset: int) -> torch.Tensor:
    """`[num_pages, block_size, D]` whose pages lie `gap` elements apart from each other, all of the cache being NaN."""
    page = spec.block_size * spec.head_dim
    raw = torch.full((offset + num_pages * (page + gap),), torch.nan, dtype=TORCH_DTYPES[spec.key_dtype], device=DEVICE)
    return raw.as_strided((num_pages, spec.block_size, spec.head_dim), (page + gap, spec.head_dim, 1), offset)


def random_batch(
    spec: IndexSpec, pages: torch.Tensor, generator: torch.Generator
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Keys of each sequence, put into shuffled pages; queries of all; and the table, unreadable where there is none."""
    page_ids = torch.randperm(len(pages), generator=generator).tolist()
    lengths = lengths_of(spec)
    table = torch.full((len(lengths), -(-max(lengths) // spec.block_size) + 1), UNREADABLE, dtype=torch.int32)
    all_keys = []
    for row, length in enumerate(lengths):
        keys = cast_keys(torch.randn(length, spec.head_dim, generator=generator), spec.key_dtype)
        for block in range(-(-length // spec.block_size)):
            table[row, block] = page_ids.pop()
            part = keys[block * spec.block_size : (block + 1) * spec.block_size]
            pages[int(table[row, block]), : len(part)] = part.to(DEVICE)
        all_keys.append(keys)
    queries = torch.randn(sum(QUERIES), spec.num_index_heads, spec.head_dim, generator=generator)
    return all_keys, cast_keys(queries, spec.key_dtype), table


def planned(spec: IndexSpec, table: torch.Tensor, score_bytes: int) -> Batch:
    starts = np.array(lengths_of(spec), np.int32) - np.array(QUERIES, np.int32)
    lengths = np.array(QUERIES, np.int32)
    on_device = table.to(DEVICE)
    columns = torch.from_numpy(np.stack([np.zeros_like(starts), starts, lengths])[:, :2]).to(DEVICE)
    decode = Spans(columns[0], columns[1], columns[2], on_device[:2], max_length=2)
    planner = Planner(spec, DEVICE, score_bytes=score_bytes)
    return planner.plan(decode, sum(QUERIES[:2]), starts[2:], lengths[2:], on_device[2:])


@pytest.mark.parametrize(("block_size", "kernel"), KERNELS)
@pytest.mark.parametrize(
    ("gap", "offset", "key_dtype", "forced"),
    [
        (0, 0, "bf16", (0, 1)),
        (0, 0, "fp8_e4m3", (1, 0)),
        (7 * 128, 3 * 128, "bf16", (1, 0)),
        (7 * 128, 3 * 128, "fp8_e4m3", (0, 1)),
        (5, 1, "bf16", (0, 1)),
        (5, 1, "fp8_e4m3", (1, 0)),
    ],
)
def test_selections_are_the_references(
    key_dtype: KeyDtype,
    gap: int,
    offset: int,
    forced: tuple[int, int],
    block_size: int,
    kernel: PrefillKernel,
    generator: torch.Generator,
) -> None:
    head_dim = 32 if block_size == 16 else 128
    init, local = forced
    spec = a_spec(key_dtype, block_size=block_size, head_dim=head_dim, init_blocks=init, local_blocks=local)
    pages = pages_apart(spec, 60, gap, offset)
    all_keys, queries, table = random_batch(spec, pages, generator)
    # Two slices of prefill, and rows of padding behind the batch's.
    batch = planned(spec, table, score_bytes=4 * 2 * 32 * 30)
    assert len(batch.prefill) == 2
    padded = torch.cat([queries, queries[:3]])
    block_ids = torch.full((len(padded), 2, 4), -7, dtype=torch.int32, device=DEVICE)
    backend = ForeignBackend(spec, pages, prefill_kernel=kernel)
    # Hopper's kernel forces a local block, and reads pages that lie in rows of its keys' length.
    hopper = kernel == "hopper" and local > 0 and gap % 128 == 0
    assert backend.kernels["prefill"][0].startswith("gluon" if hopper else "triton")
    backend.select_into(block_ids, padded.to(DEVICE), batch)

    first = 0
    for keys, length in zip(all_keys, QUERIES, strict=True):
        own = slice(first, first + length)
        start = len(keys) - length
        reference = select(keys, queries[own], start, spec, flip_tolerance=backend.flip_tolerance)
        TALLY.rows += length * 2
        TALLY.flips += count_flips(block_ids[own].cpu(), reference.block_ids, reference)
        first += length
    assert (block_ids[first:] == -1).all()


def test_what_is_refused() -> None:
    spec = a_spec("bf16")
    backend = ForeignBackend(spec, pages_apart(spec, 4, 0, 0))
    batch = Batch(None, 0, (), 0)
    block_ids = torch.full((1, 2, 4), -7, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"must be the pages' torch.bfloat16, got torch.float16"):
        backend.select_into(block_ids, torch.zeros(1, 2, 32, dtype=torch.float16, device=DEVICE), batch)
    assert (block_ids == -7).all()
    with pytest.raises(ValueError, match=r"bfloat16 \[pages, 16, 32\], got torch.bfloat16 \[4, 32, 16\]"):
        ForeignBackend(spec, torch.zeros(4, 32, 16, dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(ValueError, match="each must be dense"):
        ForeignBackend(spec, torch.zeros(4, 16, 64, dtype=torch.bfloat16, device=DEVICE)[:, :, :32])
    with pytest.raises(ValueError, match="topk of at most 64, got 65"):
        Planner(a_spec("bf16", topk=65), DEVICE)
