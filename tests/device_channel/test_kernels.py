"""Both twins of a channel's kernels: what they write into the segment, and what they make of an answer."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from blockdex.device_channel.calls import Call, Heads, check
from blockdex.device_channel.memory import ChannelMemory
from blockdex.ring import channel_layout as layout
from blockdex.ring.layout import AT, DTYPES
from blockdex_kernels import IndexSpec
from support.channel_core import REGION, ChannelCore, channel_core
from support.channel_twins import TWINS, Launch, interpreted
from support.triton_device import DEVICE

SPEC = IndexSpec(num_layers=5, num_index_heads=2, head_dim=64, topk=8)
HEADS = Heads(0, 2)
MAX_TOKENS, MAX_ROWS, OWN_BYTES = 256, 64, 1 << 16
NAMES = {torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8_e4m3"}
BOUND = 20.0
"""Seconds, longer than any test takes that does not wait for it."""


@pytest.fixture(params=TWINS)
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launch:
    if DEVICE.type == "cpu":
        interpreted(monkeypatch.setattr)
    return TWINS[request.param]


@pytest.fixture
def memory() -> ChannelMemory:
    return ChannelMemory(DEVICE, SPEC, HEADS.count, MAX_TOKENS, MAX_ROWS, OWN_BYTES)


@pytest.fixture
def core(memory: ChannelMemory) -> Iterator[ChannelCore]:
    with channel_core(memory, SPEC) as core:
        yield core


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16().to(DEVICE)


def call_of(lengths: list[int], row_tokens: int, *, keys: bool = True, queries: bool = True) -> Call:
    """Rows of sequences 100 and up."""
    rows = len(lengths)
    return Call(
        layer=3,
        ids=numbers(*range(100, 100 + rows)),
        starts=numbers(*range(1000, 1000 + rows)),
        lengths=numbers(*lengths),
        keys=random(rows, row_tokens, SPEC.head_dim) if keys else None,
        queries=random(rows, row_tokens, HEADS.count, SPEC.head_dim) if queries else None,
    )


def run(launch: Launch, memory: ChannelMemory, call: Call, bound: float = BOUND) -> torch.Tensor:
    """Block ids, filled with what no answer has before."""
    check(call, DEVICE, SPEC, HEADS, MAX_TOKENS, MAX_ROWS)
    ids = torch.full((call.rows, call.row_tokens, HEADS.count, SPEC.topk), 12345, dtype=torch.int32, device=DEVICE)
    launch(memory, SPEC, HEADS, call, ids if call.queries is not None else None, bound)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return ids.cpu()


def bits(tensor: torch.Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.cpu().contiguous().view(torch.uint16).numpy()


def expected(call: Call) -> torch.Tensor:
    """The answer: the queries' own first elements, -1 where there is no token."""
    ids = bits(call.queries)[..., : SPEC.topk].astype(np.int32)
    for row, length in enumerate(call.lengths.tolist()):
        ids[row, length:] = -1
    return torch.from_numpy(ids)


def packed(tensor: torch.Tensor | None, call: Call) -> np.ndarray:
    return np.concatenate([bits(tensor)[row, :length] for row, length in enumerate(call.lengths.tolist())])


@pytest.mark.parametrize(
    ("lengths", "row_tokens"),
    [([1], 1), ([1, 0, 1, 1, 0], 1), ([0, 3, 4, 1], 4), ([17, 0, 33], 33), ([1] * 60 + [0] * 4, 4)],
    ids=str,
)
def test_rows_are_packed_without_padding(
    launch: Launch, memory: ChannelMemory, core: ChannelCore, lengths: list[int], row_tokens: int
) -> None:
    call = call_of(lengths, row_tokens)
    assert torch.equal(run(launch, memory, call), expected(call))
    (rung,) = core.rung
    live = [row for row, length in enumerate(lengths) if length]
    columns = [
        [100 + row for row in live],
        [1000 + row for row in live],
        [lengths[row] for row in live],
        [0] * len(live),
    ]
    np.testing.assert_array_equal(rung.columns, columns)
    np.testing.assert_array_equal(rung.keys, packed(call.keys, call))
    np.testing.assert_array_equal(rung.queries, packed(call.queries, call))
    slot, tokens = rung.slot, sum(lengths)
    assert slot._replace(payload_bytes=0) == slot._replace(
        ticket=1,
        kind=6,
        keys_dtype=1,
        queries_dtype=1,
        order=1,
        flags=0,
        layer=3,
        num_spans=len(live),
        first_head=0,
        num_heads=2,
        payload_bytes=0,
        keys_bytes=2 * 64 * tokens,
        queries_bytes=4 * 64 * tokens,
        keys_region=REGION,
        queries_region=REGION,
        block_ids_region=REGION,
        keys_offset=memory.places.keys,
        queries_offset=memory.places.queries,
        block_ids_offset=memory.places.block_ids,
    )
    assert slot.payload_bytes == -(-32 * len(live) // 64) * 64
    assert (slot.epoch, slot.received, slot.deadline, slot.tenant_bytes, slot.scores_region) == (0,) * 5


def test_appends_and_selections_alone_and_their_flags(launch: Launch, memory: ChannelMemory, core: ChannelCore) -> None:
    append, select = call_of([2, 1], 2, queries=False), call_of([1, 0, 1], 1, keys=False)
    append.rollback, select.wait_for_keys, select.pool = True, True, 9
    run(launch, memory, append)
    assert torch.equal(run(launch, memory, select), expected(select))
    first, second = (rung.slot for rung in core.rung)
    assert (first.ticket, first.flags, first.keys_dtype, first.queries_dtype) == (1, 4, 1, 0)
    assert (first.keys_region, first.queries_region, first.block_ids_region, first.num_heads) == (REGION, 0, 0, 0)
    assert (second.ticket, second.flags, second.keys_dtype, second.queries_dtype) == (2, 2, 0, 1)
    assert (first.sequence_id, second.sequence_id) == (0, 9)
    assert (second.keys_region, second.queries_region, second.keys_offset, second.keys_bytes) == (0, REGION, 0, 0)


def test_scores_and_their_order(launch: Launch, memory: ChannelMemory, core: ChannelCore) -> None:
    """More tokens than are copied at once; without a token there is no score."""
    call = call_of([3, 0, 17, 9], 17)
    call.order, call.raw_scores = "score", True
    call.scores = torch.zeros(4, 17, HEADS.count, SPEC.topk, device=DEVICE)
    ids = run(launch, memory, call)
    assert torch.equal(ids, expected(call))
    assert torch.equal(call.scores.cpu(), torch.where(ids < 0, -torch.inf, ids / 4))
    slot = core.rung[0].slot
    assert (slot.order, slot.flags) == (2, 8)
    assert (slot.block_ids_region, slot.scores_region, slot.scores_offset) == (REGION, REGION, memory.places.scores)
    core.deaf = True
    assert (run(launch, memory, call, bound=0.1) == -1).all() and (call.scores == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_dtypes(launch: Launch, memory: ChannelMemory, core: ChannelCore, dtype: torch.dtype) -> None:
    """Rows of as many bytes as these have; what they are the slot says."""
    call = call_of([2, 0, 1], 2, queries=False)
    assert call.keys is not None
    call.keys = call.keys.to(dtype)
    run(launch, memory, call)
    slot = core.rung[0].slot
    size = dtype.itemsize * SPEC.head_dim
    assert (slot.keys_dtype, slot.keys_bytes) == (DTYPES.index(NAMES[dtype]) + 1, 3 * size)
    there = memory.bytes[memory.places.keys :][: 3 * size].cpu()
    assert torch.equal(there, torch.cat([call.keys[0], call.keys[2, :1]]).view(torch.uint8).view(-1).cpu())


def test_revisions_and_the_number_of_the_replay(launch: Launch, memory: ChannelMemory, core: ChannelCore) -> None:
    call = call_of([1, 0, 1], 1)
    call.revisions = numbers(5, 6, 7)
    run(launch, memory, call)
    call.replays = numbers(30)
    run(launch, memory, call)
    assert [rung.columns[3].tolist() for rung in core.rung] == [[5, 7], [35, 37]]


@pytest.mark.parametrize(("lengths", "own"), [([2, 2, 1, 0], True), ([2, 1, 2, 0], False)])
def test_what_lies_in_the_channel_is_copied_only_to_be_packed(
    launch: Launch, memory: ChannelMemory, core: ChannelCore, lengths: list[int], own: bool
) -> None:
    call = call_of(lengths, 2)
    at = memory.places.own + 1024
    for name in ("keys", "queries"):
        tensor = getattr(call, name)
        inside = memory.bytes[at : at + 2 * tensor.numel()].view(torch.bfloat16).view(tensor.shape)
        inside.copy_(tensor)
        setattr(call, name, inside)
        at += 4096
    assert torch.equal(run(launch, memory, call), expected(call))
    slot = core.rung[0].slot
    offsets = (memory.places.own + 1024, memory.places.own + 5120) if own else memory.places[1:3]
    assert (slot.keys_offset, slot.queries_offset) == offsets


def test_nothing_is_asked_without_a_row(launch: Launch, memory: ChannelMemory, core: ChannelCore) -> None:
    call = call_of([0, 0], 3)
    assert torch.equal(run(launch, memory, call), expected(call))
    assert not core.rung and not memory.error
    call = call_of([1, 0], 3)
    assert torch.equal(run(launch, memory, call), expected(call))


def check_dead(launch: Launch, memory: ChannelMemory, core: ChannelCore, error: int) -> None:
    """Every later call returns at once, with -1, and asks nothing."""
    asked = memory.segment.counters[AT["requests_written"] // 8]
    assert memory.error == error
    core.deaf = False
    began = time.monotonic()
    ids = [run(launch, memory, call_of([1, 2], 2)) for _ in range(3)]
    assert time.monotonic() - began < 5
    assert all((each == -1).all() for each in ids)
    assert memory.segment.counters[AT["requests_written"] // 8] == asked
    assert memory.error == error


def test_a_wait_ends_at_its_bound(launch: Launch, memory: ChannelMemory, core: ChannelCore) -> None:
    run(launch, memory, call_of([1, 1], 1))
    core.deaf = True
    began = time.monotonic()
    assert (run(launch, memory, call_of([1, 1], 1), bound=0.2) == -1).all()
    assert 0.2 <= time.monotonic() - began < 2
    check_dead(launch, memory, core, layout.TIMED_OUT)


def test_a_refusal_ends_a_wait(launch: Launch, memory: ChannelMemory, core: ChannelCore) -> None:
    core.deaf = True
    memory.segment.counters[AT["answers_written"] // 8] += 1
    assert (run(launch, memory, call_of([1, 1], 1)) == -1).all()
    check_dead(launch, memory, core, layout.REFUSED)


def test_the_host_ends_a_wait(launch: Launch, memory: ChannelMemory, core: ChannelCore) -> None:
    core.deaf = True
    memory.kill(layout.ENGINE_GONE)
    assert (run(launch, memory, call_of([1, 1], 1)) == -1).all()
    check_dead(launch, memory, core, layout.ENGINE_GONE)


def test_a_request_behind_one_that_is_not_answered(launch: Launch, memory: ChannelMemory, core: ChannelCore) -> None:
    memory.bytes[layout.CONTROL_AT["written"] :][:8].view(torch.int64).fill_(5)
    assert (run(launch, memory, call_of([1, 1], 1)) == -1).all()
    check_dead(launch, memory, core, layout.UNANSWERED)


@pytest.mark.parametrize("lengths", [[1, 3], [-1, 1]])
def test_lengths_that_the_rows_do_not_have(
    launch: Launch, memory: ChannelMemory, core: ChannelCore, lengths: list[int]
) -> None:
    assert (run(launch, memory, call_of(lengths, 2)) == -1).all()
    check_dead(launch, memory, core, layout.INVALID_LENGTHS)
