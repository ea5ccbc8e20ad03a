"""Hostile input to a live server through every door at once, beside clients that check every answer."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import os
import random
import socket
import struct
import tempfile
import threading
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from blockdex.ring.layout import HELLO_STRUCT, MAGIC, VERSION
from blockdex.v1 import indexer_pb2 as pb
from faults.target import Target, target
from faults.workload import Checked
from fuzz import inputs

DOORS = ("calls", "streams", "http", "control channel")
_SERVICE = "/blockdex.v1.IndexerService/"
_METADATA = (("blockdex-tenant", "hostile"),)
_CALL_SECONDS = 0.3
_HANG_SECONDS, _SERVED_SECONDS = 5.0, 30.0
_TASKS = {"calls": 16, "streams": 4, "http": 16}
_OF_A_STREAM, _OF_A_LINK = 50, 50
_CLEAN_EVERY = 1000
_MOST_FILES = 8


@dataclass
class Door:
    """What went through one door, and what came of it.

    Attributes:
        inputs: how many.
        outcomes: how often each.
        wrong: what must not be.
    """

    inputs: int = 0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What became of a run.

    Attributes:
        doors: by name.
        memory: private bytes of all processes, when a fifth was done and at the end.
        answers: of the clients beside it, all of which were checked.
        wrong: what must not be.
    """

    doors: dict[str, Door] = field(default_factory=lambda: {name: Door() for name in DOORS})
    memory: list[int] = field(default_factory=list)
    answers: int = 0
    wrong: list[str] = field(default_factory=list)


def run(each: int, seed: int, seconds: float) -> Report:
    """Puts so many inputs through every door, or as many as there is time for."""
    report = Report()
    with tempfile.TemporaryDirectory(prefix="blockdex-fuzz-") as folder, _served(folder) as server:
        pids = server.pids
        clients = [
            Checked("near", seed + 1, address=server.address, transport="stream"),
            Checked("single", seed + 2, address=server.address, transport="unary"),
        ]
        for client in clients:
            client.start()
        try:
            deadline = time.monotonic() + seconds
            for part in (each // 5, each):
                asyncio.run(_all_doors(report, server, Path(folder, "ring"), part, seed, deadline))
                report.memory.append(_private_bytes(server.pids))
            served = [client.good_after(time.monotonic(), _SERVED_SECONDS) for client in clients]
        finally:
            for client in clients:
                client.stop()
                report.answers += client.answers
                if client.failure is not None or client.lost:
                    report.wrong.append(f"{client.name}: {client.failure!r}, {client.lost} sequences lost")
        if None in served:
            report.wrong.append(f"a client is not served any more: {[dict(client.refusals) for client in clients]}")
        if server.pids != pids:
            report.wrong.append(f"processes were started again: {pids} are {server.pids}")
        report.wrong += [line for line in server.output if "Traceback" in line or "never retrieved" in line]
    report.wrong += [f"{name}: {what}" for name, door in report.doors.items() for what in door.wrong]
    return report


@contextlib.contextmanager
def _served(folder: str) -> Iterator[Target]:
    with target("--socket", f"{folder}/ring", wrapped=False) as server:
        yield server


async def _all_doors(report: Report, server: Target, path: Path, each: int, seed: int, deadline: float) -> None:
    """Until every door has had so many inputs since the start."""

    def more(door: str) -> bool:
        return report.doors[door].inputs < each and time.monotonic() < deadline

    control = threading.Thread(
        target=_say_words, args=(report.doors["control channel"], path, seed, lambda: more("control channel"))
    )
    control.start()
    options = (("grpc.max_receive_message_length", -1),)
    async with grpc.aio.insecure_channel(server.address, options=options) as channel, asyncio.TaskGroup() as tasks:
        attacks: dict[str, Callable[[Door, random.Random], Awaitable[None]]] = {
            "calls": lambda door, draw: _call(channel, door, draw),
            "streams": lambda door, draw: _stream(channel, door, draw),
            "http": lambda door, draw: _ask_http(server.http, door, draw),
        }
        for name, attack in attacks.items():
            for number in range(_TASKS[name]):
                draw = random.Random(f"{seed} {name} {number} {report.doors[name].inputs}")
                tasks.create_task(_again(attack, report.doors[name], draw, lambda name=name: more(name)))  # type: ignore[misc]
    await asyncio.to_thread(control.join)


async def _again(
    attack: Callable[[Door, random.Random], Awaitable[None]],
    door: Door,
    draw: random.Random,
    more: Callable[[], bool],
) -> None:
    while more():
        try:
            await asyncio.wait_for(attack(door, draw), _HANG_SECONDS)
        except TimeoutError:
            door.wrong.append(f"no end after {_HANG_SECONDS:g} s")
            return


async def _call(channel: grpc.aio.Channel, door: Door, draw: random.Random) -> None:
    name, data = inputs.rpc(draw)
    door.inputs += 1
    call: Any = channel.unary_unary(_SERVICE + name)
    try:
        answer = await call(data, metadata=_METADATA, timeout=_CALL_SECONDS)
        inputs.RPCS[name][1].FromString(answer)
        door.outcomes["OK"] += 1
    except grpc.aio.AioRpcError as error:
        _note(door, error.code(), str(error.details()), data)
    if door.inputs % _CLEAN_EVERY == 0:
        await _clean(channel)


async def _clean(channel: grpc.aio.Channel) -> None:
    """Gives back what was opened, lest the clients beside have no page left."""
    numbers = [number for number in inputs.NUMBERS if number]
    close: Any = channel.unary_unary(f"{_SERVICE}CloseSequences")
    close_pool: Any = channel.unary_unary(f"{_SERVICE}ClosePool")
    with contextlib.suppress(grpc.aio.AioRpcError):
        request = pb.CloseSequencesRequest(sequence_ids=numbers)
        await close(request.SerializeToString(), metadata=_METADATA, timeout=_HANG_SECONDS)
    for number in numbers:
        with contextlib.suppress(grpc.aio.AioRpcError):
            request_of_pool = pb.ClosePoolRequest(pool_id=number).SerializeToString()
            await close_pool(request_of_pool, metadata=_METADATA, timeout=_HANG_SECONDS)


async def _stream(channel: grpc.aio.Channel, door: Door, draw: random.Random) -> None:
    open_stream: Any = channel.stream_stream(f"{_SERVICE}Stream")
    call = open_stream(metadata=_METADATA, timeout=_HANG_SECONDS / 2)
    sent: list[bytes] = []
    try:
        for _ in range(_OF_A_STREAM):
            sent.append(inputs.stream_message(draw))
            await call.write(sent[-1])
            door.inputs += 1
        await call.done_writing()
        async for answer in call:
            pb.StreamResponse.FromString(answer)
            door.outcomes["answered"] += 1
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        # A write to a stream that has ended says nothing of how it has.
        _note(door, await call.code(), str(await call.details()), b"".join(sent))


_OF_A_WRITE = "Internal error from Core"
"""What gRPC makes of a write to a stream that the server has just ended."""


def _note(door: Door, code: grpc.StatusCode, details: str, data: bytes) -> None:
    door.outcomes[code.name if details != _OF_A_WRITE else "ended early"] += 1
    if details != _OF_A_WRITE and code.name in {"UNKNOWN", "INTERNAL", "DATA_LOSS"}:
        door.wrong.append(f"{code.name}: {details}: {data.hex()}")


async def _ask_http(address: str, door: Door, draw: random.Random) -> None:
    host, port = address.rsplit(":", 1)
    door.inputs += 1
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(inputs.http(draw))
        with contextlib.suppress(TimeoutError):
            answer = await asyncio.wait_for(reader.read(64), 0.1)
            status = answer.split(b" ")[1:2]
            door.outcomes[status[0].decode("latin-1") if status else "closed"] += 1
            if status == [b"500"]:
                door.wrong.append(f"status 500: {answer!r}")
    except ConnectionError:
        door.outcomes["reset"] += 1
    finally:
        writer.transport.abort()


def _say_words(door: Door, path: Path, seed: int, more: Callable[[], bool]) -> None:
    """Link after link, each of which says many words after its hello."""
    draw = random.Random(f"{seed} words {door.inputs}")
    while more():
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(_HANG_SECONDS)
            try:
                link.connect(str(path))
                hello = HELLO_STRUCT.pack(MAGIC, VERSION, 7) + b"hostile"
                link.sendall(hello if draw.random() < 0.95 else inputs.spoiled(draw, hello))
                door.inputs += 1
                if not _greeted(link):
                    door.outcomes["no greeting"] += 1
                    continue
                link.setblocking(False)
                for _ in range(_OF_A_LINK):
                    link.sendall(inputs.words(draw))
                    door.inputs += 1
                    with contextlib.suppress(BlockingIOError):
                        door.outcomes["answered" if link.recv(1 << 16) else "hung up"] += 1
            except BlockingIOError:
                door.outcomes["full"] += 1
            except TimeoutError:
                # A hello that is cut off is waited for; another end of it is a hang.
                door.outcomes["silent"] += 1
            except OSError:
                door.outcomes["hung up"] += 1


def _greeted(link: socket.socket) -> bool:
    data, others, _, _ = link.recvmsg(4096, socket.CMSG_LEN(4 * _MOST_FILES))
    for level, kind, numbers in others:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            for number in array("i", numbers[: len(numbers) // 4 * 4]):
                os.close(number)
    return len(data) >= struct.calcsize("<QII") and bool(others)


def _private_bytes(pids: Sequence[int]) -> int:
    lines = itertools.chain.from_iterable(
        Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines() for pid in pids
    )
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
