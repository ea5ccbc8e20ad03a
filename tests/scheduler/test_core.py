"""The core alone: what it refuses, what it breaks a link for, what it takes and what it leaves to Python."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch

from benchmarks.ring_messages import Request
from blockdex import _native as native
from blockdex.contract.errors import BlockdexError, Code
from blockdex.contract.messages import FloatDtype
from blockdex.ring.layout import AT, IS_STATE, RequestSlot
from blockdex.ring.segment import Sizes
from blockdex_kernels import IndexSpec
from support.bare_core import FIRST_ROW, HELD, LENGTH, LONGEST, SPEC, BareCore, bare_core, check_answer, usual
from support.running_engine import NUMPY_DTYPES, TENANT, close, fork, get, open_sequence, tokens, truncate, values

SIZE = SPEC.block_size
NEXT = (2, LENGTH, 1)


class Case(NamedTuple):
    """What is changed of the usual request, so that just one check fails, and what is said of it."""

    code: Code
    reason: str
    message: str
    slot: dict[str, Any] = {}  # noqa: RUF012
    rows: tuple[tuple[int, ...], ...] = ()
    tenant: str = TENANT


MOST = SPEC.max_sequence_tokens
REFUSED = {
    "an epoch": Case(
        Code.FAILED_PRECONDITION, "EPOCH_MISMATCH", "epoch: request names 1, the cache's is ", {"epoch": 1}
    ),
    "too late": Case(Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "timeout: ", {"deadline": 0}),
    "a layer": Case(Code.INVALID_ARGUMENT, "INVALID_LAYER", "layer must be below 3, got 3", {"layer": 3}),
    "a head": Case(Code.INVALID_ARGUMENT, "INVALID_HEADS", "first_head must be below 2, got 2", {"first_head": 2}),
    "heads": Case(
        Code.INVALID_ARGUMENT, "INVALID_HEADS", "first_head + num_heads must be at most 2, got 1 + 2", {"first_head": 1}
    ),
    "no heads": Case(Code.INVALID_ARGUMENT, "INVALID_HEADS", "num_heads must be at least 1, got 0", {"num_heads": 0}),
    "no tensor": Case(
        Code.INVALID_ARGUMENT,
        "EMPTY_REQUEST",
        "request: has neither keys nor queries",
        {"keys_dtype": 0, "queries_dtype": 0, "keys_bytes": 0, "queries_bytes": 0, "payload_bytes": 128},
    ),
    "keys of another dtype": Case(
        Code.INVALID_ARGUMENT, "INVALID_TENSOR", "keys: [4, 8] of fp32 takes 128 bytes, got 64", {"keys_dtype": 3}
    ),
    "queries of another dtype": Case(
        Code.INVALID_ARGUMENT,
        "INVALID_TENSOR",
        "queries: [4, 2, 8] of fp8_e4m3 takes 64 bytes, got 128",
        {"queries_dtype": 4},
    ),
    "a tenant without a name": Case(
        Code.INVALID_ARGUMENT, "INVALID_TENANT", "blockdex-tenant: must have 1 to 256 characters, got 0", tenant=""
    ),
    "a tenant of other characters": Case(
        Code.INVALID_ARGUMENT,
        "INVALID_TENANT",
        "blockdex-tenant: must be printable ASCII, got 'a\\x0ab'",
        tenant="a\nb",
    ),
    "an unknown tenant": Case(
        Code.NOT_FOUND, "UNKNOWN_SEQUENCE", "sequence 1: unknown (never opened", tenant="another"
    ),
    "an unknown sequence": Case(
        Code.NOT_FOUND, "UNKNOWN_SEQUENCE", "sequence 1000: unknown (never", rows=(NEXT, (1000, LENGTH, 1))
    ),
    "a start below 0": Case(
        Code.INVALID_ARGUMENT, "INVALID_SPANS", "sequence 1: start must be at least 0, got -1", rows=(NEXT, (1, -1, 1))
    ),
    "no tokens": Case(
        Code.INVALID_ARGUMENT, "INVALID_SPANS", "sequence 1: length must be at least 1, got 0", rows=(NEXT, (1, 0, 0))
    ),
    "too many tokens": Case(
        Code.INVALID_ARGUMENT,
        "INVALID_SPANS",
        f"sequence 1: start + length must be at most {MOST}, got 1 + {2**63 - 1}",
        {"keys_dtype": 1},
        rows=((1, 1, 2**63 - 1),),
    ),
    "a sequence twice": Case(
        Code.INVALID_ARGUMENT,
        "DUPLICATE_SEQUENCE",
        "spans: sequence 2 is named 2 times, at most 1 is allowed",
        rows=(NEXT, (1, LENGTH, 1), NEXT),
    ),
    "a gap in the last row": Case(
        Code.OUT_OF_RANGE,
        "APPEND_BEYOND_LENGTH",
        f"sequence 1, layer 1: append starts at {LENGTH + 1}, length is {LENGTH}",
        rows=(NEXT, (3, LENGTH, 1), (1, LENGTH + 1, 1)),
    ),
}


def state(bare: BareCore) -> list[Any]:
    """What the cache's columns hold."""
    held = bare.cache._sequences
    return [column.tolist() for column in (held.lengths, held.revisions, held.held, held.last_calls)]


def ask(bare: BareCore, case: Case) -> tuple[Any, int]:
    """Writes a request that is changed so; its client, and why the core returns."""
    frontend = bare.open_client()
    rows = case.rows or ((1, LENGTH, 1, 5), (2, LENGTH - 2, 3))
    if rows[0][2] > 1000:
        request = tokens(1, rows, keys=np.zeros((1, SPEC.head_dim), np.float32), tenant=case.tenant)
    else:
        request = bare.both(1, *[(row[0], row[1], max(row[2], 1), *row[3:]) for row in rows], tenant=case.tenant)
        request = dataclasses.replace(request, spans=tokens(1, rows).spans)
    frontend.write(RequestSlot(**(frontend.lay(request, 1)._asdict() | case.slot)))
    return frontend, bare.look()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_told_why_and_changes_nothing(bare: BareCore, name: str) -> None:
    case, before = REFUSED[name], state(bare)
    frontend, why = ask(bare, case)
    assert why == 0
    assert frontend.read() == 1
    answer = frontend.told[1].answer
    assert isinstance(answer, BlockdexError)
    assert (answer.code, answer.reason) == (case.code, case.reason)
    assert answer.message.startswith(case.message)
    assert state(bare) == before
    assert bare.core.steps == 0


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no kind": ({"kind": 0}, "kind must be 1 to 10, got 0"),
    "another kind": ({"kind": 11}, "kind must be 1 to 10, got 11"),
    "flags": ({"flags": 32}, "flags must be 0 to 31, got 32"),
    "a dtype of keys": ({"keys_dtype": 5}, "dtype must be 1 to 4, got 5 and 1"),
    "a dtype of queries": ({"queries_dtype": 255}, "dtype must be 1 to 4, got 1 and 255"),
    "keys without a dtype": ({"keys_dtype": 0}, "64 bytes of keys and 128 of queries, one without a dtype"),
    "no order": ({"order": 0}, "order must be 1 to 2, got 0"),
    "an offset": ({"payload_offset": 8}, "bytes at 8 are not in an arena of"),
    "an offset beyond the arena": ({"payload_offset": 1 << 40}, "are not in an arena of"),
    "bytes beyond the arena": ({"payload_bytes": 1 << 40}, "are not in an arena of"),
    "a byte more": ({"payload_bytes": 321}, "its parts take 320 bytes, got 321"),
    "a long tenant": ({"tenant_bytes": 9999}, "a tenant of 9999 bytes in 320"),
    "keys beyond the payload": ({"keys_bytes": 2**64 - 128}, "its parts take"),
    "queries beyond the payload": ({"queries_bytes": 2**64 - 64}, "its parts take"),
    "spans beyond the payload": ({"num_spans": 2**32 - 1}, "its parts take"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_the_layout_forbids_breaks_its_link_alone(bare: BareCore, name: str) -> None:
    slot, why = BROKEN[name]
    before = state(bare)
    _, returned = ask(bare, Case(Code.UNKNOWN, "", "", slot))
    assert returned == native.BROKEN
    broken = bare.core.take_broken()
    assert broken is not None
    line, message = broken
    assert line is bare.lines[0] and line.gone
    assert why in message
    assert bare.core.take_broken() is None
    assert state(bare) == before
    other, request = bare.open_client(), usual(bare)
    other.send(request)
    bare.look()
    bare.look()
    other.read()
    check_answer(other, 0, request)
    bare.core.drop(line)


def test_more_requests_than_there_are_slots_break_a_link(bare: BareCore) -> None:
    frontend = bare.open_client()
    frontend.handles.segment.counters[AT["requests_written"] // 8] = 65
    assert bare.look() == native.BROKEN
    assert bare.core.take_broken() == (bare.lines[0], "ring: more slots are said to be filled than the 64 there are")


def test_a_ticket_that_is_in_flight_already_breaks_its_link(device_core: BareCore) -> None:
    """Else one of two requests would be answered twice, and the other never."""
    bare = device_core
    frontend = bare.open_client()
    frontend.send(bare.both(0, (1, LENGTH, 1)), first_ticket=7)
    assert bare.look() == 0
    frontend.send(bare.both(1, (1, LENGTH, 1)), first_ticket=7)
    assert bare.look() == native.BROKEN
    assert bare.core.take_broken() == (bare.lines[0], "request: ticket 7 is in flight already")
    bare.core.drop(bare.lines[0])
    bare.device.end()
    bare.look()
    assert bare.core.in_flight == 0


TAKEN = {
    "the last layer": ({"layer": SPEC.num_layers - 1}, ()),
    "the longest": ({}, ((1, LENGTH, LONGEST), NEXT)),
    "up to the last token of the last page": ({}, ((1, LENGTH, 4), (2, LENGTH, 4))),
    "from the beginning": ({}, ((1, 0, 2), NEXT)),
    "a page less": ({}, ((1, SIZE, SIZE // 2), NEXT)),
    "with a revision": ({}, ((1, LENGTH, 1, 9), NEXT)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_right_is_entered_and_answered(bare: BareCore, name: str) -> None:
    slot, rows = TAKEN[name]
    frontend = bare.open_client()
    request = bare.both(1, *rows) if rows else usual(bare)
    began, expected = time.monotonic(), bare.lengths.copy()
    frontend.write(frontend.lay(request, 1)._replace(**slot))
    bare.look()
    bare.look()
    frontend.read()
    check_answer(frontend, 1, request)
    layer, spans = slot.get("layer", 1), request.spans
    for sequence, start, length, revision in zip(
        *(column.tolist() for column in (spans.sequence_ids, spans.starts, spans.lengths, spans.revisions)), strict=True
    ):
        expected[layer, sequence - 1] = start + length
        assert bare.revisions[layer, sequence - 1] == revision
        assert began <= bare.cache._sequences.last_calls[sequence - 1] <= time.monotonic()
    np.testing.assert_array_equal(bare.lengths, expected)


LEFT: dict[str, tuple[Callable[[BareCore], Request], str]] = {
    "a page that is not there": (lambda bare: bare.both(0, (1, HELD * SIZE - 1, 2)), "pages"),
    "a page that is shared": (lambda bare: bare.both(0, (3, LENGTH - 1, 2)), "pages"),
    "more tokens than a decode has": (lambda bare: bare.both(0, (1, LENGTH, LONGEST + 1)), "large"),
    "to open": (lambda bare: open_sequence(99), "open"),
    "to get": (lambda bare: get(1), "get"),
    "to fork": (lambda bare: fork(1, 99, 3), "fork"),
    "to truncate": (lambda bare: truncate(1, 3), "truncate"),
    "to close": (lambda bare: close(1), "close"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_takes_a_decision_is_left_to_python_and_holds_back_its_sequences_alone(bare: BareCore, name: str) -> None:
    make, kind = LEFT[name]
    bare.lengths[:, 0] = HELD * SIZE - 1 if "not there" in name else LENGTH
    bare.cache.fork_sequence(TENANT, 3, 50, LENGTH - LENGTH % SIZE)
    bare.lengths[:, 2] = LENGTH - LENGTH % SIZE if "shared" in name else LENGTH
    bare.core.set_sequence_columns(*bare.cache.sequence_columns)
    frontend, other = bare.open_client(), bare.open_client()
    request = make(bare)
    if "shared" in name:
        request = bare.both(0, (3, LENGTH - LENGTH % SIZE - 1, 2))
    frontend.send(request, get(int(request.spans.sequence_ids[0]) if hasattr(request, "spans") else 1))
    free = bare.both(0, (9, LENGTH, 1))
    other.send(free)
    assert bare.look() == native.FOR_PYTHON
    (item, *rest) = bare.take()
    assert item[1] == kind
    assert [kind for _, kind, *_ in rest] == (["get"] if kind in {"open", "large"} else [])
    bare.look()
    assert other.read() == 1, "others are not held up"
    check_answer(other, 0, free)


def test_numbers_that_no_index_has_are_refused() -> None:
    for wrong in ({"block_size": 0}, {"num_index_heads": 65}, {"topk": 0}, {"head_dim": 0}):
        spec = IndexSpec(num_layers=1, num_index_heads=1, head_dim=8, block_size=8, topk=2)
        for name, value in wrong.items():
            object.__setattr__(spec, name, value)
        with pytest.raises(ValueError, match="core: not sizes of an index"):
            make_core(spec)


def make_core(spec: IndexSpec) -> native.Core:
    return native.Core(
        layers=spec.num_layers,
        heads=spec.num_index_heads,
        head_dim=spec.head_dim,
        topk=spec.topk,
        init_blocks=0,
        local_blocks=0,
        block_size=spec.block_size,
        longest=1,
        max_sequence_tokens=100,
        max_spans=1,
        max_queued=1,
        max_message_bytes=1,
        scale=1.0,
        odd_keys=False,
        odd_queries=False,
        nudge=0,
        spin_seconds=0.0,
        hold_seconds=0.0,
        seconds_bounds=(1.0,),
        size_bounds=(1.0,),
    )


@pytest.mark.parametrize("name", [name for name in dir(native.Core) if not name.startswith("_")])
@pytest.mark.parametrize("wrong", [(), (object(),), ("a", None, 3), (-1,), (2**70,), tuple(range(12)), (None,) * 12])
def test_wrong_arguments_are_refused_and_harm_nothing(name: str, wrong: tuple[Any, ...]) -> None:
    core = make_core(IndexSpec(num_layers=1, num_index_heads=1, head_dim=8, block_size=8, topk=2))
    method = getattr(core, name)
    if callable(method):
        try:
            method(*wrong)
        except (TypeError, ValueError, OverflowError, RuntimeError, BufferError):
            return


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "fp8_e4m3"])
def test_tensors_are_rounded_once(device_core: BareCore, dtype: FloatDtype) -> None:
    """Every fp16 and e4m3 number, and fp32 numbers between those of bf16: to the nearest, at a tie the even one."""
    bare = device_core
    numbers = every(dtype)
    wanted = torch.tensor(numbers).bfloat16().view(torch.uint16).numpy()
    frontend = bare.open_client()
    for at in range(0, len(numbers), LONGEST * SPEC.head_dim):
        part = numbers[at : at + LONGEST * SPEC.head_dim].reshape(LONGEST, SPEC.head_dim)
        queries = np.stack([part] * SPEC.num_index_heads, axis=1)
        rows = [(1, LENGTH, LONGEST)]
        frontend.send(tokens(0, rows, keys=part, queries=queries, dtype=dtype, rollback=True), first_ticket=at)
        bare.look()
        seen = bare.device.begun[0]
        staged = seen.keys[:LONGEST].reshape(-1)
        same = (staged == wanted[at : at + staged.size]) | np.isnan(part.reshape(-1))
        assert same.all()
        assert np.isnan(staged.view(ml_dtypes.bfloat16).astype(np.float32)[np.isnan(part.reshape(-1))]).all()
        np.testing.assert_array_equal(seen.queries[:LONGEST, 1].reshape(-1), staged)
        bare.device.end()
        bare.look()
        frontend.read()
        bare.lengths[0, 0] = LENGTH


def every(dtype: FloatDtype) -> np.ndarray[Any, np.dtype[np.float32]]:
    if dtype == "fp32":
        bits = np.random.default_rng(5).integers(0, 2**32, 4096, np.uint32)
        bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000  # ties
        return bits.view(np.float32)
    if dtype == "fp8_e4m3":
        every_byte = np.arange(256, dtype=np.uint8).view(NUMPY_DTYPES[dtype])
        return np.asarray(every_byte.astype(np.float32))
    halves = np.arange(0, 2**16, 7, dtype=np.uint16).view(np.float16).astype(np.float32)
    return halves[: len(halves) // 32 * 32]


def test_rounding_to_odd_first_makes_two_roundings_one() -> None:
    """Keys that become e4m3 on the device come there as bf16."""
    random = np.random.default_rng(6)
    numbers = np.concatenate([random.normal(size=2000), random.normal(size=2000) * 0.01, [17.0, 17.0001, 19.0, 448.0]])
    numbers = numbers.astype(np.float32)[: 4000 // 32 * 32]
    with bare_core(replays=[(256, 2, 1000), (128, LONGEST, 1000)], odd_keys=True) as bare:
        frontend = bare.open_client()
        for at in range(0, len(numbers), LONGEST * SPEC.head_dim):
            part = numbers[at : at + LONGEST * SPEC.head_dim].reshape(LONGEST, SPEC.head_dim)
            frontend.send(tokens(0, [(1, LENGTH, LONGEST)], keys=part, dtype="fp32", rollback=True), first_ticket=at)
            bare.look()
            staged = torch.from_numpy(bare.device.begun[0].keys[:LONGEST]).view(torch.bfloat16)
            assert torch.equal(
                staged.float().to(torch.float8_e4m3fn).float(), torch.from_numpy(part).to(torch.float8_e4m3fn).float()
            )
            bare.device.end()
            bare.look()
            frontend.read()
            bare.lengths[0, 0] = LENGTH


def test_an_answer_for_which_there_is_never_room_is_refused(bare: BareCore) -> None:
    ids = 4 * 2 * SPEC.num_index_heads * SPEC.topk
    exact, small = (bare.open_client(Sizes(4, 1 << 16, 2 * size)) for size in (ids, ids - 32))
    for number, frontend in enumerate((exact, small)):
        frontend.send(bare.both(0, (1 + number, LENGTH, 2)))
    bare.look()
    bare.look()
    assert (exact.read(), small.read()) == (1, 1)
    refused = small.told[0].answer
    assert isinstance(refused, BlockdexError)
    assert refused.message == f"answer: {ids} bytes, there is room for {ids - 32}"
    assert (bare.lengths[0, 0], bare.lengths[0, 1]) == (LENGTH + 2, LENGTH)


def test_limits() -> None:
    """A span too many, a byte too many of keys and queries together, a request too many."""
    token_bytes = 2 * SPEC.head_dim * (1 + SPEC.num_index_heads)
    cases: tuple[tuple[dict[str, Any], str | None], ...] = (
        ({"max_spans": 2, "max_message_bytes": 4 * token_bytes}, None),
        ({"max_spans": 1}, "INVALID_SPANS"),
        ({"max_message_bytes": 4 * token_bytes - 1}, "MESSAGE_TOO_LARGE"),
        ({"max_queued": 1}, "OVERLOADED"),
    )
    for options, reason in cases:
        with bare_core(**options) as bare:
            frontend = bare.open_client()
            if reason == "OVERLOADED":
                queries = values(np.random.default_rng(1), 1, SPEC.num_index_heads, SPEC.head_dim)
                frontend.send(tokens(0, [(1, LENGTH + 5, 1)], queries=queries, wait=True), first_ticket=9)
            frontend.send(usual(bare))
            bare.look()
            bare.look()
            assert frontend.read() == 1
            answer = frontend.told[0].answer
            assert getattr(answer, "reason", None) == reason


def test_chosen_ids_collide_with_nobody() -> None:
    """50,000 ids that collide under a plain multiplicative hash cost another tenant's batch nothing."""

    def seconds(index: native.SequenceIndex) -> float:
        best = 1.0
        for _ in range(20):
            began = time.perf_counter()
            for sequence in range(256):
                assert index.find("innocent", sequence) == sequence
            best = min(best, time.perf_counter() - began)
        return best

    index = native.SequenceIndex()
    for sequence in range(256):
        index.open("innocent", sequence, sequence)
    before = seconds(index)
    inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
    for number in range(50_000):
        index.open("flooding", (number << 40 | 5) * inverse % 2**64, 300 + number)
    assert len(index) == 50_256
    assert seconds(index) < 3 * before


def test_an_index_against_a_dict() -> None:
    random = np.random.default_rng(8)
    index, held = native.SequenceIndex(), dict[tuple[str, int], tuple[int, int]]()
    for number in range(20_000):
        tenant, sequence = f"t{random.integers(40)}", int(random.integers(60))
        there = held.get((tenant, sequence))
        assert index.find(tenant, sequence) == (None if there is None else there[1])
        if there is None and random.random() < 0.6:
            held[tenant, sequence] = index.open(tenant, sequence, number), number
            assert index.tenant(held[tenant, sequence][0]) == tenant
        elif there is not None:
            index.close(there[0], sequence)
            del held[tenant, sequence]
        assert len(index) == len(held)
    with pytest.raises(KeyError):
        index.close(1, 2**64 - 1)


def test_an_idle_core_checks_the_columns(bare: BareCore) -> None:
    frontend = bare.open_client()
    for entry in range(16):
        bare.cache.trim(entry)
    bare.core.set_sequence_columns(*bare.cache.sequence_columns)
    bare.core.run(0.05)
    counted = bare.counted
    assert (counted["integrity_checks"], counted["integrity_faults"]) == (1, 0)
    bare.core.run(0.05)
    assert bare.counted["integrity_checks"] == 1, "nothing has changed since"
    holders, pages = bare.cache._pool.holders, bare.cache._sequences.pages(3)
    for harm, undo in (
        (lambda: holders.__setitem__(pages[0], 2), lambda: holders.__setitem__(pages[0], 1)),
        (lambda: bare.lengths.__setitem__((1, 3), 31), lambda: bare.lengths.__setitem__((1, 3), LENGTH)),
        (
            lambda: bare.cache._pool.free_pages.__iadd__(1),
            lambda: bare.cache._pool.free_pages.__isub__(1),
        ),
        (
            lambda: bare.cache._sequences.tables.cells.__setitem__(64 * (FIRST_ROW + 3), 9999),
            lambda: bare.cache._sequences.tables.cells.__setitem__(64 * (FIRST_ROW + 3), pages[0]),
        ),
    ):
        before = bare.counted["integrity_faults"]
        harm()
        frontend.send(get(1), first_ticket=before)
        assert bare.look() == native.FOR_PYTHON
        for number, *_ in bare.take():
            bare.core.answer(number, IS_STATE, 0, 0, 0, 0, None, None)
        bare.core.run(0.05)
        assert bare.counted["integrity_faults"] > before
        undo()
