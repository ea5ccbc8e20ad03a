"""Requests that a GPU writes: when a core takes them, and how it tells of a success."""

from __future__ import annotations

import ctypes
import resource
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from blockdex import _native as native
from blockdex.device_channel.calls import Call, Heads
from blockdex.device_channel.memory import ChannelMemory
from blockdex.ring.channel_layout import TIMED_OUT
from blockdex.ring.layout import AT, PAGES, REQUEST
from support.bare_core import ALL, LENGTH, SPEC, BareCore, bare_core
from support.channel_twins import ring_numpy
from support.running_engine import TENANT

HEADS = Heads(0, SPEC.num_index_heads)
LAYER, STREAM = 1, 9
REQUEST_AT = {field.name: field.offset for field in REQUEST}


class Channel:
    """A channel of a bare core, whose device's memory is the host's, and what is signalled there.

    Attributes:
        memory: the channel's.
        link: the core's end.
        told: address, number and flags of each signal.
        begun: steps that were on their way at each signal.
        error: what the next signal returns.
    """

    def __init__(self, bare: BareCore, *, bound: float = 20.0, on_device: bool = True, epoch: int = 0) -> None:
        self.memory = memory = ChannelMemory(torch.device("cpu"), SPEC, HEADS.count, 16, 16, 0)
        self.told: list[tuple[int, int, int]] = []
        self.begun: list[int] = []
        self.error = 0
        self._bare = bare
        region = SimpleNamespace(address=memory.address, bytes=memory.size, on_device=on_device)
        self.link = native.ServerLink(memory.segment, -1, -1, TENANT)
        memory.open(memory.begin_anew(1 << 32), self.link.make_channel(region, bound, epoch or bare.cache.epoch))
        self._signal = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint)(
            self._note
        )
        address = ctypes.cast(self._signal, ctypes.c_void_p).value
        assert address is not None
        if on_device:
            bare.core.set_replays(*bare.device.replays(ALL), address)
        bare.core.add(self.link)

    def _note(self, stream: int, address: int, number: int, flags: int) -> int:
        assert stream == STREAM
        self.begun.append(len(self._bare.device.begun))
        self.told.append((address, number, flags))
        error, self.error = self.error, 0
        return error

    def ring(self, *rows: tuple[int, int], keys: bool = True, queries: bool = True, revision: int = 0) -> torch.Tensor:
        """Asks for one token of each (sequence, start); its queries."""
        count = len(rows)
        random = torch.randn(count, 1, 1 + HEADS.count, SPEC.head_dim).bfloat16()
        ids, starts = torch.tensor(rows, dtype=torch.int64).T.contiguous()
        own = random[:, :, 1:].contiguous()
        call = Call(
            LAYER,
            ids,
            starts,
            torch.ones(count, dtype=torch.int64),
            random[:, :, 0].contiguous() if keys else None,
            own if queries else None,
            torch.full((count,), revision),
        )
        self.memory.bytes[:8].view(torch.int64).copy_(self.memory.bytes[128:136].view(torch.int64))
        ring_numpy(self.memory, SPEC, HEADS, call)
        return own

    @property
    def answered(self) -> int:
        """The number in its memory."""
        return int(self.memory.bytes[:8].view(torch.int64))

    @property
    def block_ids(self) -> torch.Tensor:
        """int32 `[16, H, topk]` in its memory."""
        places = self.memory.places
        return (
            self.memory.bytes[places.block_ids :][: 4 * 16 * HEADS.count * SPEC.topk]
            .view(torch.int32)
            .view(16, HEADS.count, SPEC.topk)
        )

    def count(self, name: str) -> int:
        """A number of the segment's header."""
        return int(self.memory.segment.counters[AT[name] // 8])


FIRST = (1 << 32) + 1


@pytest.fixture
def bare() -> Iterator[BareCore]:
    with bare_core(replays=ALL) as bare:
        yield bare


def expected(queries: torch.Tensor) -> torch.Tensor:
    """What the device answers."""
    return queries[:, 0, :, : SPEC.topk].contiguous().view(torch.uint16).to(torch.int32)


def test_a_success_is_signalled_behind_the_step(bare: BareCore) -> None:
    channel = Channel(bare)
    queries = channel.ring((1, LENGTH), (2, LENGTH))
    bare.look()
    assert len(bare.device.begun) == 1, "launched, and not ended"
    assert bare.device.begun[0].signals[:, 0].tolist() == [channel.memory.address, FIRST]
    assert not channel.told and channel.answered == FIRST - 1
    bare.device.end()
    assert channel.answered == FIRST
    bare.look()
    assert torch.equal(channel.block_ids[:2], expected(queries))
    assert channel.count("answers_written") == 0 and channel.count("requests_read") == FIRST
    channel.ring((1, LENGTH + 1), queries=False)
    bare.look()
    bare.device.end()
    assert channel.answered == FIRST + 1
    bare.look()
    assert bare.lengths[LAYER, 0] == LENGTH + 2 and channel.count("answers_written") == 0
    assert channel.link.give_back(int(channel.memory.bytes[144:148].view(torch.int32))), "no request is left"


def test_memory_of_the_host_is_written_when_the_step_has_ended(bare: BareCore) -> None:
    channel = Channel(bare, on_device=False)
    queries = channel.ring((1, LENGTH), (2, LENGTH))
    before = channel.memory.bytes[:8].view(torch.int64).item()
    bare.look()
    assert channel.memory.bytes[:8].view(torch.int64).item() == before
    bare.device.end()
    bare.look()
    assert channel.memory.bytes[:8].view(torch.int64).item() == FIRST
    assert torch.equal(channel.block_ids[:2], expected(queries))


def test_more_channels_than_a_step_can_signal(bare: BareCore) -> None:
    """The others are told by themselves, when the stream comes so far."""
    channels = [Channel(bare) for _ in range(native.SIGNALS + 3)]
    for channel in channels:
        channel.ring((1, LENGTH - 1), keys=False)
    bare.look()
    (seen,) = bare.device.begun
    # What the core calls is the last one's.
    addresses = {address for address, _, _ in channels[-1].told}
    assert channels[-1].begun == [1] * 3
    assert len(addresses | set(seen.signals[0].tolist())) == len(channels)
    assert np.count_nonzero(seen.signals[0]) == native.SIGNALS
    bare.device.end()
    bare.look()
    assert len(channels[-1].told) == 3, "each once"


def test_a_launch_that_is_refused_is_told_whatever_comes_of_the_signals_behind_it(bare: BareCore) -> None:
    channels = [Channel(bare) for _ in range(native.SIGNALS + 1)]
    for channel in channels:
        channel.ring((1, LENGTH - 1), keys=False)
    bare.device.error = 700
    with pytest.raises(RuntimeError, match="cuGraphLaunch failed: CUDA error 700"):
        bare.core.run(0.0)
    assert len(channels[-1].told) == 1


def test_what_is_done_already_is_signalled_at_once(bare: BareCore) -> None:
    channel = Channel(bare)
    for _ in range(2):
        channel.ring((1, LENGTH), queries=False, revision=5)
        bare.look()
    assert len(bare.device.begun) == 1
    assert channel.told == [(channel.memory.address, FIRST + 1, 0)]


def test_a_refusal_is_an_answer(bare: BareCore) -> None:
    channel = Channel(bare)
    channel.ring((1, LENGTH + 3))
    bare.look()
    assert not channel.told and not bare.device.begun
    assert channel.count("answers_written") == 1
    assert f"append starts at {LENGTH + 3}, length is {LENGTH}" in str(channel.memory.refusal())


def test_pages_for_block_ids_are_refused(bare: BareCore) -> None:
    channel = Channel(bare)
    channel.ring((1, LENGTH))
    segment = channel.memory.segment
    segment.counters[(segment.request_slots_offset + REQUEST_AT["sequence_id"]) // 8] = 7
    segment.memory[segment.request_slots_offset + REQUEST_AT["flags"]] |= PAGES
    bare.look()
    assert not channel.told and not bare.device.begun
    assert "pool 7: a device channel answers with block ids, not with pages" in str(channel.memory.refusal())


def test_another_epoch(bare: BareCore) -> None:
    channel = Channel(bare, epoch=77)
    channel.ring((1, LENGTH))
    bare.look()
    assert "epoch: request names 77" in str(channel.memory.refusal())
    assert not bare.device.begun


def test_a_signal_that_the_device_refuses(bare: BareCore) -> None:
    channel = Channel(bare)
    channel.ring((2, LENGTH), queries=False, revision=5)
    bare.look()
    channel.error = 718
    channel.ring((2, LENGTH), queries=False, revision=5)
    with pytest.raises(RuntimeError, match="cuStreamWriteValue64 failed: CUDA error 718"):
        bare.core.run(0.0)


def test_a_request_that_may_have_waited_too_long(bare: BareCore) -> None:
    """It was not there when the core looked last: since then it may have been."""
    channel = Channel(bare, bound=0.05)
    time.sleep(0.1)
    bare.look()
    channel.ring((1, LENGTH))
    bare.look()
    bare.device.end()
    bare.look()
    assert channel.answered == FIRST
    channel.ring((1, LENGTH + 1))
    time.sleep(0.1)
    bare.look()
    assert not bare.device.begun
    assert "timeout: 0.050 s were allowed, 0.1" in str(channel.memory.refusal())
    assert bare.lengths[LAYER, 0] == LENGTH + 1


def test_a_request_that_nobody_waits_for(bare: BareCore) -> None:
    channel = Channel(bare)
    channel.ring((1, LENGTH))
    channel.memory.kill(TIMED_OUT)
    bare.look()
    assert not channel.told and not bare.device.begun
    assert channel.count("requests_read") == FIRST and channel.count("answers_written") == 0
    assert bare.lengths[LAYER, 0] == LENGTH


def test_a_core_naps_beside_a_channel_that_nobody_uses() -> None:
    """Nobody wakes it, and it finds the request: it looks now and then, and gives its processor away in between."""

    def naps() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw

    with bare_core(replays=ALL) as bare:
        channel = Channel(bare)
        bare.core.run(0.3)
        thread = threading.Timer(0.5, channel.ring, [(1, LENGTH)])
        looking = threading.Thread(target=bare.core.run, args=[10.0])
        before, began = naps(), time.monotonic()
        thread.start()
        looking.start()
        while not bare.device.begun:
            assert time.monotonic() - began < 5
            time.sleep(0.05)
        assert naps() - before > 200
        bare.core.notice()
        looking.join()


def test_numbers_go_on_where_the_kernels_are(bare: BareCore) -> None:
    channel = Channel(bare)
    channel.ring((1, LENGTH + 9))
    bare.look()
    bare.core.drop(channel.link)
    memory = channel.memory
    region = SimpleNamespace(address=memory.address, bytes=memory.size, on_device=True)
    written = memory.begin_anew(1 << 32)
    channel.link = native.ServerLink(memory.segment, -1, -1, TENANT)
    memory.open(written, channel.link.make_channel(region, 20.0, bare.cache.epoch))
    bare.core.add(channel.link)
    queries = channel.ring((1, LENGTH))
    bare.look()
    bare.device.end()
    assert channel.answered == FIRST + 1 + (1 << 32)
    bare.look()
    assert torch.equal(channel.block_ids[:1], expected(queries))
    assert channel.count("answers_written") == channel.count("answers_read") == 1
    channel.ring((1, LENGTH + 7))
    bare.look()
    assert channel.count("answers_written") == 2
    assert f"append starts at {LENGTH + 7}, length is {LENGTH + 1}" in str(memory.refusal())


def test_channels_that_cannot_be(bare: BareCore) -> None:
    memory = ChannelMemory(torch.device("cpu"), SPEC, HEADS.count, 16, 16, 0)
    link = native.ServerLink(memory.segment, -1, -1, TENANT)
    data = np.zeros(8192, np.uint8)
    for size, bound in ((512, 1.0), (8192, 0.0), (8192, -1.0)):
        region = SimpleNamespace(address=data.ctypes.data, bytes=size, on_device=False)
        with pytest.raises(ValueError, match=f"channel: its memory has {size} bytes"):
            link.make_channel(region, bound, 1)


def test_channels_that_come_together_are_one_step() -> None:
    """Those that came together are waited for the next time, for so long and no longer; a stranger is not."""
    hold = 0.5
    with bare_core(replays=ALL, hold_seconds=hold) as bare:
        first, second, stranger = channels = [Channel(bare) for _ in range(3)]

        def steps(*asking: Channel, then: tuple[Channel, ...] = (), seconds: float = 0.0) -> list[int]:
            """Runs of the steps that begin."""
            for channel in asking:
                channel.ring((1 + channels.index(channel), LENGTH - 1), keys=False)
            bare.look()
            for channel in then:
                channel.ring((1 + channels.index(channel), LENGTH - 1), keys=False)
            bare.core.run(seconds)
            made = [int((step.columns[2] > 0).sum()) for step in bare.device.begun]
            while bare.device.begun:
                bare.device.end()
                bare.look()
            return made

        assert steps(first, then=(second,)) == [1, 1], "the first time nobody knows"
        assert steps(first, then=(second,)) == [2]
        assert steps(second, then=(first,)) == [2]
        time.sleep(1.2 * hold)
        assert steps(stranger) == [1]
        time.sleep(1.2 * hold)
        assert steps(first) == [], "it is held"
        assert steps(seconds=1.5 * hold) == [1], "and no longer than that"
        assert steps(first) == [1], "who did not come is not waited for again"
