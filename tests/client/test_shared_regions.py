"""Memory that a client shares: the same answers as of copies, nothing copied, and what cannot be is refused."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import blockdex
from blockdex import Client, DeadlineExceededError, InvalidArgumentError, Reason, UnimplementedError, _native
from blockdex.client.ledger import Ledger
from blockdex.client.requests import NO_POOL, maker_of
from blockdex.client.shared_regions import SharedRegion, answer_into, new_region
from blockdex.ring.layout import REQUEST_STRUCT, SLOT_BYTES, RequestSlot
from blockdex.ring.segment import Sizes
from blockdex.ring.sharing import HostMemory
from support.clients import FLAVOURS, connect, new_sequence, some_info
from support.serving import Serving
from support.shared_memory import files, mappings
from support.strange_server import strange_server

RINGS = [name for name, flavour in FLAVOURS.items() if flavour.transport == "ring"]
TOKENS, HEADS, DIM, TOPK = 300, 4, 128, 16
BYTES = 4 << 20
PARTS = ("keys", "queries", "answer")


@pytest.fixture(params=RINGS)
def client(request: pytest.FixtureRequest, server: Serving) -> Iterator[Client]:
    with connect(FLAVOURS[request.param], server.grpc_address, timeout=20) as client:
        yield client


@pytest.fixture
def sequence(client: Client) -> Iterator[int]:
    sequence = new_sequence()
    client.open_sequence(sequence)
    yield sequence
    client.close_sequence(sequence)


def values(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)


def moved(region: SharedRegion, array: Any) -> Any:
    """A copy that lies in the region."""
    there = region.empty(array.shape, array.dtype)
    there[:] = array
    return there


# --- The same answers, in place ---


@pytest.mark.parametrize("inside", [each for n in range(4) for each in itertools.combinations(PARTS, n)], ids="+".join)
def test_each_tensor_may_lie_in_a_region(client: Client, sequence: int, inside: tuple[str, ...]) -> None:
    keys, queries = values(TOKENS, DIM), values(TOKENS, HEADS, DIM)
    ids, scores = client.append_and_select(0, sequences=sequence, keys=keys, queries=queries, return_scores=True)
    region = client.share(BYTES)
    shape, out = (TOKENS, HEADS, TOPK), None
    if "answer" in inside:
        out = (region.empty(shape, np.int32), region.empty(shape, np.float32))
        out[0][:] = 77
    got = client.append_and_select(
        1,
        sequences=sequence,
        keys=moved(region, keys) if "keys" in inside else keys,
        queries=moved(region, queries) if "queries" in inside else queries,
        return_scores=True,
        out=out,
    )
    assert out is None or got is out
    np.testing.assert_array_equal(got[0], ids)
    np.testing.assert_array_equal(got[1], scores)
    client.release(region)


def test_torch_tensors_too(client: Client, sequence: int) -> None:
    region = client.share(BYTES)
    keys, queries = torch.randn(TOKENS, DIM).bfloat16(), torch.randn(TOKENS, HEADS, DIM).bfloat16()
    expected = client.append_and_select(0, sequences=sequence, keys=keys, queries=queries)
    out = region.empty((TOKENS, HEADS, TOPK), torch.int32)
    client.append_keys(1, sequences=sequence, keys=moved(region, keys))
    got = client.select_blocks(1, sequences=sequence, lengths=TOKENS, queries=moved(region, queries), out=out)
    assert got is out
    assert torch.equal(got, expected)
    client.release(region)


def test_a_prefill_of_16384_queries(server: Serving) -> None:
    tokens = 16384
    others: Any = {"first_head": 2, "num_heads": 1}
    with Client(server.grpc_address, transport="ring") as client:
        sequence, region = new_sequence(), client.share(tokens * (2 * DIM + 2 * DIM + 4 * TOPK))
        keys, queries = moved(region, values(tokens, DIM)), values(tokens, 1, DIM)
        client.open_sequence(sequence)
        client.append_keys(0, sequences=sequence, keys=keys)
        expected = client.select_blocks(0, sequences=sequence, lengths=tokens, queries=queries, **others)
        out, queries = region.empty(expected.shape, np.int32), moved(region, queries)
        client.select_blocks(0, sequences=sequence, lengths=tokens, queries=queries, out=out, **others)
        np.testing.assert_array_equal(out, expected)
        client.close_sequence(sequence)


def test_what_does_not_begin_at_a_multiple_of_64_is_copied(client: Client, sequence: int) -> None:
    region = client.share(BYTES)
    keys, queries = values(2, DIM), values(2, HEADS, DIM)
    expected = client.append_and_select(0, sequences=sequence, keys=keys, queries=queries)
    bytes_of_keys = region.empty(keys.nbytes + 2, np.uint8)
    apart = bytes_of_keys[2:].view(keys.dtype).reshape(keys.shape)
    apart[:] = keys
    every_other = region.empty((4, HEADS, DIM), queries.dtype)[::2]
    every_other[:] = queries
    got = client.append_and_select(1, sequences=sequence, keys=apart, queries=every_other)
    np.testing.assert_array_equal(got, expected)


def test_threads_share_over_links_of_their_own(server: Serving) -> None:
    with Client(server.grpc_address, transport="ring", timeout=20) as client:
        region = client.share(BYTES)
        keys, queries = moved(region, values(TOKENS, DIM)), moved(region, values(TOKENS, HEADS, DIM))
        found: list[Any] = []
        together = threading.Barrier(4)

        def work() -> None:
            sequence, out = new_sequence(), region.empty((TOKENS, HEADS, TOPK), np.int32)
            client.open_sequence(sequence)
            for _ in range(5):
                together.wait(20)
                client.append_and_select(
                    0, sequences=sequence, keys=keys, queries=queries, out=out, starts=0, rollback=True
                )
            found.append(out)
            client.close_sequence(sequence)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(found) == 4
        for each in found:
            np.testing.assert_array_equal(each, found[0])
        client.release(region)


@contextlib.contextmanager
def lent(region: SharedRegion, number: int) -> Iterator[Any]:
    """A link over which the first 8,192 bytes are region `number`; yields what sends a request and returns its slot."""
    with strange_server(Sizes(slots=8, request_bytes=1 << 20, answer_bytes=1 << 16)) as (address, engine):
        connection = _native.RingConnection(address, "tenant", 10.0, 4, 8, 1 << 20)
        connection.lend(region.memory.address, 8192, number)
        segment, sent = engine.segment, itertools.count()

        def slot_of(request: Any) -> RequestSlot:
            ticket = request.submit(connection, 1.0)
            assert isinstance(ticket, int), ticket
            at = segment.request_slots_offset + next(sent) * SLOT_BYTES
            return RequestSlot(*REQUEST_STRUCT.unpack_from(segment.memory, at))

        slot_of.connection = connection  # type: ignore[attr-defined]
        yield slot_of
        connection.close()


def request_of(keys: Any, queries: Any) -> Any:
    selection = (queries, 0, 0, "ascending", False, False)
    return Ledger(some_info(), _native).make(2, 0, 7, None, 0, None, None, keys, *selection, False, *NO_POOL)


def test_what_lies_in_a_region_is_named_and_not_copied() -> None:
    region = SharedRegion(HostMemory(BYTES))
    other = SharedRegion(HostMemory(BYTES))
    keys, queries = region.empty((2, DIM), np.float32), region.empty((2, HEADS, DIM), np.float32)
    out = region.empty((2, HEADS, TOPK), np.int32)
    with lent(region, 9) as slot_of:
        request = request_of(keys, queries)
        answer_into(request, (region,), out, False)
        slot = slot_of(request)
        assert (slot.keys_region, slot.queries_region, slot.block_ids_region, slot.scores_region) == (9, 9, 9, 0)
        assert (slot.keys_offset, slot.queries_offset) == (0, keys.nbytes)
        assert (slot.block_ids_offset, slot.payload_bytes) == (keys.nbytes + queries.nbytes, 64)
        slot = slot_of(request_of(other.empty((2, DIM), np.float32), queries))
        assert (slot.keys_region, slot.queries_region, slot.payload_bytes) == (0, 9, 64 + keys.nbytes)
        for begin, expected in ((16, 0), (8192 - keys.nbytes, 9), (8192 - keys.nbytes + 64, 0), (8192, 0)):
            at_end = np.ndarray(keys.shape, keys.dtype, region.memory.buffer, begin)  # type: ignore[union-attr]
            assert slot_of(request_of(at_end, queries)).keys_region == expected
        slot_of.connection.take_back(9)
        assert slot_of(request_of(keys, queries)).keys_region == 0
        assert request.submit(slot_of.connection, 1.0)[:2] == (3, "INVALID_REGION")


def test_a_request_of_a_region_is_no_message() -> None:
    region = SharedRegion(HostMemory(BYTES))
    request = request_of(np.zeros((1, DIM), np.float32), np.zeros((1, HEADS, DIM), np.float32))
    answer_into(request, (region,), region.empty((1, HEADS, TOPK), np.int32), False)
    for write in (request.message, lambda: request.frame(1, 1)):
        with pytest.raises(RuntimeError, match="goes over a ring alone"):
            write()


def test_memory_of_a_device_is_never_copied() -> None:
    """The address of such an array means nothing to this process."""
    region = SharedRegion(HostMemory(BYTES))
    queries = region.empty((1, HEADS, DIM), np.float32)
    for elsewhere in ("keys", "queries"):

        def array_of(name: str, tensor: Any, apart: str = elsewhere) -> tuple[Any, bool]:
            return tensor[0], name == apart

        maker: Any = maker_of(some_info(), _native, array_of)
        selection = ([queries], 0, 0, "ascending", False, False)
        request = maker.make(
            2, 0, 7, None, 0, None, None, [np.zeros((1, DIM), np.float32)], *selection, False, *NO_POOL
        )
        for write in (request.message, lambda made=request: made.frame(1, 1)):
            with pytest.raises(RuntimeError, match="goes over a ring alone"):
                write()
        with lent(region, 9) as slot_of:
            if elsewhere == "queries":
                assert slot_of(request).queries_region == 9
                slot_of.connection.take_back(9)
            refused = (3, "INVALID_REGION", f"{elsewhere}: must lie in memory that is shared with the server")
            assert request.submit(slot_of.connection, 1.0) == refused


# --- Life of a region ---


def mapped_by(server: Serving) -> int:
    """Regions that the server's processes have mapped."""
    return sum(Path(f"/proc/{pid}/maps").read_text("ascii").count("blockdex-region") for pid in server.pids())


def test_a_region_is_given_back(client: Client, sequence: int, server: Serving) -> None:
    held: list[tuple[int, int, int]] = []
    for _ in range(3):
        region = client.share(BYTES)
        keys, out = moved(region, values(1, DIM)), region.empty((1, HEADS, TOPK), np.int32)
        client.append_keys(0, sequences=sequence, keys=keys)
        there = mapped_by(server)
        client.release(region)
        client.append_keys(1, sequences=sequence, keys=keys)  # copied now
        with pytest.raises(InvalidArgumentError) as refused:
            client.select_blocks(0, sequences=sequence, queries=values(1, HEADS, DIM), out=out)
        assert refused.value.reason == Reason.INVALID_REGION
        assert mapped_by(server) == there - 1
        del region, keys, out, refused
        gc.collect()
        held.append((files(), mappings(), there))
    assert held[0] == held[1] == held[2]
    assert client.get_sequence(sequence).lengths == (3, 3, 0)


def test_more_than_the_server_takes_is_refused_and_harms_nothing(client: Client, sequence: int) -> None:
    with pytest.raises(blockdex.ResourceExhaustedError, match=f"{17 << 30} bytes, the link may share"):
        client.share(17 << 30)
    region = client.share(BYTES)
    client.append_keys(0, sequences=sequence, keys=moved(region, values(1, DIM)))


def test_a_region_outlives_a_request_that_was_given_up(client: Client, sequence: int) -> None:
    region = client.share(BYTES)
    queries, out = moved(region, values(1, HEADS, DIM)), region.empty((1, HEADS, TOPK), np.int32)
    with pytest.raises(DeadlineExceededError):
        client.select_blocks(0, sequences=sequence, queries=queries, starts=0, wait_for_keys=True, out=out, timeout=0.2)
    client.release(region)
    client.append_keys(0, sequences=sequence, keys=values(1, DIM))


# --- What cannot be ---


@pytest.mark.parametrize("name", [name for name in FLAVOURS if name not in RINGS])
def test_other_transports_say_so(server: Serving, name: str) -> None:
    with connect(FLAVOURS[name], server.grpc_address) as client:
        with pytest.raises(UnimplementedError, match=f"transport is {FLAVOURS[name].transport}") as refused:
            client.share(BYTES)
        assert refused.value.reason == Reason.REGION_UNSUPPORTED
        out = np.zeros((1, HEADS, TOPK), np.int32)
        with pytest.raises(InvalidArgumentError, match="must lie in memory of `share`"):
            client.select_blocks(0, sequences=7, queries=values(1, HEADS, DIM), starts=0, out=out)


SHAPE = (2, HEADS, TOPK)


@pytest.mark.parametrize(
    ("make", "kind", "reason", "words"),
    [
        (lambda region: np.zeros(SHAPE, np.int32), InvalidArgumentError, "INVALID_REGION", "must lie in memory"),
        (lambda region: region.empty((1, HEADS, TOPK), np.int32), InvalidArgumentError, "INVALID_TENSOR", "got int32"),
        (lambda region: region.empty(SHAPE, np.int64), InvalidArgumentError, "INVALID_TENSOR", "got int64"),
        (
            lambda region: region.empty((2, HEADS, 2 * TOPK), np.int32)[:, :, ::2],
            InvalidArgumentError,
            "INVALID_TENSOR",
            "in one piece",
        ),
        (
            lambda region: region.empty(1 + 2 * HEADS * TOPK, np.int32)[1:].reshape(SHAPE),
            InvalidArgumentError,
            "INVALID_REGION",
            "at a multiple of 64",
        ),
        (lambda region: [1], TypeError, "", "must be a numpy array or a torch tensor, got list"),
    ],
)
def test_an_out_that_cannot_be_is_refused_and_nothing_is_appended(
    client: Client, sequence: int, make: Any, kind: type[Exception], reason: str, words: str
) -> None:
    region = client.share(BYTES)
    with pytest.raises(kind, match=words) as refused:
        client.append_and_select(
            0, sequences=sequence, keys=values(2, DIM), queries=values(2, HEADS, DIM), out=make(region)
        )
    assert getattr(refused.value, "reason", "") == reason
    client.append_keys(0, sequences=sequence, keys=values(1, DIM))
    assert client.get_sequence(sequence).lengths[0] == 1


def test_scores_take_a_pair(client: Client, sequence: int) -> None:
    region = client.share(BYTES)
    client.append_keys(0, sequences=sequence, keys=values(2, DIM))
    with pytest.raises(TypeError, match="must be the pair of block ids and scores"):
        client.select_blocks(
            0,
            sequences=sequence,
            queries=values(2, HEADS, DIM),
            return_scores=True,
            out=(region.empty(SHAPE, np.int32),),
        )


def test_a_region_has_what_it_has() -> None:
    region = SharedRegion(HostMemory(4096))
    first, second = region.empty(1, np.int8), region.empty((2, 3), np.float32)
    assert second.ctypes.data - first.ctypes.data == 64
    with pytest.raises(ValueError, match="region: 3968 bytes are left, 4000 are needed"):
        region.empty(4000, np.int8)
    with (
        pytest.raises(ValueError, match="num_bytes must be at least 1, got 0"),
        Client("x", transport="ring") as client,
    ):
        client.share(0)
    with pytest.raises(ValueError, match="device must be cuda or cuda:N, got 'gpu'"):
        new_region(1, "gpu")
