"""The compiled way beside the Python one: the same bytes, the same answers, the same refusals."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from google.rpc import code_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdex.client import compiled, requests
from blockdex.client.call import Call
from blockdex.client.core import _begin_append
from blockdex.client.frames import answer_of, frame_of, number_of
from blockdex.client.kinds import APPEND_AND_SELECT, APPEND_KEYS, SELECT_BLOCKS, Kind
from blockdex.client.ledger import Ledger
from blockdex.client.requests import Queries, Spans
from blockdex.client.selection import selection_of
from blockdex.client.writer import Writer
from blockdex.contract.errors import BlockdexError, InternalError
from blockdex.contract.messages import Limits
from blockdex.v1 import indexer_pb2 as pb
from blockdex_kernels import IndexSpec
from support.clients import some_info

SPEC = IndexSpec(num_layers=3, num_index_heads=4, head_dim=4, topk=4, max_sequence_tokens=300)
LIMITS = Limits(max_message_bytes=700, max_spans=4, max_queued_requests=1, max_stream_requests=1, max_wait_ms=1)
INFO = replace(some_info(), spec=SPEC, limits=LIMITS, epoch=2**63 + 5)
KINDS = (APPEND_KEYS, SELECT_BLOCKS, APPEND_AND_SELECT)
DTYPES: tuple[Any, ...] = (ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e4m3fn)
SHAPE = (2, 4, 4)
ASKED = Queries(np.zeros((2, 4, 4), np.float32), 0, 0, "ascending", False)


@contextmanager
def in_python() -> Any:
    """As where nothing is compiled."""
    native, compiled.native = compiled.native, None
    try:
        yield
    finally:
        compiled.native = native


def outcome(call: Callable[[], Any]) -> Any:
    """What it answers, or how it fails."""
    try:
        return call()
    except (BlockdexError, TypeError, ValueError, OverflowError) as error:
        return type(error), str(error), getattr(error, "reason", None)


def assert_alike(call: Callable[[], Any]) -> Any:
    found = outcome(call)
    with in_python():
        assert outcome(call) == found
    return found


# --- Requests ---


def pick(*usual: Any, unusual: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Mostly what is usual."""
    return st.sampled_from(usual * 12 + unusual)


@st.composite
def arguments(draw: st.DrawFn) -> tuple[Kind, Spans, list[int], Any, Queries | None]:
    """A data call as the clients' methods pass it on: mostly right, and wrong in every way at times."""
    runs = draw(pick(1, 2, 4, unusual=(0, 5)))

    def column(usual: tuple[int, ...], unusual: tuple[int, ...]) -> list[int]:
        return draw(st.lists(pick(*usual, unusual=unusual), min_size=runs, max_size=runs))

    spans = Spans(
        layer=draw(pick(0, 2, unusual=(3, -1, 2**32, np.int64(1), True))),
        sequences=draw(st.lists(st.integers(0, 2**64 - 1), min_size=runs, max_size=runs, unique=draw(pick(True)))),
        lengths=column((1, 2, 3), (0, 300, 2**32 - 1)),
        starts=None,
        revisions=draw(st.just([]) | st.lists(st.integers(0, 2**64 - 1), min_size=runs, max_size=runs)),
        epoch=draw(pick(None, 0, 9, unusual=(2**64, -1, np.uint64(3)))),
    )
    if runs > 1 and draw(pick(False, unusual=(True,))):
        spans.sequences[-1] = spans.sequences[0]
    starts = column((0, 127, 128, 290), (-1, 299, 2**32, 2**64 - 1))
    if draw(pick(False, unusual=(True,))):
        draw(st.sampled_from((starts, spans.lengths, spans.revisions))).append(1)
    kind, first_head, num_heads = draw(pick(*KINDS)), draw(pick(0, 1, unusual=(4, -1))), draw(pick(0, 2, unusual=(5,)))
    tokens, heads = draw(pick(sum(spans.lengths), unusual=(1,))) % 64, (num_heads or 4 - first_head) % 8
    keys = draw(tensors(tokens, 4)) if kind is not SELECT_BLOCKS else None
    queries = None
    if kind is not APPEND_KEYS:
        order = draw(pick("ascending", "score", unusual=("upwards", None, [])))
        scored = draw(pick(False, True))
        waits = kind is SELECT_BLOCKS and draw(pick(False, True))
        queries = Queries(draw(tensors(tokens, heads, 4)), first_head, num_heads, order, scored, waits)
    return kind, spans, starts, keys, queries


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> Any:
    dtype = draw(pick(*DTYPES, unusual=(np.float64, np.dtype(">f4"), np.int16)))
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 9, shape).astype(dtype)
    ways: dict[str, Callable[[], Any]] = {
        "as it is": lambda: values,
        "torch": lambda: torch.from_numpy(values.astype(np.float32)),
        "strided": lambda: np.repeat(values, 2, axis=0)[::2],
        "masked": lambda: np.ma.MaskedArray(values.astype(np.float32), mask=values == 3, fill_value=7),
        "flat": lambda: values.reshape(-1),
        "transposed": lambda: values.T,
        "turned": lambda: np.ascontiguousarray(values.T),
        "regrouped": lambda: values.reshape(-1, *([1] * (values.ndim - 2)), shape[-1]),
        "list": values.tolist,
        "read-only": lambda: np.frombuffer(values.tobytes(), values.dtype).reshape(shape),
    }
    return ways[draw(pick("as it is", unusual=tuple(ways)))]()


@settings(max_examples=1000, deadline=None)
@given(arguments())
def test_requests_are_written_alike_or_refused_alike(arguments: Any) -> None:
    kind, spans, starts, keys, queries = arguments
    found = assert_alike(lambda: Writer(INFO).write(kind, spans, starts, keys, queries))
    if isinstance(found[0], bytes):
        kind.request.FromString(found[0])


def begun(arguments: Any, known: list[int | None], named: bool, ledger: Ledger) -> Any:
    """An append by the ledger: its bytes, its shape and the lengths that it makes; then, that it is undone."""
    kind, spans, starts, keys, queries = arguments
    runs = spans.layer, spans.sequences, spans.lengths, starts if named else None, spans.revisions or None, spans.epoch
    for sequence, length in zip(spans.sequences, known, strict=False):
        if length is not None:
            ledger.open(sequence, [length] * SPEC.num_layers)

    def lengths() -> Any:
        return [
            [outcome(partial(ledger.last_positions, layer, [sequence], [0])) for layer in range(3)]
            for sequence in spans.sequences
        ]

    before = lengths()
    try:
        written = ledger.write_append(kind, runs, keys, queries)
        quick = written is not None
        request, shape, append = written or _begin_append(kind, ledger, runs, keys, queries)
    except (BlockdexError, TypeError, ValueError, OverflowError) as error:
        assert lengths() == before, "a refused append counts for nothing"
        return False, (type(error), str(error), getattr(error, "reason", None))
    after = lengths()
    ledger.fail_append(append, changed_nothing=True)
    assert lengths() == before
    return quick, (request, shape, after)


@settings(max_examples=1000, deadline=None)
@given(
    arguments().filter(lambda call: call[0] is not SELECT_BLOCKS),
    st.lists(st.sampled_from((0, 5, 128, 290, None)), min_size=5, max_size=5),
    st.booleans(),
)
def test_appends_are_written_and_counted_alike(arguments: Any, known: list[int | None], named: bool) -> None:
    """In one call in C, and step by step in Python; what is refused leaves the books as they were."""
    _, found = begun(arguments, known, named, Ledger(INFO))
    with in_python():
        quick, expected = begun(arguments, known, named, Ledger(INFO))
    assert not quick
    assert found == expected


@pytest.mark.parametrize("starts", [None, [3, 0]])
def test_plain_appends_go_the_compiled_way(starts: list[int] | None) -> None:
    ledger = Ledger(INFO)
    for sequence, length in ((7, 3), (8, 0)):
        ledger.open(sequence, [length] * SPEC.num_layers)
    runs = (1, [7, 8], [1, 1], starts, None, None)
    written = ledger.write_append(APPEND_AND_SELECT, runs, np.zeros((2, 4), np.float32), ASKED)
    assert written is not None
    message = pb.AppendAndSelectRequest.FromString(written[0])
    assert (list(message.spans.starts), list(message.spans.lengths), written[1]) == ([3, 0], [1, 1], SHAPE)
    assert ledger.last_positions(1, [7, 8], [0, 0]) == [4, 1]
    assert ledger.last_positions(0, [7, 8], [0, 0]) == [3, 0]
    assert ledger.write_append(APPEND_AND_SELECT, (1, [9], [1], None, None, None), np.zeros((1, 4)), ASKED) is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.rpc)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_what_is_usual_goes_the_compiled_way(kind: Kind, dtype: str, library: str) -> None:
    def tensor(*shape: int) -> Any:
        if library == "torch":
            return torch.zeros(shape).to(getattr(torch, dtype))
        return np.zeros(shape, getattr(ml_dtypes, dtype, dtype))

    keys = None if kind is SELECT_BLOCKS else tensor(3, 4)
    queries = Queries(None, 0, 0, "ascending", False) if kind is APPEND_KEYS else replace(ASKED, tensor=tensor(3, 4, 4))
    spans = Spans(layer=1, sequences=[7, 8], lengths=[1, 2], starts=None, revisions=[], epoch=None)
    written = Writer(INFO)._write_quickly(kind, spans, [0, 9], keys, queries)
    assert written is not None
    with in_python():
        plain = Writer(INFO).write(kind, spans, [0, 9], keys, None if kind is APPEND_KEYS else queries)
    assert written == plain


@settings(deadline=None)
@given(
    st.one_of(
        st.lists(st.sampled_from((0, 1, 2**32 - 1, 2**32, 2**64 - 1, 2**64, -1, True, np.int64(3), 1.5, None, 2**200))),
        st.sampled_from((3, (1, 2), range(3), np.arange(3), np.uint64(2**64 - 1), "12", None, -4)),
    ),
    st.sampled_from((32, 64)),
)
def test_integers_are_taken_alike_or_refused_alike(value: Any, bits: int) -> None:
    assert_alike(lambda: requests.integers("starts", value, bits=bits))


def test_a_column_is_the_callers_no_longer() -> None:
    theirs = [1, 2]
    ours = requests.integers("starts", theirs, bits=32)
    theirs.append(3)
    assert ours == [1, 2]


# --- Answers ---

IDS = pb.Tensor(dtype=pb.DTYPE_INT32, data=np.arange(32, dtype="<i4").tobytes())
SCORES = pb.Tensor(dtype=pb.DTYPE_FP32, data=np.arange(32, dtype="<f4").tobytes())
TENSORS = (
    IDS,
    SCORES,
    pb.Tensor(dtype=pb.DTYPE_INT32, data=bytes(124)),
    pb.Tensor(dtype=pb.DTYPE_BF16, data=IDS.data),
    pb.Tensor(dtype=pb.DTYPE_INT32),
    pb.Tensor(data=IDS.data),
    pb.Tensor(),
    None,
)


def seen(selection: Any) -> Any:
    """What a selection holds, so that two compare."""
    pair = selection if isinstance(selection, tuple) else (selection,)
    return [(array.dtype, array.shape, array.tobytes(), array.flags.writeable) for array in pair]


@pytest.mark.parametrize("kind", [SELECT_BLOCKS, APPEND_AND_SELECT], ids=lambda kind: kind.rpc)
@pytest.mark.parametrize("block_ids", TENSORS)
@pytest.mark.parametrize("scores", TENSORS)
@pytest.mark.parametrize("scored", [False, True])
def test_answers_are_read_alike(kind: Kind, block_ids: Any, scores: Any, scored: bool) -> None:
    answer = kind.response(block_ids=block_ids, scores=scores, epoch=3).SerializeToString()
    found = assert_alike(lambda: seen(selection_of(kind, answer, replace(ASKED, return_scores=scored), SHAPE)))
    right = block_ids is IDS and (not scored or scores is SCORES)
    assert not right or isinstance(found, list)
    native: Any = compiled.native
    taken = native.read_selection(answer, 128, scored) is not None
    assert taken is right or (right and scores not in (SCORES, None)), "left to Python where there is something odd"


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that are cut, changed, repeated, or have others in between."""
    places, noise = st.integers(0, len(whole)), st.binary(max_size=12)
    cut = st.builds(lambda a, b, new: whole[: min(a, b)] + new + whole[max(a, b) :], places, places, noise)
    return cut | st.builds(lambda place: whole[:place], places) | st.just(whole + whole) | noise


RESPONSE = pb.SelectBlocksResponse(block_ids=IDS, scores=SCORES, epoch=3)


@settings(max_examples=1000, deadline=None)
@given(damaged(RESPONSE.SerializeToString()), st.booleans())
def test_damaged_answers_are_read_alike(answer: bytes, scored: bool) -> None:
    asked = replace(ASKED, return_scores=scored)
    assert_alike(lambda: seen(selection_of(SELECT_BLOCKS, answer, asked, SHAPE)))


FRAMES = {
    "append_keys": pb.StreamResponse(request_id=5, append_keys=pb.AppendKeysResponse(epoch=3)),
    "select_blocks": pb.StreamResponse(request_id=2**64 - 1, select_blocks=RESPONSE),
    "append_and_select": pb.StreamResponse(request_id=5, append_and_select=pb.AppendAndSelectResponse(block_ids=IDS)),
    "error": pb.StreamResponse(request_id=5, error=status_pb2.Status(code=code_pb2.ABORTED, message="stale")),
    "nothing": pb.StreamResponse(request_id=5),
    "no number": pb.StreamResponse(select_blocks=RESPONSE),
}


def same_message(kind: Kind, answer: Any) -> Any:
    return kind.response.FromString(answer) if isinstance(answer, bytes) else answer


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.rpc)
@pytest.mark.parametrize("name", FRAMES)
def test_frames_are_opened_alike(kind: Kind, name: str) -> None:
    frame = FRAMES[name].SerializeToString()
    assert number_of(frame) == FRAMES[name].request_id
    found = assert_alike(lambda: same_message(kind, answer_of(kind, frame)))
    assert (found == getattr(FRAMES[name], kind.field)) is (FRAMES[name].WhichOneof("response") == kind.field)
    unknown = frame + b"\x7a\x03abc"
    assert assert_alike(lambda: same_message(kind, answer_of(kind, unknown))) == found


def test_an_answer_in_two_pieces_is_put_together() -> None:
    pieces = [pb.SelectBlocksResponse(scores=SCORES, epoch=3), pb.SelectBlocksResponse(block_ids=IDS)]
    frame = b"".join(pb.StreamResponse(request_id=5, select_blocks=piece).SerializeToString() for piece in pieces)
    assert assert_alike(lambda: same_message(SELECT_BLOCKS, answer_of(SELECT_BLOCKS, frame))) == RESPONSE


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(sorted(FRAMES)).flatmap(lambda name: damaged(FRAMES[name].SerializeToString())))
def test_damaged_frames_are_opened_alike(frame: bytes) -> None:
    def whole() -> Any:
        try:
            answer = answer_of(SELECT_BLOCKS, frame)
            return seen(selection_of(SELECT_BLOCKS, answer, ASKED, SHAPE))
        except InternalError:
            return "no answer"  # The frame, or what it holds: which is said depends on who sees it first.

    assert_alike(lambda: number_of(frame))
    assert_alike(whole)


@given(st.integers(1, 2**64 - 1), st.floats(1e-4, 1e8), st.integers(0, 40_000), st.sampled_from(KINDS))
def test_frames_are_what_protobuf_would_write(number: int, timeout: float, size: int, kind: Kind) -> None:
    body = kind.request(layer=1, spans=pb.Spans(lengths=[7] * size)).SerializeToString()
    call: Call[None] = Call(kind.rpc, body, 0.0, lambda answer: None, repeatable=False, kind=kind)
    frame = assert_alike(lambda: frame_of(call, number, timeout))
    message = pb.StreamRequest.FromString(frame)
    assert message.request_id == number
    assert message.timeout_ms == min(-int(-1000 * timeout // 1), 2**32 - 1)
    assert getattr(message, kind.field).SerializeToString() == body
    assert message.SerializeToString() == frame


# --- The ledger ---

WATCHES = ("ask", "answer", "cut", "end cut", "fail cut")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("append", "append", "append", "end", "end", "fail", "fail certain", *WATCHES, "close")),
        st.integers(0, 2),
        st.lists(st.integers(1, 4), max_size=4),
        st.booleans(),
    ),
    max_size=40,
)


class Story:
    """What is done to a ledger, step by step."""

    def __init__(self) -> None:
        self.ledger = Ledger(INFO)
        self.appends: list[Any] = []
        self.questions: list[Any] = []
        self.cuts: list[Any] = []
        for sequence in (1, 2, 3):
            self.ledger.open(sequence, [10, 20, 30])

    def go(self, step: str, layer: int, sequences: list[int], named: bool) -> Any:
        ledger, lengths = self.ledger, [len(sequences) + at for at in range(len(sequences))]
        if step == "append":
            starts = [5 * sequence for sequence in sequences] if named else None
            self.appends.append(ledger.begin_append(layer, sequences, lengths, starts))
            return self.appends[-1].starts
        if step in {"end", "fail", "fail certain"} and self.appends:
            append = self.appends.pop(layer % len(self.appends))
            ledger.end_append(append) if step == "end" else ledger.fail_append(append, step == "fail certain")
        for sequence in sequences[:1]:
            if step == "close":
                ledger.close(sequence)
            if step in {"ask", "cut"}:
                begin = ledger.begin_question if step == "ask" else ledger.begin_truncation
                watches = self.questions if step == "ask" else self.cuts
                watches.append(begin(sequence))
                return watches[-1].writes
        if step == "answer" and self.questions:
            ledger.end_question(self.questions.pop(layer % len(self.questions)), [7, 8, 9])
        if step in {"end cut", "fail cut"} and self.cuts:
            watch = self.cuts.pop(layer % len(self.cuts))
            ledger.end_truncation(watch, [3, 3, 3]) if step == "end cut" else ledger.fail_truncation(watch, named)
        return None

    def known(self) -> Any:
        return [
            outcome(partial(self.ledger.last_positions, layer, [sequence], [0]))
            for sequence in (1, 2, 3, 4)
            for layer in range(3)
        ]


@settings(deadline=None)
@given(STEPS)
def test_both_ledgers_count_alike(steps: Any) -> None:
    compiled_one = Story()
    with in_python():
        plain = Story()
    for step in steps:
        assert outcome(lambda: compiled_one.go(*step)) == outcome(lambda: plain.go(*step))  # noqa: B023 - called here
        assert compiled_one.known() == plain.known()
