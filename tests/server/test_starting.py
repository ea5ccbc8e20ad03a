"""Whether a server is one process or several, how long those spin, and what is refused."""

from __future__ import annotations

import os
import socket

import pytest

from blockdex.server import bootstrap as starting
from blockdex.server.addresses import Address
from blockdex.server.bootstrap import StartError, spin_seconds, splits
from blockdex.server.config import load_settings


@pytest.mark.parametrize(
    ("flags", "cores", "supported", "expected"),
    [
        ((), 3, True, False),
        ((), 4, True, True),
        ((), 16, False, "a server needs Linux on x86-64"),
        (("--processes", "single"), 16, True, False),
        (("--processes", "split"), 1, True, True),
        (("--frontends", "3"), 1, True, True),
        (("--processes", "split"), 16, False, "a server needs Linux on x86-64"),
        (("--frontends", "3", "--processes", "single"), 16, True, "frontends: 3 need --processes split"),
    ],
)
def test_how_many_processes(
    flags: tuple[str, ...], cores: int, supported: bool, expected: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "SUPPORTED", supported)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    settings = load_settings(flags)
    if isinstance(expected, str):
        with pytest.raises(StartError, match=f"^{expected}"):
            splits(settings)
    else:
        assert splits(settings) is expected


@pytest.mark.parametrize(
    ("flags", "cores", "expected"),
    [
        ((), 3, 0.001),
        ((), 2, 0.0),
        (("--frontends", "4"), 6, 0.001),
        (("--frontends", "4"), 5, 0.0),
        (("--spin-seconds", "auto"), 2, 0.0),
        (("--spin-seconds", "0.0003"), 1, 0.0003),
        (("--spin-seconds", "0"), 64, 0.0),
    ],
)
def test_how_long_its_processes_spin(
    flags: tuple[str, ...], cores: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert spin_seconds(load_settings(flags)) == expected


def test_a_reserved_port_is_shared_with_those_who_share_and_refused_to_others() -> None:
    held, address = Address.parse("127.0.0.1:0").reserve()
    with held:
        with pytest.raises(OSError, match=f"cannot listen on {address}"):
            address.listen()
        with socket.socket() as sharing:
            sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sharing.bind((address.host, address.port))
            sharing.listen()
            with socket.create_connection((address.host, address.port), timeout=5):
                sharing.accept()[0].close()
    with Address.parse("127.0.0.1:0").listen() as alone:
        address = address.at_port_of(alone)
        with pytest.raises(OSError, match=f"cannot listen on {address}"):
            address.reserve()
