"""An engine core on a socket of its own, without frontends: what tests and figures of device channels talk to.

Of the steps that a server captures on a GPU it captures those of short decodes alone, so that it starts in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import sys
from pathlib import Path

from blockdex.contract.messages import Limits
from blockdex.executor import gpu
from blockdex.executor.cuda_graphs import Shape
from blockdex.executor.prefill_slices import SliceShape
from blockdex.ring.listener import RingHost
from blockdex.ring.server import RingInbox
from blockdex.scheduler.loop import Engine
from blockdex_kernels import IndexSpec
from blockdex_kernels.dispatch import choose_backend

LIMITS = Limits(
    max_message_bytes=1 << 26, max_spans=1024, max_queued_requests=1024, max_stream_requests=64, max_wait_ms=20_000
)


def shapes(spec: IndexSpec) -> list[Shape]:
    """Steps that are captured."""
    return [Shape(8, length, min(256, spec.max_blocks)) for length in (1, 16)]


def slice_shapes(spec: IndexSpec) -> list[SliceShape]:
    """Slices of prefills that are captured, where they are."""
    return [
        SliceShape(rows, width) for width in (256, 1024) if width <= spec.max_blocks for rows in (8192, 16384, 32768)
    ]


def make_engine(device: str, spec: IndexSpec, num_pages: int, inbox: RingInbox, *, prefills: bool) -> Engine:
    """An engine that serves decodes, and prefills as a server does where it is to."""
    backend = choose_backend(device, spec, num_pages)
    engine = Engine(backend, limits=LIMITS, inbox=inbox)
    if isinstance(engine._executor, gpu.GpuExecutor):
        gpu.shapes = shapes  # type: ignore[attr-defined]
        captured = slice_shapes(spec) if prefills else []
        engine._executor._slices.shapes = lambda: iter(captured)  # type: ignore[method-assign]
        backend.warm_up = lambda: iter(())  # type: ignore[method-assign]
    for _ in engine.warm_up():
        pass
    return engine


async def serve(arguments: argparse.Namespace) -> None:
    """Serves until it is killed; says first what it is."""
    spec = IndexSpec(**json.loads(arguments.spec))
    inbox = RingInbox(arguments.spin_seconds)
    engine = make_engine(arguments.device, spec, arguments.pages, inbox, prefills=arguments.prefills)
    engine.start()
    with contextlib.suppress(FileNotFoundError):
        Path(arguments.socket).unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(arguments.socket)
        listening.listen()
        listening.setblocking(False)
        print(json.dumps({"epoch": engine.info().epoch}), flush=True)
        await RingHost(engine, inbox, listening).run()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--spec", default="{}", help="fields of the indexer, JSON")
    parser.add_argument("--pages", type=int, default=1024)
    parser.add_argument("--prefills", action="store_true", help="capture slices of prefills too")
    parser.add_argument("--spin-seconds", type=float, default=0.001)
    asyncio.run(serve(parser.parse_args(sys.argv[1:])))


if __name__ == "__main__":
    main()
