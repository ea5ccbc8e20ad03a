"""Steps begun one after the other, several on their way, are answered as calls of the kernels one by one."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from blockdex.executor.cuda_graphs import Shape
from blockdex.executor.factory import make_executor
from blockdex.executor.gpu import GpuExecutor
from blockdex.executor.interface import COLUMNS, Packed, Pending, Replay, Step, StepBuffer, keys_offset
from blockdex.executor.prefill_slices import SliceShape
from blockdex_kernels import IndexSpec, cuda_driver
from blockdex_kernels.interface import RUN_APPENDS, RUN_SELECTS, RUN_WANTS_SCORES, Order, Selection, Spans
from blockdex_kernels.triton import decode, prefill, prefill_sm90, rank
from blockdex_kernels.triton.gpu import GpuBackend
from support.triton_device import DEVICE

ROW, BLOCKS, SEQUENCES = 64, 300, 12
SECONDS = 20.0


class Both:
    """A executor, and a backend of the same pages that is called directly."""

    def __init__(self, spec: IndexSpec, generator: torch.Generator) -> None:
        self.spec, self.generator = spec, generator
        pages = SEQUENCES * BLOCKS
        self.executor = make_executor(GpuBackend(spec, pages, DEVICE, reason="tested"), ROW)
        self.direct = GpuBackend(spec, pages, DEVICE, reason="tested")
        history = torch.randn(pages, spec.num_layers, 128, 128, generator=generator).to(self.direct.pages.dtype)
        for backend in (self.executor.backend, self.direct):
            backend.pages.copy_(history)
        torch.cuda.synchronize()
        self.executor.use_device()
        room = -(-BLOCKS // ROW)
        self.cells: NDArray[np.int32] = np.zeros((1 + SEQUENCES * room) * ROW, np.int32)
        self.rows = 1 + np.arange(SEQUENCES) * room
        tables = torch.randperm(pages, generator=generator).view(SEQUENCES, BLOCKS).int()
        for row, table in zip(self.rows, tables.numpy(), strict=True):
            self.cells[row * ROW : row * ROW + BLOCKS] = table
        self.tables = tables.to(DEVICE)
        self.executor.write_tables(self.cells, np.arange(len(self.cells)))

    def step(self, lengths: list[int], dtype: torch.dtype, heads: int, **options: Any) -> tuple[Step, list[int]]:
        """A step of sequences, layers and positions drawn at random, which appends and selects."""
        draw = self.generator
        chosen = torch.randperm(SEQUENCES, generator=draw)[: len(lengths)].tolist()
        layers = torch.randint(0, self.spec.num_layers, (len(lengths),), generator=draw).tolist()
        starts = [int(torch.randint(0, BLOCKS * 128 - length, (), generator=draw)) for length in lengths]
        columns = np.array([layers, starts, lengths, self.rows[chosen], [0] * len(lengths)], np.int32)
        keys, queries = (self.packed(lengths, dtype, count) for count in (1, heads))
        return Step(columns, keys, queries, **options), chosen

    def packed(self, lengths: list[int], dtype: torch.dtype, heads: int) -> Packed:
        parts = [
            torch.randn(length, heads, 128, generator=self.generator).to(dtype).view(torch.uint8).numpy().tobytes()
            for length in lengths
        ]
        return Packed(dtype, heads, parts)

    def expected(self, step: Step, chosen: list[int], phase: str) -> Selection:
        layers, starts, lengths, *_ = torch.from_numpy(step.columns).to(DEVICE)
        spans = Spans(layers, starts, lengths, self.tables[chosen], step.columns[:3])
        if step.keys is not None:
            self.direct.append(_tensor(step.keys)[:, 0], spans)
        assert step.queries is not None
        select = getattr(self.direct, phase)
        selection: Selection = select(_tensor(step.queries), spans, order=step.order, return_scores=step.return_scores)
        return selection


def _tensor(packed: Packed) -> torch.Tensor:
    data = torch.cat([torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in packed.parts])
    return data.view(packed.dtype).view(-1, packed.heads, 128).to(DEVICE)


def wait(pending: Pending) -> None:
    until = time.monotonic() + SECONDS
    while not pending.done():
        assert time.monotonic() < until, "not done in time"


def check(pending: Pending, expected: Selection) -> None:
    wait(pending)
    answer = pending.answer()
    assert answer is not None
    np.testing.assert_array_equal(answer.block_ids, expected.block_ids.cpu().numpy())
    if expected.scores is not None:
        np.testing.assert_array_equal(answer.scores, expected.scores.cpu().numpy())


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_steps_of_all_kinds(key_dtype: Any, generator: torch.Generator) -> None:
    """Of all shapes, two on their way, and what they wrote is the same to the last bit."""
    both = Both(IndexSpec(num_layers=2, key_dtype=key_dtype), generator)
    draw = generator
    kinds: list[tuple[torch.dtype, int, Order, bool]] = [
        (torch.bfloat16, 4, "ascending", False),
        (torch.bfloat16, 1, "ascending", False),
        (torch.bfloat16, 4, "score", True),
        (torch.float16, 4, "ascending", False),
        (torch.float32, 2, "ascending", True),
    ]
    waiting: list[tuple[Pending, Selection]] = []
    for number in range(60):
        dtype, heads, order, scores = kinds[0] if number % 2 else kinds[number // 2 % len(kinds)]
        runs = int(torch.randint(1, SEQUENCES + 1, (), generator=draw))
        longest = (1, 1, 3, 16)[number % 4]
        lengths = torch.randint(1, longest + 1, (runs,), generator=draw).tolist()
        step, chosen = both.step(lengths, dtype, heads, order=order, return_scores=scores)
        expected = both.expected(step, chosen, "decode")
        torch.cuda.synchronize()
        if number % 3 == 0:
            # Keys and queries apart: a step each.
            while waiting:
                check(*waiting.pop(0))
            appended = both.executor.begin(Step(step.columns, step.keys))
            step = Step(step.columns, None, step.queries, order, scores)
            wait(appended)
            assert appended.answer() is None
        if len(waiting) == both.executor.max_pending:
            check(*waiting.pop(0))
        waiting.append((both.executor.begin(step), expected))
    while waiting:
        check(*waiting.pop(0))
    torch.cuda.synchronize()
    assert torch.equal(both.executor.backend.pages.view(torch.uint8), both.direct.pages.view(torch.uint8))


def test_prefills_beside_decodes(generator: torch.Generator) -> None:
    both = Both(IndexSpec(num_layers=2), generator)
    steps = []
    for length in (1000, 17, 4096):
        step, chosen = both.step([length], torch.bfloat16, 4)
        step = Step(step.columns, None, step.queries, "score", return_scores=True)
        steps.append((step, both.expected(step, chosen, "prefill")))
    torch.cuda.synchronize()
    pending = [(both.executor.begin_prefill(step), expected) for step, expected in steps]
    while [one for one, _ in pending if not one.done()]:
        step, chosen = both.step([1] * 8, torch.bfloat16, 4)
        selecting = Step(step.columns, None, step.queries)
        expected = both.expected(selecting, chosen, "decode")
        torch.cuda.synchronize()
        check(both.executor.begin(selecting), expected)
    for one, expected in pending:
        check(one, expected)


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_slices_as_graphs(key_dtype: Any, generator: torch.Generator) -> None:
    """More than there are slots, of several shapes, and others in between."""
    both = Both(IndexSpec(num_layers=2, key_dtype=key_dtype), generator)
    executor = both.executor
    assert isinstance(executor, GpuExecutor)
    shapes = [SliceShape(rows, 512) for rows in (1024, 4096)] + [SliceShape(1024, 256)]
    for shape in shapes:
        executor._slices.capture(shape)
    executor.use_device()
    kinds = [(200, 4), (1, 4), (1024, 4), (257, 4), (256, 4), (700, 1), (999, 4), (3000, 4), (17, 3), (1000, 2)]
    steps = []
    for number, (length, heads) in enumerate(kinds):
        step, chosen = both.step([length], torch.bfloat16, heads)
        step.columns[1] = 0 if heads == 1 else BLOCKS * 128 - length
        scores = number == 4
        step = Step(step.columns, None, step.queries, return_scores=scores)
        steps.append((step, both.expected(step, chosen, "prefill")))
    torch.cuda.synchronize()
    assert {SliceShape.of(step, both.spec) for step, _ in steps} > set(shapes)
    waiting: list[tuple[Pending, Selection]] = []
    for step, expected in steps:
        if len(waiting) == executor.max_slices:
            check(*waiting.pop(0))
        waiting.append((executor.begin_prefill(step), expected))
    for pending, expected in waiting:
        check(pending, expected)
        assert pending.device_seconds > 0
    for shape in shapes:
        executor._slices.capture(shape)
    torch.cuda.synchronize()


def test_any_number_of_heads_takes_the_same_kernels(generator: torch.Generator) -> None:
    """Which ranks meet in a batch is chance: nobody is to wait for a compiler for it."""
    both = Both(IndexSpec(num_layers=1), generator)
    hopper = both.direct.kernels["prefill"][0].startswith("gluon")
    scoring = prefill_sm90._prefill_scores_sm90_kernel if hopper else prefill._prefill_scores_kernel
    kernels = (decode._decode_scores_kernel, scoring, rank._rank_kernel)
    variants: list[list[int]] = []
    for heads in (4, 1, 2, 3):
        for length, phase in ((1, "decode"), (1100, "prefill")):
            made, chosen = both.step([length], torch.bfloat16, heads)
            made.columns[1] = BLOCKS * 128 - length
            step = Step(made.columns, None, made.queries, "score", return_scores=True)
            begin = both.executor.begin if phase == "decode" else both.executor.begin_prefill
            expected = both.expected(step, chosen, phase)
            torch.cuda.synchronize()
            check(begin(step), expected)
        caches = [kernel.device_caches[both.direct.device.index][0] for kernel in kernels]
        variants.append([len(cache) for cache in caches])
    assert all(variants[0])
    assert variants == variants[:1] * 4


def test_a_slice_without_memory(generator: torch.Generator) -> None:
    """Fails where it is waited for; the next one does not."""
    both = Both(IndexSpec(num_layers=2), generator)
    step, chosen = both.step([1000], torch.float32, 4)
    step = Step(step.columns, None, step.queries)
    expected = both.expected(step, chosen, "prefill")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            wait(both.executor.begin_prefill(step))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    check(both.executor.begin_prefill(step), expected)


FLAGS = (
    RUN_APPENDS | RUN_SELECTS,
    RUN_SELECTS,
    RUN_APPENDS,
    RUN_SELECTS | RUN_WANTS_SCORES,
    RUN_APPENDS | RUN_SELECTS | RUN_WANTS_SCORES,
)


@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_steps_that_are_made_in_step_buffers(key_dtype: Any, generator: torch.Generator) -> None:
    """Whoever writes a step into a buffer and launches its program finds the answer there, as the kernels give it.

    Each run has what its flags say. Half way the tables outgrow their memory, of which the programs know nothing.
    """
    both = Both(IndexSpec(num_layers=2, key_dtype=key_dtype), generator)
    executor = both.executor
    assert isinstance(executor, GpuExecutor)
    for shape in (Shape(8, 1, 1024), Shape(2, 4, 1024)):
        executor._graphs.capture(shape)
    steps = executor._graphs.replays()
    launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(cuda_driver.address_of("cuGraphLaunch"))
    for number in range(48):
        if number == 24:
            _move_tables(both)
        replay, buffer = steps[number % 2], executor.step_buffers()[number // 2 % 2]
        runs = int(torch.randint(1, replay.runs + 1, (), generator=generator))
        lengths = torch.randint(1, replay.length + 1, (runs,), generator=generator).tolist()
        step, chosen = both.step(lengths, torch.bfloat16, 4)
        step.columns[4] = [FLAGS[index] for index in torch.randint(len(FLAGS), (runs,), generator=generator).tolist()]
        expected = _expected(both, step, chosen)
        torch.cuda.synchronize()
        ids, scores = _make(step, buffer, replay)
        assert launch(replay.programs[number // 2 % 2], executor._main.cuda_stream) == 0
        flags = np.repeat(step.columns[4], step.columns[2])
        wanted = np.flatnonzero(flags & RUN_WANTS_SCORES)
        until = time.monotonic() + SECONDS
        while (ids == -2).any() or np.isnan(scores[wanted]).any():
            assert time.monotonic() < until, "not done in time"
        selecting = (flags & RUN_SELECTS)[:, None, None] != 0
        assert expected.scores is not None
        np.testing.assert_array_equal(ids[: len(flags)], np.where(selecting, expected.block_ids.cpu().numpy(), -1))
        assert (ids[len(flags) :] == -1).all()
        np.testing.assert_array_equal(scores[wanted], expected.scores.cpu().numpy()[wanted])
    torch.cuda.synchronize()
    assert torch.equal(executor.backend.pages.view(torch.uint8), both.direct.pages.view(torch.uint8))


def _expected(both: Both, step: Step, chosen: list[int]) -> Selection:
    """What the kernels do when they are called for those runs that append, and then for all."""
    assert step.keys is not None and step.queries is not None
    layers, starts, lengths, _, flags = torch.from_numpy(step.columns).to(DEVICE)
    spans = Spans(layers, starts, lengths, both.tables[chosen], step.columns[:3])
    appends = (flags & RUN_APPENDS) != 0
    own = Spans(layers[appends], starts[appends], lengths[appends], both.tables[chosen][appends])
    both.direct.append(_tensor(step.keys)[:, 0][appends.repeat_interleave(lengths.long())], own)
    return both.direct.decode(_tensor(step.queries), spans, order="ascending", return_scores=True, raw_scores=True)


def _move_tables(both: Both) -> None:
    """Gives every sequence a page table far behind the memory that there was."""
    far = 2 * both.executor._tables.mapped // ROW  # type: ignore[attr-defined]
    cells = np.zeros(len(both.cells) + far * ROW, np.int32)
    cells[far * ROW :] = both.cells
    both.cells, both.rows = cells, both.rows + far
    began = time.monotonic()
    both.executor.write_tables(cells, np.arange(far * ROW, len(cells)))
    assert time.monotonic() - began < 0.1


def _make(step: Step, buffer: StepBuffer, replay: Replay) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Writes a step into a buffer; the places of its block ids and scores, which are made to look unwritten."""
    columns = np.zeros((COLUMNS, replay.runs), np.int32)
    columns[:, : step.columns.shape[1]] = step.columns
    assert step.keys is not None
    assert step.queries is not None
    at = keys_offset(replay.runs)
    buffer.host[: columns.nbytes] = columns.reshape(-1).view(np.uint8)
    for packed in (step.keys, step.queries):
        data = _tensor(packed).cpu().view(torch.uint8).view(-1).numpy()
        buffer.host[at : at + len(data)] = data
        at += 2 * replay.runs * replay.length * packed.heads * 128
    buffer.host[at : at + 8 * 9 * replay.runs * replay.length] = 0  # no addresses: all is here
    size = replay.runs * replay.length * 4 * 16
    ids, scores = buffer.block_ids[:size].reshape(-1, 4, 16), buffer.scores[:size].reshape(-1, 4, 16)
    ids[:], scores[:] = -2, np.nan
    return ids, scores


def test_tables_follow_their_changes(generator: torch.Generator) -> None:
    both = Both(IndexSpec(num_layers=2), generator)
    others = [torch.full((4096,), 7, device=DEVICE) for _ in range(256)]
    for _ in range(8):
        places = np.array([int(both.rows[3]) * ROW + block for block in (0, 7, 299, 7)])
        pages = torch.randint(0, SEQUENCES * BLOCKS, (3,), generator=generator).int()
        both.cells[places[:3]] = pages.numpy()
        both.tables[3, [0, 7, 299]] = pages.to(DEVICE)
        both.executor.write_tables(both.cells, places)
        step, _ = both.step([1], torch.bfloat16, 4)
        columns = np.array([[1], [BLOCKS * 128 - 1], [1], [both.rows[3]], [0]], np.int32)
        step = Step(columns, None, step.queries)
        expected = both.expected(step, [3], "decode")
        torch.cuda.synchronize()
        check(both.executor.begin(step), expected)
    assert all(bool((other == 7).all()) for other in others)  # what writes them has memory of its own
