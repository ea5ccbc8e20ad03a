"""The compiled part: see `native/`."""

from typing import Any

# --- The front door's side ---

Taken = tuple[Any, int, int, int, int]
"""A request that was taken from who asked: asker, number, RPC, `received` of its slot, ticket."""

Rest = tuple[int, int, bytes, bytes]
"""What there is to say of an answer beside its response: RPC, `received` of its request's slot, slot, payload."""

class Link:
    """The front door's side of a ring, on one thread: slots, tickets, the requests' arena and the answers' tape.

    RPCs are numbers: 0 AppendKeys, 1 SelectBlocks, 2 AppendAndSelect, 3 to 5 the same over a stream, 255 a request that
    Python wrote. Nothing is taken the short way before it is opened.

    Args:
        memory: the whole segment, writable.
        engine_bell: the eventfd that the engine sleeps on; it must stay open while this is used.

    Raises:
        ValueError: it is no segment of this layout.
    """

    def __new__(cls, memory: memoryview, engine_bell: int) -> Link: ...
    @property
    def waiting(self) -> int:
        """Requests that somebody waits for."""

    @property
    def on_short_way(self) -> int:
        """Those of them that took the short way."""

    def open_short_way(
        self,
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        max_sequence_tokens: int,
        max_spans: int,
        max_message_bytes: int,
        max_waiting: int,
        slow_seconds: float,
        time_bounds: tuple[float, ...],
    ) -> None:
        """Takes requests the short way from now on, within the bounds of `IndexSpec` and `Limits`.

        While `max_waiting` are waited for, all are left to Python. Of an answer that took longer than `slow_seconds`
        the rest is told, too. Answers are counted in buckets whose upper bounds `time_bounds` are, rising.
        """

    def send(self, asker: object, rpc: int, tenant: str, timeout: float, message: bytes, /) -> bool:
        """Writes a request as it came off the wire into the ring; `rpc` is 0 to 3, 3 for one of a stream.

        Returns:
            False where it is not for the short way: something is wrong with it or unusual, it has the number of another
            one of the asker, or there is no room. Nothing has changed then.
        """

    def claim(self, asker: object, num_bytes: int, /) -> tuple[int, int, int] | None:
        """Ticket, offset of a slot in the segment and offset of a payload in the arena, for Python to write a request.

        None while one of them is not free. The engine sees it after `publish`.
        """

    def publish(self) -> None:
        """Shows the engine what was claimed."""

    def cancel(self, ticket: int, /) -> bool:
        """Tells the engine that nobody waits for a request: none hears of its answer. False while no slot is free."""

    def awaits(self, asker: object, number: int, /) -> bool:
        """Whether such a request is on the short way, and not given up."""

    def give_up(self, asker: object, number: int, /) -> Taken | None:
        """Takes a request on the short way from its asker; the engine is yet to be told."""

    def give_up_all(self, asker: object | None, /) -> list[Taken]:
        """The same of all requests of an asker; None stands for all askers."""

    def take(self) -> list[tuple[Any, int, bytes | None, Rest | None]]:
        """The answers that are there: asker, number, response and rest. Their room is free again.

        The response is that of a request on the short way which was answered well; the rest is None where it says all.
        Where none is there, the bell rings when one comes; else it has to be asked again.

        Raises:
            ValueError: the oldest answer is not what the layout says.
        """

    def take_times(self) -> list[tuple[list[int], float]]:
        """What was timed since the last call: of every RPC from 0 to 5, answers by bucket, and their seconds in all.

        Of the short way alone, and empty before that is opened. The last bucket has no bound.
        """
