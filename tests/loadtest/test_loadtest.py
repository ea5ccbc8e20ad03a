"""`blockdex loadtest` against a real server on real ports."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockdex.cli.main import main
from blockdex.loadtest.settings import SCENARIOS
from support.corrupting_proxy import corrupting_proxy
from support.serving import SMALL, Serving, serve

_WAIT_SECONDS = 20.0


class Runs:
    """Load tests of one server, whose files lie in a folder of their own."""

    def __init__(self, server: Serving, folder: Path) -> None:
        self.server = server
        self.path = folder / "result"

    def words(self, scenario: str | None, **changes: Any) -> list[str]:
        """Arguments of a short load test; a change of None leaves an argument out."""
        options = {
            "address": self.server.grpc_address,
            "http-address": self.server.http_address,
            "scenario": scenario,
            "clients": 3,
            "duration": 0.8,
            "warm-up": 0.1,
            "ceiling": 0,
            "timeout": 10,
            "check-share": 0.02,
            # A busy machine stands still for longer than the default.
            "outage": 30,
            "output": self.path,
        } | {name.replace("_", "-"): value for name, value in changes.items()}
        return ["loadtest", *(f"--{name}={value}" for name, value in options.items() if value is not None)]

    def run(self, scenario: str, *, status: int, **changes: Any) -> dict[str, Any]:
        """Runs one in this process, with worker processes of its own; the result, once the status is as expected."""
        assert main(self.words(scenario, **changes)) == status
        return self.result()

    def result(self) -> dict[str, Any]:
        """What the latest run has written."""
        written: dict[str, Any] = json.loads(self.path.with_name("result.json").read_text(encoding="utf-8"))
        return written

    def metrics(self) -> str:
        """What the server says at `/metrics`."""
        with urllib.request.urlopen(f"http://{self.server.http_address}/metrics", timeout=_WAIT_SECONDS) as response:
            text: str = response.read().decode()
        return text

    def sequences(self) -> int:
        """Open sequences, all tenants together."""
        (count,) = re.findall(r"^blockdex_sequences (\S+)$", self.metrics(), re.MULTILINE)
        return int(float(count))

    def answered(self, rpc: str) -> int:
        """Calls that the server has answered with OK."""
        found = re.findall(rf'^blockdex_requests_total{{code="OK",rpc="{rpc}"}} (\S+)$', self.metrics(), re.MULTILINE)
        return int(float(found[0])) if found else 0


@pytest.fixture
def runs(server: Serving, tmp_path: Path) -> Runs:
    """Load tests of the server that all tests share."""
    return Runs(server, tmp_path)


def until(condition: Callable[[], bool]) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.02)


@contextlib.contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Runs something beside the block, and fails if it failed."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            action()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_runs_and_counts_what_the_server_counts(runs: Runs, scenario: str) -> None:
    open_before = runs.sequences()
    result = runs.run(scenario, status=0, processes=2 if scenario == "mixed" else 1)
    assert result["all"]["errors"] == 0
    assert set(result["operations"]) <= {"open", "fork", "truncate", "close", "append", "select", "decode", "prefill"}
    assert result["all"]["calls"] == sum(calls["calls"] for calls in result["operations"].values()) > 0
    assert result["all"]["calls"] == sum(sum(codes.values()) for codes in result["sent"]["measured"].values())
    assert result["checks"]["checked"] > 0
    assert result["checks"]["wrong"] == []
    assert result["left_open"] == 0
    assert runs.sequences() == open_before

    ours: Counter[tuple[str, str]] = Counter()
    for rpcs in result["sent"].values():
        for rpc, codes in rpcs.items():
            ours.update({(rpc, code): count for code, count in codes.items()})
    theirs = {
        (labels["rpc"], labels["code"]): count
        for name, count in result["server"]["requests"].items()
        if (labels := dict(re.findall(r'(\w+)="([^"]*)"', name)))["rpc"] != "GetInfo"
    }
    assert dict(ours) == theirs


def test_the_ceiling_is_the_load_tests_own(runs: Runs) -> None:
    """Measured in the same run against a server that computes nothing; near it, the result says so."""
    result = runs.run("churn", status=0, ceiling=1, duration=1, check_share=0)
    ceiling = result["ceiling"]
    rate = ceiling["throughput"]["calls_per_second"]
    assert rate > result["throughput"]["calls_per_second"]
    assert ceiling["share_reached"] == pytest.approx(result["throughput"]["calls_per_second"] / rate)
    assert ceiling["near"] == (ceiling["share_reached"] >= 0.8)
    assert len(ceiling["cpu_shares"]) == 1
    assert result["checks"]["checked"] == 0


def test_an_open_loop_counts_from_the_intended_moment(runs: Runs) -> None:
    """A server that stands still for half a second is seen by every call that was to begin meanwhile."""
    began = runs.answered("Stream/AppendAndSelect")

    def stall() -> None:
        until(lambda: runs.answered("Stream/AppendAndSelect") > began + 20)
        for number, pause in ((signal.SIGSTOP, 0.5), (signal.SIGCONT, 0.0)):
            for pid in runs.server.pids():
                os.kill(pid, number)
            time.sleep(pause)

    with meanwhile(stall):
        result = runs.run(
            "decode-fleet", status=0, rate=100, spacing="fixed", clients=2, scale=0.001, warm_up=0, duration=2
        )
    latencies = result["all"]["latency_seconds"]
    assert result["all"]["calls"] + result["unsent"] == pytest.approx(200, abs=1)
    # A quarter of the calls were to begin while it stood still: had latency counted from the sending, it were two.
    assert latencies["p99"] > 0.35
    assert latencies["p90"] > 0.1
    assert result["lateness_seconds"]["max"] > 0.35


def test_a_wrong_answer_is_caught(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    with corrupting_proxy(runs.server.grpc_address, every=2) as address:
        result = runs.run("decode-fleet", status=1, address=address, transport="unary", check_share=1)
    wrong, checks = result["checks"]["wrong"], result["checks"]
    assert 0 < len(wrong) < checks["checked"]
    assert {entry["operation"] for entry in wrong} == {"decode"}
    assert "wrong answer: decode, sequence" in capsys.readouterr().out
    assert f"{len(wrong)} wrong answers" in runs.path.with_name("result.html").read_text(encoding="utf-8")


def test_objectives_and_an_earlier_run(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    first = runs.run("churn", status=0, slo="p99<30s", seed=1, duration=0.3)
    assert [slo["met"] for slo in first["slos"]] == [True]
    old = runs.path.with_name("old.json")
    runs.path.with_name("result.json").rename(old)
    second = runs.run("churn", status=3, slo="rate>1000000/s", compare=old, clients=2, duration=0.3)
    assert [slo["met"] for slo in second["slos"]] == [False]
    compared = second["comparison"]
    assert {difference["what"] for difference in compared["differences"]} >= {"settings.seed", "settings.clients"}
    assert next(row for row in compared["figures"] if row["figure"] == "calls")["ratio"] > 0
    out = capsys.readouterr().out
    assert "not alike: settings.clients: 3 then, 2 now" in " ".join(out.split())
    assert "missed" in out


def test_ctrl_c_ends_early_with_a_report(runs: Runs) -> None:
    open_before, began = runs.sequences(), runs.answered("Stream/AppendAndSelect")
    handler = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        until(lambda: runs.answered("Stream/AppendAndSelect") > began + 20)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    start = time.monotonic()
    with meanwhile(interrupt):
        result = runs.run("decode-fleet", status=130, duration=600, warm_up=0, scale=0.001)
    assert time.monotonic() - start < 30
    assert result["window"]["interrupted"]
    assert 0 < result["window"]["seconds"] < 30
    assert result["all"]["calls"] > 0
    assert runs.sequences() == open_before
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.slow
def test_sequences_are_closed_even_when_the_load_test_is_killed(runs: Runs) -> None:
    open_before = runs.sequences()
    words = runs.words("decode-fleet", duration=600, scale=0.001)
    with subprocess.Popen(
        [sys.executable, "-m", "blockdex", *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        try:
            until(lambda: runs.sequences() > open_before)
        finally:
            process.kill()
    until(lambda: runs.sequences() == open_before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scenario": "flood"}, "invalid choice: 'flood'"),
        ({"scenario": None}, "required: --scenario"),
        ({"clients": 0}, "--clients must be 1 to 4096, got 0"),
        ({"sweep": "clients=0,1"}, "--sweep 'clients=0,1': must be two or more different numbers above 0"),
        ({"sweep": "clients=2,5000"}, "--clients must be 1 to 4096, got 5000"),
        ({"sweep": "clients=1,2", "scenario": "mixed"}, "--clients must be at least 2 for mixed, got 1"),
        ({"sweep": "clients=1,2", "compare": "x.json"}, "--compare: a sweep cannot be compared"),
        ({"clients": "many"}, "--clients: must be a number, got 'many'"),
        ({"clients": 2, "processes": 3}, "--processes must be at most --clients, got 3 and 2"),
        ({"scenario": "mixed", "clients": 1}, "--clients must be at least 2 for mixed, got 1"),
        ({"duration": "inf"}, "--duration: must be at least 1e-06, got inf"),
        ({"check-share": 1.5}, "--check-share: must be 0 to 1, got 1.5"),
        ({"slo": "p99<fast"}, "--slo 'p99<fast': p99 takes a number with us, ms, s"),
        ({"compare": "/nowhere.json"}, "/nowhere.json: No such file"),
        ({"output": "/nowhere/result"}, "--output: /nowhere is not a folder"),
        ({"layers": 99}, "--layers must be at most the server's 3, got 99"),
        ({"clients": 2000}, "2000 clients of churn need at least"),
    ],
)
def test_what_cannot_be_is_refused(
    runs: Runs, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    assert main(runs.words(**{"scenario": "churn"} | changes)) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("blockdex loadtest: ")
    assert words in last
    assert not captured.out
    assert not runs.path.with_name("result.json").exists()


@pytest.mark.parametrize("changes", [{"address": "127.0.0.1:1"}, {"http_address": "127.0.0.1:1"}])
def test_a_server_that_does_not_answer_is_told(
    runs: Runs, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    """However long a call may take, and what is waited for is said first."""
    start = time.monotonic()
    assert main(runs.words("churn", timeout=60, **changes)) == 1
    assert time.monotonic() - start < 15
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("asking 127.0.0.1:")
    assert "127.0.0.1:1" in last


def test_a_sweep_sets_its_runs_beside_each_other(runs: Runs) -> None:
    assert main(runs.words("decode-fleet", clients=None, sweep="clients=1,3", processes=2, duration=0.5)) == 0
    with runs.path.with_name("result.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["clients"], line["processes"], line["exit_status"]) for line in lines] == [
        ("1", "1", "0"),
        ("3", "2", "0"),
    ]
    page = runs.path.with_name("result.html").read_text(encoding="utf-8")
    assert "Latency by throughput" in page
    for clients, line in zip((1, 3), lines, strict=True):
        own = json.loads(runs.path.with_name(f"result-clients-{clients}.json").read_text(encoding="utf-8"))
        assert own["settings"]["clients"] == clients
        assert own["throughput"]["calls_per_second"] == float(line["calls_per_second"]) > 0
        assert runs.path.with_name(f"result-clients-{clients}.html").exists()


def without(package: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs blockdex in a process for which a package is not there."""
    code = f"import sys; sys.modules[{package!r}] = None; from blockdex.cli.main import main; sys.exit(main({words!r}))"
    # A module that is None cannot be imported, nor found.
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("package", "words"),
    [
        (
            "torch",
            "package 'torch' is missing, which checks answers: pip install 'blockdex[server]', or --check-share 0",
        ),
        ("rich", "package 'rich' is missing: pip install 'blockdex[loadtest]'"),
    ],
)
def test_a_package_that_is_missing_is_named(runs: Runs, package: str, words: str) -> None:
    done = without(package, runs.words("churn"))
    assert (done.returncode, done.stderr) == (2, f"blockdex loadtest: {words}\n")


@pytest.mark.slow
def test_without_torch_everything_else_is_done(runs: Runs) -> None:
    done = without("torch", runs.words("churn", check_share=0))
    assert done.returncode == 0, done.stderr
    assert "none checked" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_with_drafts_on_two_processes(runs: Runs, scenario: str) -> None:
    result = runs.run(scenario, status=0, processes=2, duration=5, draft_tokens=3, check_share=0.02, chunk=100)
    assert result["all"]["errors"] == 0
    assert result["checks"]["wrong"] == []


@pytest.mark.slow
def test_a_server_that_dies_is_in_the_result(tmp_path: Path) -> None:
    with serve() as server:
        runs = Runs(server, tmp_path)

        def kill() -> None:
            until(lambda: runs.answered("AppendAndSelect") > 20)
            time.sleep(0.5)
            server.process.kill()

        with meanwhile(kill):
            result = runs.run("decode-fleet", status=1, transport="unary", duration=4, warm_up=0, timeout=2, outage=2)
    assert result["all"]["errors"] > 0
    assert any(outcome.startswith("UNAVAILABLE") for outcome in result["all"]["outcomes"])
    assert result["left_open"] > 0
    assert result["server"]["metrics"] is None
    assert result["outages"]["longest"] > 2
    assert result["set_up_errors"] > 0
    assert "without an answer" in runs.path.with_name("result.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_restart_under_load_reads_honestly(tmp_path: Path) -> None:
    """The drill: the server ends in the middle of the window and another one takes its place."""
    with serve() as server:
        runs = Runs(server, tmp_path)
        address = ("--grpc-address", server.grpc_address, "--http-address", server.http_address)

        def drill(stack: contextlib.ExitStack) -> None:
            until(lambda: runs.answered("Stream/AppendAndSelect") > 20)
            time.sleep(1)
            server.process.kill()
            server.wait()
            stack.enter_context(serve(*SMALL, *address))

        with contextlib.ExitStack() as stack, meanwhile(lambda: drill(stack)):
            result = runs.run("decode-fleet", status=1, duration=20, warm_up=0, outage=0.5, check_share=0.001)
    outages, seconds = result["outages"], result["seconds"]
    (gap,) = outages["gaps"]
    # What the load test says of the hole agrees with what it says of each second.
    silent = [second["second"] for second in seconds if not second["calls"]]
    assert gap["seconds"] - 2 <= len(silent) <= gap["seconds"]
    assert all(gap["start"] - 1 < second < gap["start"] + gap["seconds"] for second in silent)
    assert result["server"]["same_epoch"] is False
    assert seconds[-1]["calls"] + seconds[-2]["calls"] > 0
    for observed in result["server"]["metrics"]["histograms"].values():
        assert min(observed.values()) >= 0
    assert min(result["server"]["metrics"]["counters"].values()) >= 0
    text = runs.path.with_name("result.html").read_text(encoding="utf-8")
    assert "the server started anew" in text


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_many_processes_in_an_open_loop_keep_their_rate(runs: Runs, transport: str) -> None:
    result = runs.run(
        "churn",
        status=0,
        clients=8,
        processes=4,
        rate=60,
        duration=10,
        warm_up=1,
        transport=transport,
        draft_tokens=2,
        ceiling=1,
    )
    assert result["all"]["calls"] + result["unsent"] == pytest.approx(600, rel=0.15)
    assert len(result["cpu_shares"]) == len(result["ceiling"]["cpu_shares"]) == 4
