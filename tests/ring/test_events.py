"""Events on their way from the engine to its frontends: nothing waits for who does not read, and order is kept."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from blockdex.contract.errors import InternalError
from blockdex.ring.events import Draining, Event, EventQueue, NewEpoch, SequencesEvicted, event_of, evictions, words_of
from support.ring_engine import hosted
from support.running_engine import (
    SPEC,
    TIMEOUT,
    keys_of,
    open_sequence,
    tokens,
)

LAST = 2**64 - 1


async def test_of_too_many_the_oldest_are_lost_and_the_loop_is_told_once() -> None:
    queue = EventQueue(asyncio.get_running_loop())
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)

    def put() -> None:
        for epoch in range(1, 3001):
            queue.put(NewEpoch(epoch))

    thread = threading.Thread(target=put)
    thread.start()
    thread.join()
    assert await asyncio.wait_for(waiting, TIMEOUT) == NewEpoch(3001 - 1024)
    assert [(await queue.get()) for _ in range(1023)] == [NewEpoch(epoch) for epoch in range(3002 - 1024, 3001)]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.get(), 0.05)


async def test_none_is_missed_however_they_come() -> None:
    queue = EventQueue(asyncio.get_running_loop())
    events = [NewEpoch(epoch) for epoch in range(1, 5_001)]

    def put() -> None:
        for event in events:
            while len(queue._events) > 3:
                pass
            queue.put(event)

    thread = threading.Thread(target=put)
    thread.start()
    assert [await asyncio.wait_for(queue.get(), TIMEOUT) for _ in events] == events
    thread.join()


@pytest.mark.parametrize(
    "event", [NewEpoch(LAST), Draining(), SequencesEvicted("t", [0, LAST]), SequencesEvicted("", [])]
)
def test_words_stand_for_an_event(event: Event) -> None:
    assert event_of(words_of(event)) == event


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"new_epoch": -1},
        {"new_epoch": 1 << 64},
        {"new_epoch": "1"},
        {"evicted": [1]},
        {"evicted": [1, -1], "tenant": "t"},
        {"evicted": ["1"], "tenant": "t"},
        {"evicted": [1], "tenant": 1},
    ],
)
def test_other_words_are_none(words: dict[str, object]) -> None:
    assert event_of(words) is None


def test_many_evictions_are_several_events() -> None:
    told = list(evictions({"red": list(range(2500)), "blue": [LAST]}))
    assert [(event.tenant, len(event.sequence_ids)) for event in told] == [
        ("red", 1024),
        ("red", 1024),
        ("red", 452),
        ("blue", 1),
    ]
    assert [each for event in told[:3] for each in event.sequence_ids] == list(range(2500))


async def test_a_channel_tells_of_evictions_and_of_each_epoch_once() -> None:
    random = np.random.default_rng(5)
    async with hosted(num_pages=2) as run:
        heard: asyncio.Queue[Event] = asyncio.Queue()
        run.channel.tell_events(heard.put_nowait)
        for sequence in (1, 2):
            await run.ask(open_sequence(sequence, tenant=f"t{sequence}", lease=1))
            block = keys_of(random, SPEC.block_size)
            await run.ask(tokens(0, [(sequence, 0, len(block))], keys=block, tenant=f"t{sequence}"))
        await asyncio.sleep(1.1)
        await run.ask(open_sequence(3, tenant="t3"))
        one = keys_of(random, 1)
        await run.ask(tokens(0, [(3, 0, 1)], keys=one, tenant="t3"))
        assert await asyncio.wait_for(heard.get(), TIMEOUT) == SequencesEvicted("t1", [1])
        run.backend.fault = "append"
        with pytest.raises(InternalError):
            await run.ask(tokens(0, [(3, 1, 1)], keys=one, tenant="t3"))
        assert await asyncio.wait_for(heard.get(), TIMEOUT) == NewEpoch(run.engine.info().epoch)
        # The link is a new one, the engine and its epoch are not.
        control = run.channel._control
        assert control is not None
        control.hang_up()
        while run.channel._control in {None, control}:
            await asyncio.sleep(0.01)
        await run.ask(open_sequence(4))
        assert heard.empty()
