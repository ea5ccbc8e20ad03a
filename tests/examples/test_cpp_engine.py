"""The C++ engine, built with CMake, on a real engine core; it notices an answer that is not its own."""

from __future__ import annotations

import asyncio
import re
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
import torch

from blockdex_kernels.interface import Spans
from support.programs import REPOSITORY, program, run
from support.ring_engine import hosted
from support.running_engine import SPEC

SOURCE = REPOSITORY / "examples" / "cpp_engine"
SEQUENCES, PROMPT, STEPS = 3, 50, 20


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp_engine")
    cmake = program("cmake", "cmake")
    run(cmake, "-S", SOURCE, "-B", folder, "-D", "CMAKE_CXX_FLAGS=-Werror", seconds=120)
    run(cmake, "--build", folder, seconds=120)
    return folder / "cpp_engine"


async def outcome(engine: Path, address: str) -> tuple[int | None, str, str]:
    """Its status, and what it says."""
    command = (engine, address.replace("\0", "@"), str(SEQUENCES), str(PROMPT), str(STEPS))
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    said, errors = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, said.decode(), errors.decode()


async def test_every_answer_is_its_own(engine: Path) -> None:
    async with hosted() as run:
        status, said, errors = await outcome(engine, run.address)
        assert (status, errors) == (0, "")
        assert run.engine.info().cache.sequences == 0, "it closes what it has opened"
    took = r"p50 [\d.]+ us, p99 [\d.]+ us\n"
    checked = SEQUENCES * (PROMPT + STEPS) * SPEC.num_index_heads * SPEC.num_layers
    words = f"prefill, a layer: {took}decode, a layer: {took}decode, all layers: {took}{checked} selections checked\n"
    assert re.fullmatch(words, said), said


async def test_another_answer_ends_it(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some keys are not those that it appended."""
    async with hosted() as run:
        append, calls = run.backend.append, run.backend.calls

        def append_others(keys: torch.Tensor, spans: Spans) -> None:
            append(-keys if len(calls) > 20 else keys, spans)

        monkeypatch.setattr(run.backend, "append", append_others)
        status, _, errors = await outcome(engine, run.address)
    assert status == 1
    assert re.fullmatch(r"layer \d, sequence \d, position \d+: other blocks than its own\n", errors), errors


async def test_a_server_that_is_not_there_is_named(engine: Path) -> None:
    status, _, errors = await outcome(engine, "/nowhere/ring.sock")
    assert status == 1
    assert errors == "UNREACHABLE: link: cannot connect to /nowhere/ring.sock (No such file or directory)\n"
