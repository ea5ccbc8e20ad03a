"""The service benchmark: that it runs, what it tells, and the parts of it that can be checked by themselves."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from benchmarks import service, service_plot, tables
from benchmarks.callers import ECHO, ByteStream, Work, call_for, checked, echo_message, messages
from benchmarks.client import Fleet, percentile, process
from benchmarks.doors import connect, local_ports, owner
from benchmarks.environment import environment
from benchmarks.figures import Figure, cells
from blockdex import Client
from support.serving import Serving

EVERY_PART = {"step", "calls", "clients", "decode", "prefill", "memory", "idle"}


def test_parts_run_and_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--device cpu --rows idle,step --seconds 0.2 --idle-seconds 0.5 --output {tmp_path}"
    service.main(words.split())
    result = json.loads((tmp_path / "service-cpu.json").read_text(encoding="utf-8"))
    assert list(result["parts"]) == ["step", "idle"], "in the order in which they make sense"
    assert {"command", "commit", "date", "machine", "versions", "kernels", "scale"} <= result.keys()
    engine, kernels, idle = result["rows"]
    assert engine["unit"] == kernels["unit"] == "us" and engine["measured"] > 0 and kernels["measured"] > 0
    assert result["parts"]["step"]["engine_us"]["count"] >= 5
    assert 0 <= idle["measured"] < 100
    assert all(row["target"] is None and row["met"] is None for row in result["rows"]), "a CPU has none"
    assert (tmp_path / "service-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "step in the core, 8 sequences at 8,192" in capsys.readouterr().out


def test_refused_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        service.main(["--rows", "step,stride"])
    assert "must be some of" in capsys.readouterr().err
    assert set(service.PARTS) == EVERY_PART


@pytest.mark.parametrize(
    ("measured", "target", "at_least", "met"),
    [(35.0, 35.0, False, True), (35.1, 35.0, False, False), (85.0, 85.0, True, True), (84.9, 85.0, True, False)],
)
def test_a_target_is_met_or_not(measured: float, target: float, at_least: bool, met: bool) -> None:
    figure = Figure("step", measured, "us", target, at_least, "100 steps")
    assert figure.met is met
    assert cells(figure.row())[3] == ("yes" if met else "no")
    without = Figure("step", measured, "us", None, at_least, "100 steps")
    assert without.row()["met"] is None and cells(without.row())[2:4] == ("", "")


def test_a_connection_is_led_to_one_of_those_that_share_a_port() -> None:
    command, ready = (sys.executable, "-m", "benchmarks.echo"), r"^(\d+) (\d+)$"
    with process(*command, "0", ready=ready) as first, process(*command, first[1], ready=ready) as second:
        address, pids = f"127.0.0.1:{first[1]}", [int(first[2]), int(second[2])]
        assert second[1] == first[1] and pids[0] != pids[1]
        for pid in (*pids, *pids):
            before = local_ports(address)
            with connect(address, pid) as channel:
                (port,) = local_ports(address) - before
                assert owner(address, [port], pids) == pid
                assert owner(address, [port], [os.getpid(), *set(pids) - {pid}]) is None
                stream = ByteStream(channel, ECHO)
                assert stream.ask(echo_message(bytes(5000), bytes(300))) == bytes(300)
                stream.close()
        with pytest.raises(ConnectionError, match="accepted none"):
            connect(address, os.getpid(), tries=2)


def test_a_connection_of_this_process_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert local_ports(address) == set()
        with socket.create_connection(listening.getsockname()) as one, listening.accept()[0]:
            assert local_ports(address) == {one.getsockname()[1]}
            assert owner(address, local_ports(address), [os.getpid()]) == os.getpid()


@pytest.mark.parametrize("queries", [1, 100])
def test_what_is_called_for_is_answered(server: Serving, queries: int) -> None:
    work = Work(first_id=77_000 + queries, sequences=1, tokens=1000, queries=queries)
    with Client(server.grpc_address, transport="unary") as client:
        Fleet(client, work.sequences, work.tokens, work.first_id).step(client)
        requests = messages(work, 3 if queries > 1 else 1)
        with connect(server.grpc_address, server.process.pid) as channel:
            stream = ByteStream(channel)
            answer = checked(stream.ask(requests[0]))
            load = call_for(stream, requests, len(answer), 0.3)
            assert load.answers > 0 and load.per_second == pytest.approx(load.answers / 0.3)
            assert 0 < load.p50_ms <= load.p99_ms
            client.close_sequence(work.first_id)
            with pytest.raises(RuntimeError, match="refused: sequence"):
                call_for(stream, requests, len(answer), 0.3)
            stream.close()


def test_a_result_becomes_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Figure("step in the core", 1_034.5, "us", 35.0, False, "p99 50.0").row()]
    result = environment("numpy") | {"rows": rows}
    (tmp_path / "service-h200.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| step in the core | 1,034.50 us | <= 35 us | no | p99 50.0 |\n" in tables.measured()


def test_the_plot_of_all_parts(tmp_path: Path) -> None:
    times = {"p10": 0.5, "p50": 1.0, "p90": 1.5, "p99": percentile([1.0, 2.0], 99), "count": 10}
    result = {
        "machine": {"cpu": "a processor", "cores": 2},
        "commit": "0",
        "parts": {
            "step": {"engine_us": times, "kernels_us": times},
            "calls": dict.fromkeys(("stream", "unary", "echo_stream", "echo_unary"), times) | {"kernel_ms": 0.1},
            "clients": {"calls_per_second": {"served": 80.0, "echo": 100.0}, "waves": {"served": [[{}]]}},
            "decode": {"alone_ms": times, "beside_ms": times},
            "memory": {},
        },
    }
    service_plot.plot(result, tmp_path / "service.png")
    assert (tmp_path / "service.png").read_bytes().startswith(b"\x89PNG")
