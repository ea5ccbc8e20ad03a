"""Kernels on a device of their own: what crosses to it and back, when it is full, and when it is lost."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
import torch

from benchmarks.ring_messages import TokenAnswer
from blockdex.contract.errors import Code, Reason, ResourceExhaustedError
from blockdex.executor import shared_memory
from blockdex.executor.interface import Answer, Pending, check_patience
from blockdex.ring.server import RingInbox
from blockdex.scheduler.loop import Engine
from blockdex_kernels import IndexSpec, cuda_driver
from blockdex_kernels.triton.gpu import GpuBackend
from support.cache_state import check_integrity
from support.ring_caller import RingCaller
from support.running_engine import (
    LIMITS,
    keys_of,
    open_sequence,
    queries_of,
    running,
    tokens,
    values,
)
from support.triton_device import DEVICE

A, B = 1, 2


def test_memory_of_another_gpu_is_taken_where_the_own_one_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver of two GPUs, of which the first reaches the second, and not the other way round."""
    uuids = (b"\0" * 16, b"\1" * 16)
    monkeypatch.setattr(cuda_driver, "device_uuid", uuids.__getitem__)
    monkeypatch.setattr(cuda_driver, "can_reach", lambda device, other: device < other)
    for device, owner in ((0, 0), (0, 1)):
        shared_memory.check_owner(device, owner, uuids[owner].hex())
    with pytest.raises(RuntimeError, match=f"is said to lie on GPU {uuids[0].hex()}, lies on {uuids[1].hex()}"):
        shared_memory.check_owner(0, 1, uuids[0].hex())
    with pytest.raises(RuntimeError, match=f"GPU {uuids[0].hex()}, which the server's, {uuids[1].hex()}, cannot reach"):
        shared_memory.check_owner(1, 0, uuids[0].hex())


async def test_a_full_device_refuses_the_selection_alone(random: np.random.Generator) -> None:
    async with running() as run:
        await run.ask(open_sequence(A))
        await run.ask(tokens(0, [(A, 0, 200)], keys=keys_of(random, 200)))
        asked = tokens(0, [(A, 100, 100)], queries=queries_of(random, 100))
        expected = await run.select(asked)
        epoch, pages = run.engine.info().epoch, run.backend.pages.view(torch.int16).clone()

        run.backend.fault, run.backend.error = "prefill", torch.OutOfMemoryError("made for this test")
        error = await run.refusal(asked)

        assert isinstance(error, ResourceExhaustedError)
        assert (error.reason, error.message) == (Reason.OVERLOADED, "device: no memory left to select with")
        assert run.engine.info().epoch == epoch
        assert run.backend.pages.view(torch.int16).equal(pages)
        check_integrity(run.engine._cache)
        assert not run.engine._launcher.prefills
        np.testing.assert_array_equal(await run.select(asked), expected)


async def test_a_full_device_refuses_every_part_of_a_request(random: np.random.Generator) -> None:
    """A short span, which is decode, beside long ones, which are not taken up any more."""
    async with running() as run:
        for sequence in (A, B):
            await run.ask(open_sequence(sequence))
            await run.ask(tokens(0, [(sequence, 0, 200)], keys=keys_of(random, 200)))
        asked = tokens(0, [(A, 0, 200), (B, 199, 1)], queries=queries_of(random, 201))
        run.backend.fault, run.backend.error = "decode", torch.OutOfMemoryError("made for this test")

        assert (await run.refusal(asked)).reason == Reason.OVERLOADED

        await run.settled()
        assert run.backend.tokens("prefill") == 0
        assert not run.engine._launcher.prefills


async def test_a_full_device_at_an_append_begins_a_new_epoch(random: np.random.Generator) -> None:
    """The books say already that the keys are there."""
    async with running() as run:
        await run.ask(open_sequence(A))
        epoch = run.engine.info().epoch
        run.backend.fault, run.backend.error = "append", torch.OutOfMemoryError("made for this test")

        error = await run.refusal(tokens(0, [(A, 0, 20)], keys=keys_of(random, 20)))

        assert (error.code, run.engine.info().epoch == epoch) == (Code.INTERNAL, False)
        assert not run.engine.device_is_lost


async def test_a_lost_device_is_told_once_and_everything_refused(random: np.random.Generator) -> None:
    told = threading.Semaphore(0)
    async with running() as run:
        run.engine._on_lost_device = told.release
        await run.ask(open_sequence(A))
        for _ in range(2):
            run.backend.fault, run.backend.lost = "append", True
            await run.refusal(tokens(0, [(A, 0, 20)], keys=keys_of(random, 20)))
            await run.ask(open_sequence(A))
        assert run.engine.device_is_lost
        assert told.acquire(blocking=False)
        assert not told.acquire(blocking=False)


async def test_a_device_that_hangs_is_not_waited_for(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that never ends, begun by kernels that are called as always: its time is up at once."""
    told = threading.Semaphore(0)

    class Hanging(Pending):
        def done(self) -> bool:
            check_patience(-1e9)
            return False

        def answer(self) -> Answer | None:
            raise AssertionError("it has none")

    async with running() as run:
        run.engine._on_lost_device = told.release
        monkeypatch.setattr(run.backend, "synchronize", lambda: time.sleep(3600))
        monkeypatch.setattr(run.engine._executor, "begin", lambda step: Hanging())
        for sequence in (A, B):
            await run.ask(open_sequence(sequence))
        both = tokens(0, [(A, 0, 20), (B, 0, 2)], keys=keys_of(random, 22), queries=queries_of(random, 22))
        error = await run.refusal(both)
        assert error.code == Code.INTERNAL
        assert await asyncio.to_thread(told.acquire, timeout=20)
        assert run.engine.device_is_lost


TRITON_SPEC = IndexSpec(num_layers=2, num_index_heads=2, head_dim=16, block_size=16, topk=4, max_sequence_tokens=4096)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
async def test_the_triton_kernels_answer_as_the_cpu_s(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine with either, asked the same: products of small integers are exact, so no flip is to be had."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backend = GpuBackend(TRITON_SPEC, 64, DEVICE, reason="tested")
    inbox = RingInbox(0.0)
    engine = Engine(backend, limits=LIMITS, inbox=inbox, decode_queries=3, prefill_slice_seconds=1e-6)
    channel = RingCaller(engine, inbox)
    keys = [values(random, length, 16) for length in (100, 40, 4)]
    queries = [values(random, length, 2, 16) for length in (100, 40, 4)]
    both = [(A, 100, 2), (B, 40, 2)]
    requests = [
        tokens(1, [(A, 0, 100)], keys=keys[0], queries=queries[0]),
        tokens(1, [(B, 0, 40)], keys=keys[1], queries=queries[1], scores=True, dtype="fp32"),
        tokens(1, both, keys=keys[2], queries=queries[2], order="score", scores=True),
    ]
    async with running(TRITON_SPEC, num_pages=64) as run:
        channel.start()
        try:
            for sequence in (A, B):
                await run.ask(open_sequence(sequence))
                await asyncio.wait_for(channel.submit(open_sequence(sequence), 20), 40)
            for request in requests:
                expected = await run.ask(request)
                answer = await asyncio.wait_for(channel.submit(request, 60), 100)
                assert isinstance(answer, TokenAnswer)
                assert isinstance(expected, TokenAnswer)
                assert answer.block_ids is not None
                np.testing.assert_array_equal(answer.block_ids, expected.block_ids)
                if expected.scores is not None:
                    np.testing.assert_array_equal(answer.scores, expected.scores)
        finally:
            channel.stop()
