"""A process that answers every number on a ring with itself, and sleeps whenever there is none.

Arguments: the files of segment, its own bell and the other one's; how many numbers; seconds to spin before each sleep.
"""

from __future__ import annotations

import select
import sys
import time

from blockdex.ring.segment import Segment
from support.ring import Bell, Consumer, Producer

BELL_SECONDS = 20.0


def wait(own: Bell, consumer: Consumer, spin_seconds: float = 0.0) -> int:
    """Sleeps until there is something to read, and says how much."""
    spun = time.perf_counter() + spin_seconds
    while not consumer.filled and time.perf_counter() < spun:
        pass
    while not consumer.filled:
        own.lie_down()
        if not consumer.filled:
            assert select.select([own.fd], [], [], BELL_SECONDS)[0], "never woken"
            own.silence()
        own.get_up()
    return consumer.check()


def echo(segment: Segment, bells: tuple[int, int], count: int, spin_seconds: float) -> None:
    """Answers so many numbers."""
    own = Bell(segment, "engine_sleeps", bells[0])
    consumer = Consumer(segment, "request")
    producer = Producer(segment, "answer", Bell(segment, "client_sleeps", bells[1]))
    for _ in range(count):
        if not consumer.filled:
            wait(own, consumer, spin_seconds)
        number = segment.counters[consumer.take() // 8]
        consumer.release()
        segment.counters[producer.claim() // 8] = number
        producer.publish()


if __name__ == "__main__":
    memory, own_bell, other_bell, numbers = map(int, sys.argv[1:5])
    echo(Segment(memory), (own_bell, other_bell), numbers, float(sys.argv[5]))
