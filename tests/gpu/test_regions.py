"""Memory of a GPU and of the host that a client shares with a core of its own process: `tests/gpu/regions.sh`."""

from __future__ import annotations

import ctypes
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from benchmarks.core_process import CoreProcess, RingPeer, core_process
from benchmarks.ring_messages import Keys, Places, Queries, Spans, TensorData, TokenAnswer, TokenRequest
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import CloseSequences, FloatDtype, OpenSequences
from blockdex.ring.sharing import DeviceMemory, HostMemory, new_memfd, release, share, share_memory
from blockdex_kernels import IndexSpec, cuda_driver

FIELDS = {"num_layers": 2}
SPEC = IndexSpec(**FIELDS)  # type: ignore[arg-type]
HEADS, DIM, TOPK = SPEC.num_index_heads, SPEC.head_dim, SPEC.topk
TENANT, SEQUENCES, HISTORY = "tenant", (1, 2, 3), 6000
BYTES = 16 << 20
PLACES = {"keys": 0, "queries": 2 << 20, "block_ids": 8 << 20, "scores": 12 << 20}
DTYPES: dict[FloatDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,
}
KINDS = ("memfd", "cuda_fd", "cuda_ipc")


class Shared(NamedTuple):
    """Memory, and its region."""

    bytes: torch.Tensor
    region: int


@pytest.fixture(scope="module")
def core() -> Iterator[CoreProcess]:
    with core_process(json.dumps(FIELDS), "--prefills", pages=512) as core:
        yield core


@pytest.fixture
def peer(core: CoreProcess) -> Iterator[RingPeer]:
    """A client for which every sequence has the same history."""
    peer = RingPeer(core.address)
    peer.ask(CloseSequences(TENANT, 0, SEQUENCES))
    peer.ask(OpenSequences(TENANT, 0, SEQUENCES, (0,) * len(SEQUENCES)))
    keys = Keys(data_of(torch.randn(len(SEQUENCES) * HISTORY, DIM), "bf16"))
    peer.ask(TokenRequest(TENANT, 0, 0, spans([(each, 0, HISTORY) for each in SEQUENCES]), keys, None))
    yield peer
    peer.close()


def data_of(values: torch.Tensor, dtype: FloatDtype) -> TensorData:
    return TensorData(dtype, values.to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy().tobytes())


def spans(rows: list[tuple[int, int, int]]) -> Spans:
    ids, starts, lengths = np.array(rows).T
    return Spans(ids.astype(np.uint64), starts.copy(), lengths.copy(), np.zeros(len(rows), np.uint64))


def request(
    rows: list[tuple[int, int, int]],
    *,
    append: bool = True,
    dtype: FloatDtype = "bf16",
    first_head: int = 0,
    heads: int = HEADS,
    **options: Any,
) -> TokenRequest:
    tokens = sum(length for *_, length in rows)
    draw = torch.Generator().manual_seed(tokens)
    keys = Keys(data_of(torch.randn(tokens, DIM, generator=draw), dtype), rollback=True) if append else None
    queries = data_of(torch.randn(tokens, heads, DIM, generator=draw), dtype)
    asked = {"order": "ascending", "return_scores": False, "wait_for_keys": False, **options}
    return TokenRequest(TENANT, 0, 0, spans(rows), keys, Queries(queries, first_head, heads, **asked))


NEXT = [(each, HISTORY, 1) for each in SEQUENCES]
REQUESTS: dict[str, Callable[[], TokenRequest]] = {
    "a decode": lambda: request(NEXT),
    **{f"a decode in {dtype}": lambda dtype=dtype: request(NEXT, dtype=dtype) for dtype in DTYPES},  # type: ignore[misc]
    "drafts": lambda: request([(each, HISTORY, 5) for each in SEQUENCES]),
    "some of the heads": lambda: request([(1, 5000, 3)], append=False, first_head=1, heads=2),
    "by score": lambda: request(NEXT, order="score"),
    "with scores": lambda: request(NEXT, return_scores=True),
    "raw scores by score": lambda: request(NEXT, order="score", return_scores=True, raw_scores=True),
    "a prefill": lambda: request([(1, HISTORY, 700)]),
    "a prefill of many slices": lambda: request([(1, 100, 5900)], append=False),
    "a prefill of two heads": lambda: request([(2, 100, 5900)], append=False, first_head=2, heads=2),
    "a prefill with scores": lambda: request([(1, 3000, 900)], append=False, return_scores=True, order="score"),
    "a prefill in fp32": lambda: request([(1, 3000, 900)], append=False, dtype="fp32"),
    "prefills beside a decode": lambda: request([(1, 10, 600), (2, 5000, 2), (3, 3000, 40)], append=False),
}


@contextmanager
def shared_memory(peer: RingPeer, kind: str) -> Iterator[Shared]:
    if kind == "memfd":
        host = HostMemory(BYTES)
        yield Shared(torch.frombuffer(host.buffer, dtype=torch.uint8), share_memory(peer.connected, host).region)
    elif kind == "cuda_fd":
        there = DeviceMemory(0, BYTES)
        yield Shared(torch.as_tensor(there), share_memory(peer.connected, there).region)
    else:
        address = ctypes.c_uint64()
        handle = (ctypes.c_ubyte * 64)()
        cuda_driver.use_primary_context(0)
        cuda_driver.call("cuMemAlloc_v2", ctypes.byref(address), BYTES)
        cuda_driver.call("cuIpcGetMemHandle", handle, address)
        plain = Plain(address.value)
        uuid = cuda_driver.device_uuid(0).hex()
        there_ = share(peer.connected, "cuda_ipc", handle=bytes(handle).hex(), device=uuid)
        assert there_.bytes == BYTES, "the driver says how many there are"
        yield Shared(torch.as_tensor(plain), there_.region)
        release(peer.connected, there_.region)
        cuda_driver.call("cuMemFree_v2", address)


class Plain:
    """Memory of cudaMalloc."""

    def __init__(self, address: int) -> None:
        self.__cuda_array_interface__ = {"shape": (BYTES,), "typestr": "|u1", "data": (address, False), "version": 3}


def put(memory: Shared, asked: TokenRequest, names: set[str]) -> Places:
    for name in names & {"keys", "queries"}:
        data = torch.frombuffer(bytearray(getattr(asked, name).tensor.data), dtype=torch.uint8)
        memory.bytes[PLACES[name] :][: len(data)].copy_(data)
    torch.cuda.synchronize()
    return {name: (memory.region, PLACES[name]) for name in names}


def read(memory: Shared, name: str, like: Any) -> Any:
    size = like.nbytes
    return memory.bytes[PLACES[name] :][:size].cpu().numpy().view(like.dtype).reshape(like.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REQUESTS)
def test_whatever_lies_in_a_region_is_answered_as_all_is(peer: RingPeer, name: str, kind: str) -> None:
    asked = REQUESTS[name]()
    assert asked.queries is not None
    expected = peer.ask(asked)
    assert isinstance(expected, TokenAnswer) and expected.block_ids is not None
    every = {"queries", "block_ids"} | ({"keys"} if asked.keys else set())
    every |= {"scores"} if asked.queries.return_scores else set()
    with shared_memory(peer, kind) as memory:
        for names in (every, {"queries"}, {"block_ids"}, every & {"keys", "block_ids"}, every & {"scores"}):
            if not names:
                continue
            memory.bytes[PLACES["block_ids"] :].fill_(0xA5)
            answer = peer.ask(asked, put(memory, asked, names))
            assert isinstance(answer, TokenAnswer)
            ids = read(memory, "block_ids", expected.block_ids) if "block_ids" in names else answer.block_ids
            np.testing.assert_array_equal(ids, expected.block_ids, f"{names}")
            if expected.scores is not None:
                scores = read(memory, "scores", expected.scores) if "scores" in names else answer.scores
                np.testing.assert_array_equal(scores, expected.scores, f"{names}")


def test_keys_of_a_region_are_appended(peer: RingPeer) -> None:
    """A few in a step and many beside it; they may be written anew once that is answered."""
    probe = request([(1, HISTORY, 1)], append=False)
    for length in (3, 900):
        append = request([(2, HISTORY, length), (3, HISTORY, length)])
        alone = TokenRequest(TENANT, 0, 0, append.spans, append.keys, None)
        peer.ask(alone)
        at = [(each, HISTORY, length) for each in (2, 3)]
        asked = request(at, append=False)
        expected = peer.ask(asked)
        for kind in KINDS:
            zeros = TensorData("bf16", bytes(2 * 2 * length * DIM))
            peer.ask(TokenRequest(TENANT, 0, 0, append.spans, Keys(zeros, rollback=True), None))
            with shared_memory(peer, kind) as memory:
                peer.ask(alone, put(memory, alone, {"keys"}))
                memory.bytes[: 4 << 20].zero_()
                answer = peer.ask(asked)
            assert isinstance(answer, TokenAnswer) and isinstance(expected, TokenAnswer)
            np.testing.assert_array_equal(answer.block_ids, expected.block_ids)
    with pytest.raises(BlockdexError, match="selection ends at"):
        peer.ask(probe)


@pytest.mark.parametrize("kind", ["memfd", "cuda_fd"])
def test_ranks_of_one_head_each(core: CoreProcess, peer: RingPeer, kind: str) -> None:
    whole = request([(1, 4000, 1500)], append=False)
    assert whole.queries is not None
    expected = peer.ask(whole)
    assert isinstance(expected, TokenAnswer) and expected.block_ids is not None
    queries = torch.frombuffer(bytearray(whole.queries.tensor.data), dtype=torch.bfloat16).view(-1, HEADS, DIM)
    found: dict[int, Any] = {}

    def rank(head: int) -> None:
        own = RingPeer(core.address)
        half = Queries(data_of(queries[:, head : head + 1], "bf16"), head, 1, "ascending", False, False)
        asked = TokenRequest(TENANT, 0, 0, whole.spans, None, half)
        with shared_memory(own, kind) as memory:
            own.ask(asked, put(memory, asked, {"queries", "block_ids"}))
            assert expected.block_ids is not None
            found[head] = read(memory, "block_ids", expected.block_ids[:, head : head + 1])
        own.close()

    threads = [threading.Thread(target=rank, args=[head]) for head in range(HEADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for head in range(HEADS):
        np.testing.assert_array_equal(found[head], expected.block_ids[:, head : head + 1])


def test_memory_that_cannot_be_shared_is_refused(peer: RingPeer) -> None:
    there = DeviceMemory(0, BYTES)
    uuid, fd = there.words["device"], there.fd
    memfd = new_memfd(BYTES)
    handle = bytes(64).hex()
    refused: dict[str, tuple[str, list[int], dict[str, Any], str]] = {
        "another GPU": ("cuda_fd", [fd], {"bytes": there.bytes, "device": "00" * 16}, "is said to lie on GPU 0000"),
        "more bytes than there are": ("cuda_fd", [fd], {"bytes": 2 * there.bytes, "device": uuid}, "cuMemMap failed"),
        "not whole units": ("cuda_fd", [fd], {"bytes": 4096, "device": uuid}, "bytes must be a multiple of"),
        "no bytes": ("cuda_fd", [fd], {"device": uuid}, "must have at least 1 byte"),
        "a memfd": ("cuda_fd", [memfd], {"bytes": BYTES, "device": uuid}, "cuMemImportFromShareableHandle failed"),
        "memory of a GPU as a memfd": ("memfd", [fd], {}, "memfd: the file is none"),
        "no handle": ("cuda_ipc", [], {"handle": handle, "device": uuid}, "cuIpcOpenMemHandle_v2 failed"),
        "a handle of another GPU": ("cuda_ipc", [], {"handle": handle, "device": "11" * 16}, "lies on GPU 1111"),
    }
    for name, (kind, files, words, message) in refused.items():
        with pytest.raises(BlockdexError) as error:
            share(peer.connected, kind, files, **words)
        assert message in error.value.message, (name, error.value.message)
    os.close(memfd)
    with shared_memory(peer, "cuda_fd") as memory:
        asked = request(NEXT)
        peer.ask(asked, put(memory, asked, {"queries"}))
        for offset, message in ((BYTES, "are not in region"), (32, "must be a multiple of 64")):
            with pytest.raises(BlockdexError, match=message):
                peer.ask(asked, {"block_ids": (memory.region, offset)})


def held(core: CoreProcess) -> tuple[int, int, int]:
    """What the core holds: files, mappings of shared memory, and MiB of the GPU that are taken at all."""
    process = Path(f"/proc/{core.process.pid}")
    free, total = torch.cuda.mem_get_info()
    mapped = (process / "maps").read_text("ascii").count("blockdex-region")
    return len(list((process / "fd").iterdir())), mapped, (total - free) >> 20


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_what_was_given_back(core: CoreProcess, peer: RingPeer, kind: str) -> None:
    asked = request([(1, 3000, 900)], append=False)

    def rounds(count: int) -> None:
        for _ in range(count):
            with shared_memory(peer, kind) as memory:
                peer.ask(asked, put(memory, asked, {"queries", "block_ids"}))
                if kind != "cuda_ipc":
                    release(peer.connected, memory.region)
                    with pytest.raises(BlockdexError, match=f"the link has no region {memory.region}"):
                        peer.ask(asked, {"queries": (memory.region, 0)})

    rounds(3)
    before = held(core)
    rounds(40)
    files, mapped, taken = held(core)
    assert (files, mapped) == before[:2]
    assert taken <= before[2] + 64, "MiB of the GPU"


@pytest.mark.parametrize("kind", ["memfd", "cuda_fd"])
def test_links_that_go_while_their_regions_are_read(core: CoreProcess, peer: RingPeer, kind: str) -> None:
    """Their memory is given back by who shares it, at once; who stays is answered."""
    asked, other = request([(1, 100, 5900)], append=False), request([(2, 100, 900)], append=False)
    expected = peer.ask(other)
    assert isinstance(expected, TokenAnswer)
    before = held(core)
    for wait in (0.0, 0.001, 0.003, 0.01) * 3:
        leaving = RingPeer(core.address)
        with shared_memory(leaving, kind) as memory:
            leaving.ask(asked, put(memory, asked, {"queries", "block_ids"}))
            leaving.show()
            time.sleep(wait)
            leaving.close()
        answer = peer.ask(other)
        assert isinstance(answer, TokenAnswer)
        np.testing.assert_array_equal(answer.block_ids, expected.block_ids)
    until = time.monotonic() + 10
    while held(core)[:2] != before[:2] and time.monotonic() < until:
        time.sleep(0.05)
    assert held(core)[:2] == before[:2]
    assert core.process.poll() is None


def test_a_release_waits_for_the_device(peer: RingPeer, core: CoreProcess) -> None:
    asked = request([(1, 100, 5900)], append=False)
    other = RingPeer(core.address)
    with shared_memory(other, "cuda_fd") as memory:
        places = put(memory, asked, {"queries", "block_ids"})
        other.ask(asked, places)
        first = read(memory, "block_ids", np.zeros((5900, HEADS, TOPK), np.int32)).copy()
        memory.bytes[PLACES["block_ids"] :].fill_(0xA5)
        torch.cuda.synchronize()
        other.show()
        time.sleep(0.0005)
        release(other.connected, memory.region)
        # Nothing writes there any more: either all of it was written, or the request came too late.
        after = read(memory, "block_ids", first)
        assert (after == first).all() or (after.view(np.uint8) == 0xA5).all()
        time.sleep(0.05)
        np.testing.assert_array_equal(read(memory, "block_ids", first), after)
    other.close()
