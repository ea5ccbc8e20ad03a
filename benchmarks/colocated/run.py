"""One run: a server, and row after row beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

import blockdex
from benchmarks.colocated.decode import make_decode
from benchmarks.colocated.mps import mps
from benchmarks.colocated.rows import ROWS, Row
from benchmarks.colocated.settings import FIRST_ID, FLEET_FIRST_ID, TENANT, Settings
from benchmarks.served import served
from blockdex import Client

Numbers = dict[str, Any]

_FRONTENDS = 2


@contextmanager
def serving(arguments: Namespace) -> Iterator[Settings]:
    """A server, whose sequences are there to be decoded."""
    with tempfile.TemporaryDirectory(prefix="blockdex-") as folder:
        socket = f"{folder}/ring"
        server = served(arguments.device, arguments.layers, arguments.cache_bytes, _FRONTENDS, f"--socket={socket}")
        with server as running:
            settings = Settings(
                grpc=running.grpc,
                http=running.http,
                socket=socket,
                core=running.core,
                folder=folder,
                engine_device="cuda:0",
                **{each.name: getattr(arguments, each.name) for each in fields(Settings) if each.name in arguments},
            )
            compile_client(Path(folder) / "client")
            fill(settings)
            yield settings


def compile_client(target: Path) -> None:
    """Compiles `client.c`."""
    headers = Path(blockdex.__file__).parent / "ring" / "include"
    flags = ("-std=gnu11", "-O2", f"-I{headers}")
    subprocess.run(
        [os.environ.get("CC", "cc"), *flags, Path(__file__).with_name("client.c"), "-o", target], check=True, timeout=60
    )


def fill(settings: Settings) -> None:
    """Appends all that is asked for later, and writes what it is."""
    fleet = range(FLEET_FIRST_ID, FLEET_FIRST_ID + 1000 * settings.clients, 1000)
    with Client(settings.grpc, transport="ring", tenant=TENANT, timeout=60) as client:
        spec = client.info().spec
        for first_id, layers in (
            (FIRST_ID, settings.layers),
            *((first_id, settings.fleet_layers) for first_id in fleet),
        ):
            ids = list(range(first_id, first_id + settings.sequences))
            make_decode(client, spec, ids, settings.tokens, layers).write(Path(settings.folder) / f"{first_id}.bin")


def measure(row: Row, settings: Settings) -> Numbers:
    """What a row's process tells.

    Raises:
        RuntimeError: it fails, or takes too long.
    """
    with subprocess.Popen(
        row.command(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        try:
            said, complaint = running.communicate(timeout=row.seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"ended after {row.seconds:g} s") from None
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
    if running.returncode:
        raise RuntimeError(f"ended with {running.returncode}: {complaint.strip()[-600:]}")
    numbers = json.loads(said.splitlines()[-1])
    assert isinstance(numbers, dict)
    return numbers


def run(arguments: Namespace, result: Numbers, path: Path, console: Console) -> None:
    """Measures row after row, and writes the result after each; with MPS first, then without."""
    gpus = result["machine"].get("gpu", {}).get("count", 0)
    for under_mps in (True, False) if arguments.mps else (False,):
        names = [name for name in arguments.rows if not (arguments.mps and not under_mps) or ROWS[name].without_mps]
        suffix = " (MPS)" if under_mps else ""
        began = time.monotonic()
        with mps() if under_mps else nullcontext(), serving(arguments) as settings:
            console.print(f"server and sequences{suffix}: {time.monotonic() - began:.1f} s")
            for name in names:
                if ROWS[name].gpus > gpus:
                    continue
                began = time.monotonic()
                try:
                    numbers = measure(ROWS[name], settings)
                    figures = list(ROWS[name].figures(numbers, settings))
                except (RuntimeError, LookupError, ValueError) as error:
                    result["failed"][name + suffix] = str(error)
                    console.print(f"[red]{name}{suffix}: {error}[/red]")
                else:
                    result["parts"][name + suffix] = numbers
                    result["rows"] += [_row(figure.row(), suffix, arguments.device) for figure in figures]
                write(result, path)
                console.print(f"{name}{suffix}: {time.monotonic() - began:.1f} s")


def _row(row: Numbers, suffix: str, device: str) -> Numbers:
    """A figure as it is written: a CPU has no target."""
    row["name"] += suffix
    return row if device.startswith("cuda") else row | {"target": None, "met": None}


def write(result: Numbers, path: Path) -> None:
    """Writes a result as far as it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
