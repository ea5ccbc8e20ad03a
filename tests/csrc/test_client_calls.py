"""The C client's calls, made by a program on a real engine."""

from __future__ import annotations

import asyncio
import re
from asyncio.subprocess import PIPE
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.ring_messages import Answer, Request, TokenAnswer, TokenRequest
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import (
    CloseSequences,
    ForkSequence,
    GetSequence,
    OpenSequences,
    SequenceState,
    TruncateSequence,
)
from blockdex.ring.layout import DTYPES, ORDERS, PAGES, RAW_SCORES, RETURN_SCORES, ROLLBACK, WAIT_FOR_KEYS
from blockdex_kernels import IndexSpec
from blockdex_kernels.reference import select
from support.c_programs import FLAGS, PACKAGE, Built
from support.client_requests import TENANT, client_requests, naive_answers
from support.pool_model import PoolModel
from support.programs import REPOSITORY, program, run
from support.ring_engine import hosted
from support.running_engine import SPEC, keys_of, queries_of, tokens


def line_of(request: Request) -> bytes:
    """A request as the program reads it."""
    match request:
        case OpenSequences(sequence_ids=(sequence_id,), lease_seconds=(lease,)):
            return f"open {sequence_id} {lease}\n".encode()
        case CloseSequences(sequence_ids=(sequence_id,)):
            return f"close {sequence_id}\n".encode()
        case GetSequence(sequence_id=sequence_id):
            return f"get {sequence_id}\n".encode()
        case ForkSequence(parent_id=parent, child_id=child, length=length):
            return f"fork {parent} {child} {length}\n".encode()
        case TruncateSequence(sequence_id=sequence_id, length=length):
            return f"truncate {sequence_id} {length}\n".encode()
        case TokenRequest():
            return _line_of_tokens(request)
    raise AssertionError(request)


def _line_of_tokens(request: TokenRequest) -> bytes:
    spans, keys, queries = request.spans, request.keys, request.queries
    flags, order, first_head, heads = 0, 0, 0, 0
    if keys is not None and keys.rollback:
        flags |= ROLLBACK
    if queries is not None:
        order, first_head, heads = ORDERS.index(queries.order) + 1, queries.first_head, queries.num_heads
        flags |= RETURN_SCORES * queries.return_scores | RAW_SCORES * queries.raw_scores
        flags |= WAIT_FOR_KEYS * queries.wait_for_keys | PAGES * queries.pages
    numbers = [request.layer, flags, order, first_head, heads]
    carried = [b"" if half is None else bytes(half.tensor.data) for half in (keys, queries)]
    for half, data in zip((keys, queries), carried, strict=True):
        numbers += [0 if half is None else DTYPES.index(half.tensor.dtype) + 1, len(data)]
    columns = (spans.sequence_ids, spans.starts, spans.lengths, spans.revisions)
    numbers += [len(spans.lengths), *np.stack(columns, axis=1, dtype=np.uint64, casting="unsafe").ravel().tolist()]
    return f"tokens {' '.join(map(str, numbers))}\n".encode() + b"".join(carried)


def words_of(answer: Answer | BlockdexError, request: Request) -> str:
    """An answer as the program prints it."""
    if isinstance(answer, BlockdexError):
        return f"error {answer.code.value} {answer.reason} {answer.message}"
    if isinstance(answer, TokenAnswer):
        printed = [] if answer.block_ids is None else [str(number) for number in answer.block_ids.ravel()]
        printed += [] if answer.scores is None else [f"{number:.9g}" for number in answer.scores.ravel().tolist()]
        return " ".join(["tokens", *printed])
    assert isinstance(answer, SequenceState)
    lengths = [] if answer.lengths is None else answer.lengths.tolist()
    revisions = answer.revisions.tolist() if isinstance(request, GetSequence) and answer.revisions is not None else []
    return " ".join(map(str, ["state", *lengths, *revisions]))


@pytest.mark.parametrize("where", [(), ("regions",)], ids=["arena", "regions"])
async def test_calls_are_answered_as_one_after_another_would_be(built: Built, where: tuple[str, ...]) -> None:
    asked = [request for request in client_requests(np.random.default_rng(5)) if request.epoch == 0]
    async with hosted() as serving:
        command = (*built("client_calls"), serving.address.replace("\0", "@"), TENANT, *where)
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
        said, errors = await asyncio.wait_for(process.communicate(b"".join(map(line_of, asked))), 60)
        assert process.returncode == 0, (said, errors)
        expected = naive_answers(asked, serving.engine.info().epoch)
    lines = [re.sub(r"\|.*", "", line) for line in said.decode().splitlines()]
    assert lines == [words_of(*each) for each in zip(expected, asked, strict=True)]


async def test_calls_on_a_pool(built: Built, random: np.random.Generator) -> None:
    model = PoolModel(SPEC, 6, 3, 4)
    keys, queries = keys_of(random, 20), queries_of(random, 2)
    model.set_cells(1, 0, [4, 2, 5])
    model.append(0, 1, 0, keys)
    rows = model.keys(0, 1, 20)
    ids = select(torch.from_numpy(rows), torch.from_numpy(queries), 18, SPEC).block_ids.numpy()
    by_page = np.where(ids >= 0, model.cells[1][ids], -1)
    lines = [
        b"create-pool 9 6 3 4\n",
        b"set-cells 9 1 0 3 4 2 5\n",
        b"set-cells 9 1 3 1 -1\n",  # as a number it is larger than any
        b"set-cells 8 1 0 1 4\n",
        b"use-pool 9\n",
        _line_of_tokens(tokens(0, [(1, 0, 20, 1)], keys=keys)),
        _line_of_tokens(tokens(0, [(1, 18, 2, 1)], queries=queries)),
        _line_of_tokens(tokens(0, [(1, 18, 2)], queries=queries, pages=True)),
        _line_of_tokens(tokens(0, [(2, 0, 2)], queries=queries)),
        b"close-pool 9\n",
        b"close-pool 9\n",
    ]
    expected = [
        "state",
        "state",
        "error 3 INVALID_POOL pool 9: page_id must be below 6, got 18446744073709551615",
        "error 5 UNKNOWN_POOL pool 8: unknown (never created, or closed)",
        "tokens",
        " ".join(["tokens", *map(str, ids.ravel())]),
        " ".join(["tokens", *map(str, by_page.ravel())]),
        "error 9 PAGE_NOT_SET pool 9, row 2, layer 0: block 0 has no page, the span ends at 2",
        "state",
        "state",
    ]
    async with hosted() as serving:
        command = (*built("client_calls"), serving.address.replace("\0", "@"), TENANT)
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        said, _ = await asyncio.wait_for(process.communicate(b"".join(lines)), 60)
    assert [re.sub(r"\|.*", "", line) for line in said.decode().splitlines()] == expected


async def test_a_refusal_has_its_numbers(built: Built) -> None:
    async with hosted() as serving:
        command = (*built("client_calls"), serving.address.replace("\0", "@"), TENANT)
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        said, _ = await asyncio.wait_for(process.communicate(b"fork 7 8 5000\n"), 60)
    message = "sequence 7: length must be 0 to 4096, got 5000"
    numbers = "sequence_id=7|length=5000|max_sequence_tokens=4096"
    assert said.decode() == f"error 3 INVALID_LENGTH {message}|{numbers}\n"


async def test_the_program_of_the_documentation(tmp_path: Path) -> None:
    """It compiles without a warning, and prints what the page shows."""
    page = (REPOSITORY / "docs" / "c-client.md").read_text(encoding="utf-8")
    source, printed = (
        re.findall(rf"^```{kind}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[0] for kind in ("c", "text")
    )
    (tmp_path / "page.c").write_text(source)
    compile_page = (
        program("gcc", "build-essential"),
        *FLAGS,
        "-pedantic",
        tmp_path / "page.c",
        "-o",
        tmp_path / "page",
    )
    run(*compile_page)
    async with hosted(IndexSpec(num_layers=1), num_pages=8) as serving:
        process = await asyncio.create_subprocess_exec(
            tmp_path / "page", serving.address.replace("\0", "@"), stdout=PIPE
        )
        said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, said.decode()) == (0, printed)


@pytest.mark.parametrize("language", ["c -std=gnu11", "c -std=c11 -D_GNU_SOURCE", "c++ -std=c++17", "c++ -std=c++20"])
def test_the_headers_compile_without_a_warning(language: str) -> None:
    flags = ("-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-pedantic", "-Werror", "-O2", "-fsyntax-only")
    include = PACKAGE / "ring" / "include"
    run(
        program("g++", "build-essential"),
        "-x",
        *language.split(),
        *flags,
        f"-I{include}",
        "-",
        text='#include "blockdex_client.h"\n',
    )
