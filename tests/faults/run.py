"""Runs of faults: servers of several kinds, one fault after another, and what became of their clients."""

from __future__ import annotations

import collections
import contextlib
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import blockdex
from faults.kinds import KINDS, Doer
from faults.target import Target, target
from faults.workload import Checked
from support.credentials import NAMES, TOKENS, Papers, tls_flags
from support.tcp_proxy import proxy_to

SWITCHBOARD = {
    "allocation": "allocation=0.002",
    "launch": "launch=0.002",
    "copy": "copy=0.05",
    "ring_write": "ring_write=0.001",
    "socket": "socket=0.02",
    "clock": "clock=0.00002,leap=700",
}
"""`BLOCKDEX_FAULTS` of each seam: about one fault a second."""
CERTIFICATES = "expire certificates"
ALL_KINDS = (*KINDS, CERTIFICATES, *(f"make {seam} fail" for seam in SWITCHBOARD))
_RECOVERY_SECONDS = 60.0
_LONGEST_SEAM_SECONDS = 180.0
_QUIET_SECONDS = 0.2


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        recoveries: seconds until every client was served again, by kind of fault.
        answers: that were checked.
        lost: sequences that clients were told of.
        refusals: by reason.
        wrong: what must not be.
    """

    recoveries: dict[str, list[float]] = field(default_factory=dict)
    answers: int = 0
    lost: int = 0
    refusals: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)


def run(kinds: Sequence[str], each: int, seed: int) -> Outcome:
    """Does so many faults of every kind."""
    outcome = Outcome()
    print(f"seed {seed}", file=sys.stderr)
    from_outside = [kind for kind in kinds if kind in KINDS]
    if from_outside:
        _do_from_outside(outcome, from_outside, each, seed)
    if CERTIFICATES in kinds:
        _let_certificates_expire(outcome, each, seed)
    for number, (seam, faults) in enumerate(SWITCHBOARD.items()):
        if (kind := f"make {seam} fail") in kinds:
            _make_seam_fail(outcome, kind, f"{faults},seed={seed + number}", each, seed)
    return outcome


def figures(outcome: Outcome) -> dict[str, Any]:
    """A run in numbers."""
    every = [seconds for kind in outcome.recoveries.values() for seconds in kind]
    return {
        "faults": len(every),
        "answers": outcome.answers,
        "wrong": len(outcome.wrong),
        "sequences_lost_and_reported": outcome.lost,
        "recovery_seconds": _quantiles(every),
        "kinds": {
            kind: {"faults": len(seconds), **_quantiles(seconds)} for kind, seconds in outcome.recoveries.items()
        },
        "refusals": dict(sorted(outcome.refusals.items())),
    }


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    p50, p99 = np.quantile(seconds, (0.5, 0.99))
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(max(seconds), 3)}


@contextlib.contextmanager
def _checked(outcome: Outcome, clients: Sequence[Checked]) -> Iterator[None]:
    """Has clients go on for a while, and notes what they saw."""
    for client in clients:
        client.start()
    try:
        yield
    finally:
        for client in clients:
            client.stop()
            outcome.answers += client.answers
            outcome.lost += client.lost
            outcome.refusals += client.refusals
            if client.failure is not None:
                outcome.wrong.append(f"{client.name}: {client.failure!r}")


def _all_go_on(clients: Sequence[Checked]) -> bool:
    return all(client.failure is None for client in clients)


def _recovered(outcome: Outcome, kind: str, clients: Sequence[Checked], since: float, until: float) -> None:
    """Waits until all clients are served by calls that began after `until`; the time counts from `since`."""
    served = [client.good_after(until, _RECOVERY_SECONDS) for client in clients]
    late = [client.name for client, at in zip(clients, served, strict=True) if at is None]
    if late:
        outcome.wrong.append(f"{kind}: not served again within {_RECOVERY_SECONDS:g} s: {', '.join(late)}")
        return
    seconds = max(at - since for at in served if at is not None)
    outcome.recoveries.setdefault(kind, []).append(seconds)
    print(f"{kind}: {seconds:.3f} s", file=sys.stderr)


def _do_from_outside(outcome: Outcome, kinds: Sequence[str], each: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    with target() as server, proxy_to(server.address) as proxy:
        clients = [
            Checked("near", 1, address=server.address, transport="stream"),
            Checked("far", 2, address=proxy.address, transport="stream"),
            Checked("single", 3, address=server.address, transport="unary"),
        ]
        doer = Doer(server, proxy, random)
        with _checked(outcome, clients):
            _recovered(Outcome(), "start", clients, time.monotonic(), time.monotonic())
            for kind in random.permutation([*kinds] * each).tolist():
                began = time.monotonic()
                KINDS[kind](doer)
                # What is killed is gone at once; what is held is held until now.
                over = time.monotonic()
                _recovered(outcome, kind, clients, began if kind.startswith("kill") else over, over)
                if not _all_go_on(clients):
                    return
                time.sleep(_QUIET_SECONDS)


def _let_certificates_expire(outcome: Outcome, each: int, seed: int) -> None:
    """The server's certificate ends, clients come and are turned away, and another one is put in its place."""
    kind = CERTIFICATES
    with tempfile.TemporaryDirectory(prefix="blockdex-faults-") as folder:
        papers = Papers(Path(folder))
        tls = blockdex.TLS(ca=papers.path("ca.pem"))
        with target(*tls_flags(papers)) as server:
            client = Checked(
                "engine-a", seed, address=server.address, transport="stream", tls=tls, token=TOKENS["engine-a"]
            )
            with _checked(outcome, [client]):
                for _ in range(each):
                    papers.issue("server", *NAMES, days=-1)
                    _until(lambda: not _lets_in(server, tls), f"{kind}: clients are let in with it", outcome)
                    papers.issue("server", *NAMES)
                    began = time.monotonic()
                    _until(lambda: _lets_in(server, tls), f"{kind}: nobody is let in after it", outcome)
                    _recovered(outcome, kind, [client], began, time.monotonic())


def _lets_in(server: Target, tls: blockdex.TLS) -> bool:
    try:
        with blockdex.Client(server.address, tls=tls, token=TOKENS["engine-b"]) as client:
            client.info(timeout=1.0)
    except blockdex.BlockdexError:
        return False
    return True


def _until(holds: Callable[[], bool], what: str, outcome: Outcome) -> None:
    deadline = time.monotonic() + _RECOVERY_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            outcome.wrong.append(what)
            return


def _make_seam_fail(outcome: Outcome, kind: str, faults: str, each: int, seed: int) -> None:
    """A seam fails by itself, over and over; what the server says of itself is asked for all the while."""
    with target(faults=faults) as server:
        clients = [
            Checked("near", seed + 1, address=server.address, transport="stream"),
            Checked("single", seed + 2, address=server.address, transport="unary"),
        ]
        with _checked(outcome, clients):
            seen = 0
            deadline = time.monotonic() + _LONGEST_SEAM_SECONDS
            while len(outcome.recoveries.get(kind, ())) < each and time.monotonic() < deadline and _all_go_on(clients):
                with contextlib.suppress(OSError, urllib.error.URLError):
                    urllib.request.urlopen(f"http://{server.http}/metrics", timeout=2).close()
                if len(server.faults_made) > seen:
                    began = time.monotonic()
                    seen = len(server.faults_made)
                    _recovered(outcome, kind, clients, began, began)
                time.sleep(0.01)
        if len(outcome.recoveries.get(kind, ())) < each:
            outcome.wrong.append(
                f"{kind}: {seen} faults in {_LONGEST_SEAM_SECONDS:g} s; " + "\n".join(server.output[-20:])
            )
