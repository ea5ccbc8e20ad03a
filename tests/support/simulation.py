"""A simulation of the engine: the real admission, cache and loop; a seed drives the device, the clock and the clients.

Everything that happens between processes and threads happens here in one, in an order that the seed draws: clients
write requests, take them back, read answers and go; the device runs a step or does not; it fails; time passes; the
engine takes a turn. What every client was answered is then compared with a naive engine that does one request after
another: there has to be a history that explains all answers, whatever was lost on the way.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.ring_messages import Answer, Keys, Queries, Request, TensorData, TokenAnswer, TokenRequest
from blockdex import _native as native
from blockdex.contract.errors import BlockdexError, Reason
from blockdex.contract.messages import Limits
from blockdex.ring import layout
from blockdex.ring.events import Event, SequencesEvicted
from blockdex.ring.handshake import new_link
from blockdex.ring.layout import RequestSlot
from blockdex.ring.segment import Sizes
from blockdex.ring.server import RingInbox, ServerLink
from blockdex.scheduler import loop
from blockdex.scheduler.loop import Engine
from support.cache_state import Name, check_integrity, held_pages, spans
from support.foreign_frontend import ForeignFrontend
from support.naive_engine import Layer, NaiveEngine, Row
from support.running_engine import close, fork, get, open_sequence, tensor, truncate
from support.simulated_device import LONGEST, SPEC, SimulatedDevice, SimulatedPages, fingerprints

TENANTS = ("red", "blue")
LIMITS = Limits(
    max_message_bytes=1 << 20,
    max_spans=8,
    max_queued_requests=256,
    max_stream_requests=64,
    max_wait_ms=20_000,
    max_queue_ms=600_000,  # Nothing is shed: what waits for a hung device is answered after all.
)
LEASE = 5.0
SIZES = Sizes(slots=16, request_bytes=1 << 20, answer_bytes=1 << 20)
_IDS = range(1, 6)
_MOST_HISTORIES = 64
_MOST_TURNS = 400
_FAILURES = ("launch", "copy", "allocation", "late")
_GIVEN_UP = frozenset({Reason.CANCELLED, Reason.DEADLINE_EXCEEDED, Reason.OVERLOADED})
_EXCUSED = _GIVEN_UP | {Reason.INTERNAL, Reason.OUT_OF_PAGES}
"""Refusals that the circumstances bring about, and no history."""


class FingerprintEngine(NaiveEngine):
    """The naive engine, whose selections are what the simulated device answers."""

    def _select(
        self, spans: list[Row], layers: list[Layer], queries: NDArray[np.float32], half: Queries
    ) -> TokenAnswer:
        ids, top = [], 0
        for (_, start, length, _), layer in zip(spans, layers, strict=True):
            ids.append(fingerprints(layer.keys, queries[top : top + length], start))
            top += length
        return TokenAnswer(self.epoch, np.concatenate(ids))

    def copy(self) -> FingerprintEngine:
        """Another one that is as this one is."""
        sequences = {
            name: [Layer(layer.keys, layer.revision) for layer in layers] for name, layers in self.sequences.items()
        }
        return FingerprintEngine(self.spec, self.epoch, sequences)

    def same_as(self, other: FingerprintEngine) -> bool:
        """Whether both hold the same."""
        return self.signature() == other.signature()

    def signature(self) -> tuple[object, ...]:
        """All that it holds."""
        return tuple(
            (name, *((layer.keys.tobytes(), layer.revision) for layer in self.sequences[name]))
            for name in sorted(self.sequences)
        )

    def state(self) -> dict[Name, list[tuple[int, int]]]:
        """Length and revision of every layer of every sequence."""
        return {
            name: [(len(layer.keys), layer.revision) for layer in layers] for name, layers in self.sequences.items()
        }


@dataclass
class Asked:
    """A request of a client and what became of it.

    Attributes:
        request: what was asked.
        sent: the time.
        deadline: likewise.
        cancelled: whether it was taken back.
        answer: None where its client went before there was one.
        life: of the cache, from 0 on, that answered.
        answered: the time at which that was read.
    """

    request: Request
    sent: float
    deadline: float
    cancelled: bool = False
    answer: Answer | BlockdexError | None = None
    life: int = -1
    answered: float = 0.0

    @property
    def reason(self) -> str | None:
        """Why it was refused, if it was."""
        return self.answer.reason if isinstance(self.answer, BlockdexError) else None

    @property
    def may_have_happened(self) -> bool:
        """Whether it may have been done though its client was not told so."""
        if self.answer is None or self.reason == Reason.INTERNAL:
            return True
        request = self.request
        both = isinstance(request, TokenRequest) and request.keys is not None and request.queries is not None
        return both and self.reason in _GIVEN_UP

    @property
    def went_well(self) -> bool:
        """Whether it was answered, and not refused."""
        return self.answer is not None and not isinstance(self.answer, BlockdexError)

    @property
    def named(self) -> set[int]:
        """Sequences that it names."""
        request: Any = self.request
        if isinstance(request, TokenRequest):
            return set(request.spans.sequence_ids.tolist())
        if hasattr(request, "sequence_ids"):
            return set(request.sequence_ids)
        return {request.parent_id, request.child_id} if hasattr(request, "parent_id") else {request.sequence_id}


@dataclass
class Client:
    """A tenant's link, and what it asked in this life of the cache and was not compared yet."""

    tenant: str
    frontend: ForeignFrontend
    line: ServerLink
    hope: FingerprintEngine
    asked: dict[int, Asked] = field(default_factory=dict)
    evicted: list[tuple[int, float, int]] = field(default_factory=list)
    life: int = 0

    @property
    def unanswered(self) -> list[Asked]:
        """What may still be answered."""
        return [each for each in self.asked.values() if each.life < 0]


class Simulation:
    """One run.

    Args:
        seed: of everything that happens.
        tenants: whose clients there are.

    Attributes:
        compared: answers that a history explains.
        unexplained: answers that were not looked at, since too many histories were possible.
        lives: caches that there were before this one.
    """

    def __init__(self, seed: int, tenants: Sequence[str] = TENANTS) -> None:
        self.random = np.random.default_rng(seed)
        self.now, self.compared, self.unexplained, self.lives = 1000.0, 0, 0, 0
        native.hold_clock(self.now)
        random = self.random
        self.pressed = bool(random.random() < 0.5)
        self.failing = bool(random.random() < 0.3)
        self._inbox = RingInbox(0.0)
        self._files = ExitStack()
        self._files.callback(os.close, self._inbox.nudge)
        pages = SimulatedPages(SPEC, int(random.integers(6, 16)) if self.pressed else 200, reason="simulated")
        self.engine = Engine(
            pages,
            limits=LIMITS,
            inbox=self._inbox,
            lease_seconds=LEASE,
            decode_queries=LONGEST,
            prefill_slice_seconds=1e-6,
        )
        # What fails again and again is not paused for: time is not what the machine says.
        self.engine._stopping.set()
        device = self.engine._executor
        assert isinstance(device, SimulatedDevice)
        self.device = device
        device.random = random
        self.engine._shared.update()
        self._tickets = itertools.count(1)
        self._epochs = [self.epoch]
        self._broken = 0
        self._ends = {tenant: [FingerprintEngine(SPEC, self.epoch)] for tenant in TENANTS}
        self.clients = [self._connect(tenant) for tenant in tenants]

    @property
    def epoch(self) -> int:
        """Of the cache that there is now."""
        return self.engine._cache.epoch

    def run(self, windows: int = 3, actions: int = 60) -> None:
        """Does so many things, and compares, so many times."""
        for _ in range(windows):
            for _ in range(actions):
                self.act()
            self.settle()
            self.compare()

    def add(self, line: ServerLink) -> None:
        """Has the engine serve one more link."""
        self._inbox.add(line)

    def drop(self, line: ServerLink) -> None:
        """Has the engine serve a link no more."""
        self._inbox.drop(line)

    def close(self) -> None:
        """Gives the files back."""
        for client in self.clients:
            self._inbox.drop(client.line)
            client.frontend.close()
        self._inbox.look_round()
        self._files.close()

    # What happens.

    def act(self) -> None:
        """One thing."""
        random = self.random
        client = self.clients[int(random.integers(len(self.clients)))]
        draw = random.random()
        if draw < 0.34:
            self._ask(client)
        elif draw < 0.64:
            self.turn()
        elif draw < 0.80:
            self.device.run_one()
        elif draw < 0.87:
            self._read(client)
        elif draw < 0.94:
            self._pass(float(random.choice([0.01, 1.0, 6.0, 6.0])))
        elif draw < 0.97:
            self._cancel(client)
        elif draw < 0.99:
            if self.failing:
                self._broken += self.device.failure is None
                self.device.failure = str(random.choice(_FAILURES))
        elif len(client.unanswered) <= 3:
            self._leave(client)

    def _ask(self, client: Client) -> None:
        if not client.frontend.free:
            return
        request = draw_request(self.random, client.tenant, client.hope)
        client.hope.answer(request)
        self._send(client, request, float(self.random.choice([100.0, 100.0, 100.0, 2.0])))

    def _send(self, client: Client, request: Request, timeout: float) -> None:
        ticket = next(self._tickets)
        frontend = client.frontend
        frontend.write(frontend.lay(request, ticket, deadline=timeout))
        client.asked[ticket] = Asked(request, self.now, self.now + timeout)

    def turn(self) -> None:
        before = self.epoch
        self._pass(0.001)
        self.engine.turn(0.0)
        if self.epoch != before:
            # All that is answered by now was by the cache of before, and in the next turn it is a new one's.
            for client in self.clients:
                self._read(client)
                while client.line.native.has_unwritten:
                    client.line.native.publish()
                    self._read(client)
                client.hope = FingerprintEngine(SPEC, self.epoch)
            assert self._broken > self.lives, "the engine failed by itself"
            self.lives += 1
            self._epochs.append(self.epoch)
            self._pass(20.0)

    def _read(self, client: Client) -> None:
        client.frontend.read()
        for ticket, told in client.frontend.told.items():
            asked = client.asked[ticket]
            asked.answer, asked.life, asked.answered = told.answer, self.lives, self.now
        client.frontend.told.clear()

    def _cancel(self, client: Client) -> None:
        waiting = [ticket for ticket, asked in client.asked.items() if asked.life < 0]
        if waiting and client.frontend.free:
            ticket = waiting[int(self.random.integers(len(waiting)))]
            client.asked[ticket].cancelled = True
            client.frontend.write(RequestSlot(ticket=ticket, kind=layout.CANCEL))

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        native.hold_clock(self.now)

    def _leave(self, client: Client) -> None:
        """A client goes with what it has asked, and its tenant comes again."""
        self._read(client)
        self._inbox.drop(client.line)
        client.frontend.close()
        new = self._connect(client.tenant)
        client.frontend, client.line = new.frontend, new.line
        for asked in client.unanswered:
            asked.life = self.lives

    def _connect(self, tenant: str) -> Client:
        engine_side, handles = new_link(SIZES, self.epoch)
        frontend = ForeignFrontend(handles, clock=native.now)
        line = ServerLink(engine_side, _fail, lambda event: self._hear(tenant, event))
        self._inbox.add(line)
        return Client(tenant, frontend, line, self._ends[tenant][0].copy())

    def _hear(self, tenant: str, event: Event) -> None:
        if isinstance(event, SequencesEvicted) and event.tenant == tenant:
            (client,) = [client for client in self.clients if client.tenant == tenant]
            client.evicted += [(sequence, self.now, self.lives) for sequence in event.sequence_ids]

    @property
    def _busy(self) -> bool:
        """Whether anything is on its way, be it of a client that has gone."""
        launcher = self.engine._launcher
        return self.device.busy or launcher.in_flight or launcher.reads or self.engine._core.unanswered > 0

    def settle(self) -> None:
        """Until everything is answered; what waits for keys is late in the end."""
        self.device.failure = None
        for turn in range(_MOST_TURNS):
            if not any(client.unanswered for client in self.clients) and not self._busy:
                break
            self.turn()
            self.device.run_one()
            for client in self.clients:
                self._read(client)
            if turn == _MOST_TURNS // 2:
                self._pass(200.0)
        else:
            stuck = [asked for client in self.clients for asked in client.unanswered]
            raise AssertionError(f"never answered: {stuck}")
        # What was cut may have pages to give back, and who has gone memory.
        for _ in range(3):
            self.turn()

    # What was answered.

    def compare(self) -> None:
        """Finds a history that explains what each tenant was answered, and that ends in what the device holds."""
        check_integrity(self.engine._cache)
        assert self.engine._core.counts()["integrity_faults"] == 0, "the core contradicts itself"
        for client in self.clients:
            histories: list[History] | None = [History(engine) for engine in self._ends[client.tenant]]
            for life in range(client.life, self.lives + 1):
                if life > client.life:
                    histories = [History(FingerprintEngine(SPEC, self._epochs[life]))]
                asked = [each for each in client.asked.values() if each.life == life]
                evicted = [(sequence, at) for sequence, at, its_life in client.evicted if its_life == life]
                histories = self._explain(histories, asked, evicted)
            held = self._held(client.tenant)
            ends = [] if histories is None else [end for each in histories if (end := each.ending_as(held))]
            assert ends or histories is None, f"{client.tenant}: sequences are not what the answers say: {held.state()}"
            self._ends[client.tenant] = ends or [held]
            client.hope = self._ends[client.tenant][0].copy()
            client.life = self.lives
            client.asked.clear()
            client.evicted.clear()

    def _explain(
        self, histories: list[History] | None, asked: list[Asked], evicted: list[tuple[int, float]]
    ) -> list[History] | None:
        """Histories that go on as requests were answered; None where too many would."""
        for sequence, at in evicted:
            used = [each.sent for each in asked if each.went_well and each.answered < at and sequence in each.named]
            assert not used or at - max(used) >= LEASE, f"sequence {sequence} was evicted within its lease"
        for history in histories or ():
            history.evicted = [sequence for sequence, _ in evicted]
        for each in asked:
            if histories is None or len(histories) > _MOST_HISTORIES:
                self.unexplained += 1
                histories = None
                continue
            self._check_excuse(each)
            longer = [more for history in histories for more in history.after(each)]
            assert longer, f"nothing explains {each}; {[history.engine.state() for history in histories]}"
            histories = list({history.signature(): history for history in longer}.values())
            self.compared += 1
        if histories is not None:
            late = [history for history in histories if history.has_explained_all()]
            assert late, f"nothing explains {histories[0].waiting}"
            histories = late
        return histories

    def _check_excuse(self, asked: Asked) -> None:
        """Whether what only the circumstances can bring about had them."""
        excuses: dict[str, bool] = {
            Reason.OUT_OF_PAGES: self.pressed,
            Reason.CANCELLED: asked.cancelled,
            Reason.DEADLINE_EXCEEDED: asked.answered >= asked.deadline,
            Reason.OVERLOADED: self.failing,
            Reason.INTERNAL: asked.life < self.lives,
        }
        assert asked.reason is None or excuses.get(asked.reason, True), f"refused without cause: {asked}"

    def _held(self, tenant: str) -> FingerprintEngine:
        """What cache and device hold of a tenant."""
        cache, held = self.engine._cache, FingerprintEngine(SPEC, self.epoch)
        sequences = cache._sequences
        for name, pages in held_pages(cache).items():
            entry = sequences.find(*name)
            if name[0] != tenant or entry is None:
                continue
            held.sequences[name] = [
                Layer(
                    self.device.keys_of(pages, layer)[: int(sequences.lengths[layer, entry])],
                    int(sequences.revisions[layer, entry]),
                )
                for layer in range(SPEC.num_layers)
            ]
        return held


@dataclass
class History:
    """What may have happened to a tenant's sequences: an engine that it happened to.

    Attributes:
        engine: as it is after that.
        waiting: selections whose answers are not explained yet.
        evicted: sequences that were given up some time, and not yet here.
    """

    engine: FingerprintEngine
    waiting: list[Asked] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)

    def after(self, asked: Asked) -> list[History]:
        """All that this may have become when one more request had its answer."""
        longer = []
        excused = asked.reason in _EXCUSED or asked.answer is None
        if excused:
            longer.append(self.copy())
        for history in self._without_evicted(asked) if asked.may_have_happened or not excused else ():
            answer = history.engine.answer(asked.request)
            if excused or answer is None or _alike(asked.answer, answer):
                longer.append(history)
            if answer is None and not excused:
                history.waiting.append(asked)
        for history in longer:
            history.waiting = [each for each in history.waiting if not _same(history.engine, each)]
        return longer

    def _without_evicted(self, asked: Asked) -> list[History]:
        """Copies, with and without each sequence that the request names and that is evicted some time."""
        copies = []
        tenant = asked.request.tenant
        gone = [each for each in set(self.evicted) if each in asked.named and (tenant, each) in self.engine.sequences]
        for count in range(len(gone) + 1):
            for names in itertools.combinations(gone, count):
                history = self.copy()
                for name in names:
                    history.evicted.remove(name)
                    del history.engine.sequences[tenant, name]
                history.waiting = [each for each in history.waiting if not _same(history.engine, each)]
                copies.append(history)
        return copies

    def ending_as(self, held: FingerprintEngine) -> FingerprintEngine | None:
        """The engine, without what was evicted in the end, where it is as another one; else None."""
        for tenant, name in [name for name in self.engine.sequences if name not in held.sequences]:
            if name not in self.evicted:
                return None
            del self.engine.sequences[tenant, name]
        return self.engine if self.engine.same_as(held) else None

    def has_explained_all(self) -> bool:
        """Whether no answer is left; what was evicted in the end explains that what waited for it was told so."""
        return all(each.reason == Reason.UNKNOWN_SEQUENCE and each.named & set(self.evicted) for each in self.waiting)

    def copy(self) -> History:
        """Another one."""
        return History(self.engine.copy(), list(self.waiting), list(self.evicted))

    def signature(self) -> tuple[object, ...]:
        """What tells it from others."""
        return self.engine.signature(), tuple(map(id, self.waiting)), tuple(self.evicted)


def _same(engine: FingerprintEngine, asked: Asked) -> bool:
    return _alike(asked.answer, engine.answer(asked.request))


def _alike(actual: object, expected: object) -> bool:
    if type(actual) is not type(expected):
        return False
    if isinstance(expected, BlockdexError):
        assert isinstance(actual, BlockdexError)
        return (actual.reason, actual.message) == (expected.reason, expected.message)
    names = ("epoch", "block_ids") if isinstance(expected, TokenAnswer) else ("epoch", "lengths", "revisions")
    return all(np.array_equal(getattr(actual, name), getattr(expected, name)) for name in names)


def _fail(error: Exception) -> None:
    raise error


# What clients ask.


def draw_request(random: np.random.Generator, tenant: str, hope: FingerprintEngine) -> Request:
    """A request that mostly makes sense where all those before it will have gone well."""
    held = [sequence for _, sequence in hope.sequences]
    some = int(random.choice(held)) if held and random.random() < 0.95 else int(random.choice(_IDS))
    kind = _KINDS[int(random.choice(len(_KINDS), p=_ODDS)) if held else 0]
    match kind:
        case "open":
            absent = [each for each in _IDS if each not in held]
            return open_sequence(
                int(random.choice(absent)) if absent and random.random() < 0.9 else some, tenant=tenant
            )
        case "get":
            return get(some, tenant=tenant)
        case "fork":
            return fork(some, int(random.choice(_IDS)), int(random.integers(20)), tenant=tenant)
        case "truncate":
            return truncate(some, int(random.integers(16)), tenant=tenant)
        case "close":
            return close(some, tenant=tenant)
    return _draw_tokens(random, tenant, hope, kind, held)


_KINDS = ("open", "get", "fork", "truncate", "close", "append", "select", "both")
_ODDS = np.array([0.10, 0.05, 0.08, 0.05, 0.05, 0.22, 0.20, 0.25])


def _draw_tokens(
    random: np.random.Generator, tenant: str, hope: FingerprintEngine, kind: str, held: list[int]
) -> TokenRequest:
    layer = int(random.integers(SPEC.num_layers))
    waits = kind == "select" and bool(random.random() < 0.3)
    count = 1 if waits else min(len(held), int(random.choice([1, 1, 2, 3])))
    rows = []
    for sequence in sorted(random.choice(held, count, replace=False).tolist()):
        layers = hope.sequences.get((tenant, sequence))
        length, revision = (len(layers[layer].keys), layers[layer].revision) if layers else (0, 0)
        tokens = int(random.choice([1, 1, 2, LONGEST, 7, 11]))
        if kind != "select":
            start = max(length - int(random.choice([0, 0, 0, 0, 1, 3, 9, -1])), 0)
            step = int(random.choice([1, 1, 2, 0, -1]))
        else:
            tokens = min(tokens, max(length, 1))
            start = max(length - tokens, 0) if random.random() < 0.6 else int(random.integers(length + 1))
            start += waits * int(random.integers(3))
            step = int(random.choice([0, 0, waits, -1]))
        named = max(revision + step, 0) if random.random() < 0.5 else 0
        rows.append((sequence, min(start, 40), tokens, named))
    total = sum(row[2] for row in rows)
    heads = int(random.integers(1, SPEC.num_index_heads + 1))
    first = int(random.integers(SPEC.num_index_heads - heads + 1))
    keys = None if kind == "select" else Keys(_numbers(random, total, SPEC.head_dim), bool(random.random() < 0.5))
    queries = None
    if kind != "append":
        queries = Queries(
            _numbers(random, total, heads, SPEC.head_dim), first, heads, "ascending", False, wait_for_keys=waits
        )
    return TokenRequest(tenant, 0, layer, spans(*rows), keys, queries)


def _numbers(random: np.random.Generator, *shape: int) -> TensorData:
    return tensor(random.integers(256, size=shape).astype(np.float32), "bf16")


@contextmanager
def simulated() -> Iterator[None]:
    """Has engines that are made here run on simulated devices, by a clock that stands still."""
    logger = logging.getLogger("blockdex")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with mock.patch.object(loop, "make_executor", SimulatedDevice):
            yield
    finally:
        logger.setLevel(level)
        native.hold_clock(None)
