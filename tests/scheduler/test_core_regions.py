"""Tensors that lie in regions of a device, which the core has it read and write: memory of the host stands for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.ring_messages import TokenAnswer, TokenRequest
from blockdex import _native as native
from support.bare_core import LENGTH, SPEC, BareCore, check_answer
from support.foreign_frontend import ForeignFrontend
from support.running_engine import tensor, tokens, values

HEADS, DIM, TOPK = SPEC.num_index_heads, SPEC.head_dim, SPEC.topk
BYTES = 1 << 14
PLACES = {"keys": 0, "queries": 1 << 10, "block_ids": 1 << 12, "scores": 1 << 13}


@dataclass
class Memory:
    """What a link is shared."""

    data: NDArray[np.uint8]
    on_device: bool = True

    @property
    def address(self) -> int:
        """Where it begins."""
        return self.data.ctypes.data

    @property
    def bytes(self) -> int:
        """Of it."""
        return len(self.data)


def client_of(bare: BareCore) -> tuple[ForeignFrontend, int, Memory]:
    """One more frontend, and a region that it shares."""
    frontend = bare.open_client()
    memory = Memory(np.frombuffer(bytearray(BYTES + 64), np.uint8))
    memory.data = memory.data[-memory.address % 64 :][:BYTES]
    region = bare.lines[-1].share(memory)
    frontend.regions[region] = memory.data
    return frontend, region, memory


def in_region(frontend: ForeignFrontend, request: TokenRequest, ticket: int, region: int, *names: str) -> Any:
    return frontend.lay(request, ticket, {name: (region, PLACES[name]) for name in names})


def run(bare: BareCore) -> None:
    """Has the core look round, and the device end all that began."""
    bare.look()
    while bare.device.begun:
        bare.device.end()
        bare.look()


@pytest.mark.parametrize(
    "names", [("keys",), ("queries",), ("block_ids",), ("keys", "queries"), ("keys", "queries", "block_ids")]
)
def test_a_step_reads_and_writes_where_it_is_told(device_core: BareCore, names: tuple[str, ...]) -> None:
    bare = device_core
    frontend, region, memory = client_of(bare)
    other = bare.open_client()
    request, plain = bare.both(1, (1, LENGTH, 2), (2, LENGTH - 2, 3)), bare.both(0, (3, LENGTH, 1))
    other.send(plain)
    frontend.write(in_region(frontend, request, 0, region, *names))
    bare.look()
    (seen,) = bare.device.begun
    assert request.keys is not None
    sent = np.frombuffer(request.keys.tensor.data, np.uint16).reshape(-1, DIM)
    first = seen.columns[2].tolist().index(2)  # runs before it are the other's
    begin = int(seen.columns[2][:first].sum())
    np.testing.assert_array_equal(seen.keys[begin : begin + 5], sent)
    assert (seen.targets[begin : begin + 5] != 0).all() == ("block_ids" in names)
    assert np.count_nonzero(seen.targets) == 5 * HEADS * ("block_ids" in names)
    run(bare)
    for each in (frontend, other):
        each.read()
    check_answer(frontend, 0, request)
    check_answer(other, 0, plain)
    assert bool(frontend.told[0].numbers.payload_bytes) == ("block_ids" not in names)
    end = PLACES["block_ids"] + 4 * 5 * HEADS * TOPK
    assert not memory.data[end:].any(), "nothing is written behind the ids"


def test_ranks_of_one_step_have_their_rows_and_ids_each_in_its_region(device_core: BareCore) -> None:
    bare = device_core
    clients = [client_of(bare) for _ in range(HEADS)]
    random = np.random.default_rng(3)
    both = values(random, 2, HEADS, DIM)
    for head, (frontend, region, _) in enumerate(clients):
        own = tokens(0, [(1, 3, 2)], queries=both[:, head : head + 1], first_head=head)
        frontend.write(in_region(frontend, own, 0, region, "queries", "block_ids"))
    bare.look()
    (seen,) = bare.device.begun
    assert seen.columns[2].sum() == 2, "they share its rows"
    run(bare)
    expected = np.frombuffer(tensor(both).data, np.uint16).reshape(2, HEADS, DIM)[:, :, :TOPK]
    for head, (frontend, _, _) in enumerate(clients):
        frontend.read()
        answer = frontend.told[0].answer
        assert isinstance(answer, TokenAnswer) and answer.block_ids is not None
        np.testing.assert_array_equal(answer.block_ids, expected[:, head : head + 1])


def test_keys_of_a_region_are_the_devices_until_the_step_has_ended(device_core: BareCore) -> None:
    """An append of what the host has staged is answered at once."""
    bare = device_core
    frontend, region, _ = client_of(bare)
    keys = values(np.random.default_rng(2), 1, DIM)
    frontend.send(tokens(0, [(1, LENGTH, 1)], keys=keys))
    frontend.write(in_region(frontend, tokens(0, [(2, LENGTH, 1)], keys=keys), 1, region, "keys"))
    bare.look()
    frontend.read()
    assert list(frontend.told) == [0]
    assert bare.lines[0].give_back(region) is False, "it is in use"
    run(bare)
    frontend.read()
    assert list(frontend.told) == [0, 1]
    assert bare.lines[0].give_back(region) is True
    with pytest.raises(KeyError, match=f"the link has no region {region}"):
        bare.lines[0].give_back(region)


@pytest.mark.parametrize("order", ["ascending", "score"])
@pytest.mark.parametrize("scored", [True, False])
def test_what_no_program_writes_is_left_to_python(device_core: BareCore, order: Any, scored: bool) -> None:
    bare = device_core
    frontend, region, memory = client_of(bare)
    request = bare.both(0, (1, LENGTH, 1), order=order, scores=scored)
    names = ["block_ids", *["scores"] * scored]
    frontend.write(in_region(frontend, request, 0, region, *names))
    bare.look()
    taken = bare.take()
    if order == "ascending" and not scored:
        assert not taken and bare.device.begun
        return
    ((number, kind, *_, block_ids, scores, _, _, _, _),) = taken
    assert kind == "large"
    assert block_ids == (memory, PLACES["block_ids"], 4 * HEADS * TOPK)
    assert scores == ((memory, PLACES["scores"], 4 * HEADS * TOPK) if scored else None)
    ids = np.zeros((1, HEADS, TOPK), np.int32)
    with pytest.raises(ValueError, match="whose region takes"):
        bare.core.answer(number, 1, 1, HEADS, TOPK, 0, ids, None)
    bare.core.answer(number, 1, 1, HEADS, TOPK, 0, None, None)
    frontend.read()
    assert frontend.told[0].numbers.payload_bytes == 0


def test_what_is_on_the_host_is_written_there(device_core: BareCore) -> None:
    """Beside scores that lie on the device, which cannot be written here."""
    bare = device_core
    frontend, device, _ = client_of(bare)
    memory = Memory(np.zeros(BYTES, np.uint8), on_device=False)
    host = bare.lines[-1].share(memory)
    frontend.regions[host] = memory.data
    places = {"block_ids": (host, PLACES["block_ids"]), "scores": (device, PLACES["scores"])}
    frontend.write(frontend.lay(bare.both(0, (1, LENGTH, 1), scores=True), 0, places))
    bare.look()
    ((number, *_),) = bare.take()
    ids = np.arange(HEADS * TOPK, dtype=np.int32)
    with pytest.raises(ValueError, match="core: 28 bytes for request"):
        bare.core.answer(number, 3, 1, HEADS, TOPK, 0, ids[:7], None)
    bare.core.answer(number, 3, 1, HEADS, TOPK, 0, ids, None)
    begin = PLACES["block_ids"]
    np.testing.assert_array_equal(memory.data[begin : begin + ids.nbytes].view(np.int32), ids)


def test_a_link_shares_so_many_regions(bare: BareCore) -> None:
    bare.open_client()
    (line,) = bare.lines
    memory = Memory(np.zeros(64, np.uint8), on_device=False)
    numbers = [line.share(memory) for _ in range(native.MAX_REGIONS)]
    assert len(set(numbers)) == native.MAX_REGIONS and 0 not in numbers
    with pytest.raises(ValueError, match=f"a link has at most {native.MAX_REGIONS}"):
        line.share(memory)
    assert line.give_back(numbers[7])
    assert line.share(memory) == numbers[7] + native.MAX_REGIONS, "no request means the one before"
    for wrong in (0, numbers[7], 2**32 - 1, 2**40):
        with pytest.raises(KeyError):
            line.give_back(wrong)


def test_a_region_goes_with_its_link_and_the_last_request(device_core: BareCore) -> None:
    bare = device_core
    frontend, region, memory = client_of(bare)
    frontend.write(in_region(frontend, bare.both(0, (1, LENGTH, 1)), 0, region, "queries"))
    bare.look()
    held = sys.getrefcount(memory)
    line = bare.lines.pop()
    bare.core.drop(line)
    del line
    assert sys.getrefcount(memory) == held, "the device reads it"
    bare.device.end()
    assert bare.core.run(0.0) & native.NOTICED
    bare.look()
    assert sys.getrefcount(memory) == held - 1
