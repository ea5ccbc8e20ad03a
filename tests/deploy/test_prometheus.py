"""A real Prometheus with our configuration scrapes a real server, answers every panel and tells a real Alertmanager."""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

import blockdex
from blockdex.frontend.http.gpu_metrics import GAUGES
from support.deployed import DEPLOY, read_yaml
from support.programs import program
from support.serving import SMALL, Serving, serve

CONFIGURATION = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")
(GROUP,) = read_yaml(DEPLOY / "prometheus" / "alerts.yml")["groups"]
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "blockdex.json").read_text(encoding="utf-8"))
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])] + [
    (note["name"], note["expr"]) for note in DASHBOARD["annotations"]["list"]
]
QUIET = {"Lost caches"} | {panel["title"] for panel in DASHBOARD["panels"] if panel["title"].startswith("GPU ")}
"""Queries without an answer: nothing is wrong, and there is no GPU."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


@dataclass
class Prometheus:
    """A Prometheus that runs."""

    address: str

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer; a refused query fails the test with the reason."""
        answer = httpx.get(f"http://{self.address}/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]

    def query(self, expression: str) -> list[Any]:
        """The samples of an expression, now."""
        return list(self.ask("query", query=expression)["result"])

    def answers(self, expression: str) -> bool:
        """Whether an expression has a sample now."""
        return bool(self.query(expression))

    def value(self, expression: str) -> float | None:
        """The one sample of an expression; None without one."""
        samples = self.query(expression)
        assert len(samples) <= 1, samples
        return float(samples[0]["value"][1]) if samples else None

    def alerts(self) -> dict[str, str]:
        """State by alert, of those that are not inactive."""
        return {alert["labels"]["alertname"]: alert["state"] for alert in self.ask("alerts")["alerts"]}


@pytest.fixture(scope="module")
def blockdex_port() -> int:
    return free_port()


@contextlib.contextmanager
def running(folder: Path, address: str, *command: str) -> Iterator[None]:
    """Runs a program of Prometheus's until it is no longer needed; it is ready when this begins."""
    log = folder / f"{Path(command[0]).name}.log"

    def ready() -> bool:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        try:
            return httpx.get(f"http://{address}/-/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    with log.open("wb") as written:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=written, stderr=written)
    try:
        eventually(ready, f"{command[0]} is ready")
        yield
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an Alertmanager that runs on the committed configuration."""
    folder, address = tmp_path_factory.mktemp("alertmanager"), f"127.0.0.1:{free_port()}"
    flags = [f"--config.file={DEPLOY / 'alertmanager' / 'alertmanager.yml'}", f"--storage.path={folder / 'data'}"]
    executable = program("prometheus-alertmanager", "prometheus-alertmanager")
    with running(folder, address, executable, *flags, "--cluster.listen-address="):
        yield address


@pytest.fixture(scope="module")
def prometheus(blockdex_port: int, alertmanager: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Runs on the committed configuration, but for addresses and a shorter scrape interval."""
    folder = tmp_path_factory.mktemp("prometheus")
    address = f"127.0.0.1:{free_port()}"
    targets = {"blockdex": f"127.0.0.1:{blockdex_port}", "prometheus": address}
    jobs = [
        job | {"static_configs": [{"targets": [targets[job["job_name"]]]}]} for job in CONFIGURATION["scrape_configs"]
    ]
    # A scrape may take as long as the interval is: a second, so that a busy machine does not look like a lost server.
    often = {"scrape_interval": "1s", "evaluation_interval": "200ms"}
    told = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    settings = CONFIGURATION | {"global": CONFIGURATION["global"] | often, "scrape_configs": jobs, "alerting": told}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    for name in CONFIGURATION["rule_files"]:
        (folder / name).write_bytes((DEPLOY / "prometheus" / name).read_bytes())
    flags = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with running(folder, address, program("prometheus", "prometheus"), *flags):
        yield Prometheus(address)


@pytest.fixture(scope="module")
def serving(blockdex_port: int) -> Iterator[Serving]:
    with serve(*SMALL, "--http-address", f"127.0.0.1:{blockdex_port}") as server:
        yield server


def work(server: Serving) -> None:
    """Every kind of call, on a stream and without one, a failure among them."""
    random = np.random.default_rng(0)
    for transport in ("unary", "stream"):
        with blockdex.Client(server.grpc_address, transport=transport) as client:
            spec = client.info().spec
            keys = random.standard_normal((300, spec.head_dim), dtype=np.float32)
            queries = random.standard_normal((300, spec.num_index_heads, spec.head_dim), dtype=np.float32)
            client.open_sequence(1)
            client.append_keys(layer=0, sequences=[1], lengths=[300], keys=keys)
            client.select_blocks(layer=0, sequences=[1], lengths=[300], queries=queries)
            client.append_and_select(layer=0, sequences=[1], lengths=[1], keys=keys[:1], queries=queries[:1])
            client.fork_sequence(1, 2, 256)
            with pytest.raises(blockdex.NotFoundError):
                client.get_sequence(404)
            client.close_sequence(1)
            client.close_sequence(2)


@pytest.fixture(scope="module")
def scraped(prometheus: Prometheus, serving: Serving) -> Prometheus:
    """Prometheus, once it has seen the server before, while and after it worked."""

    def scrapes_with(expression: str) -> Callable[[], bool]:
        return lambda: (prometheus.value(expression) or 0) >= 2

    seen = 'count_over_time(blockdex_ready{job="blockdex"}[1m])'
    eventually(scrapes_with(seen), "the server is scraped")
    work(serving)
    # A rate takes two scrapes, and the series of an error begins with the error.
    worked = ('rpc="Stream/AppendAndSelect"', 'code="NOT_FOUND"')
    for labels in worked:
        rate = f"sum(rate(blockdex_requests_total{{{labels}}}[1m]))"
        eventually(partial(prometheus.answers, rate), f"{rate} is scraped")
    return prometheus


@pytest.mark.parametrize(("title", "expression"), QUERIES, ids=[f"{n}-{title}" for n, (title, _) in enumerate(QUERIES)])
def test_every_query_of_the_dashboard_is_answered(scraped: Prometheus, title: str, expression: str) -> None:
    # What Grafana fills in: all servers, and an interval of at least four scrapes.
    filled = expression.replace("$instance", ".*").replace("$__rate_interval", "1m")
    assert "$" not in filled

    def answered() -> bool:
        # NaN is what a quantile of nothing comes to.
        return any(not math.isnan(float(sample["value"][1])) for sample in scraped.query(filled))

    if title in QUIET:
        assert not answered()
    else:
        # A scrape that a busy machine is late for leaves nothing for a second.
        eventually(answered, title)


def test_dashboard_and_alerts_name_metrics_that_are_there(scraped: Prometheus) -> None:
    there = set(scraped.ask("label/__name__/values")) | {gauge.name for gauge in GAUGES}
    expressions = [expression for _, expression in QUERIES] + [rule["expr"] for rule in GROUP["rules"]]
    named = {name for text in expressions for name in re.findall(r"\b(?:blockdex|process)_\w+|\bup\b", text)}
    assert named - there == set()


def test_the_dashboard_finds_its_servers(scraped: Prometheus, blockdex_port: int) -> None:
    (variable,) = [each for each in DASHBOARD["templating"]["list"] if each["name"] == "instance"]
    (selector,) = re.findall(r"label_values\((.*), instance\)", variable["query"]["query"])
    assert [series["instance"] for series in scraped.ask("series", **{"match[]": selector})] == [
        f"127.0.0.1:{blockdex_port}"
    ]


def test_every_alert_is_evaluated_and_quiet_while_all_is_well(scraped: Prometheus) -> None:
    expected = {rule["alert"]: ("ok", "inactive", None) for rule in GROUP["rules"]}

    def found() -> dict[str, Any]:
        rules = scraped.ask("rules")["groups"][0]["rules"]
        return {rule["name"]: (rule["health"], rule["state"], rule.get("lastError")) for rule in rules}

    eventually(lambda: found() == expected, f"{found()} becomes {expected}")


def test_the_epoch_is_that_of_the_cache(scraped: Prometheus, serving: Serving) -> None:
    assert scraped.value("blockdex_epoch") == int(serving.event("serving")["epoch"]) >> 11


def test_a_server_that_is_lost_and_comes_back_empty_raises_alerts(
    scraped: Prometheus, serving: Serving, blockdex_port: int, alertmanager: str
) -> None:
    """The last of this file: it takes the server away."""

    def told() -> dict[str, str]:
        alerts = httpx.get(f"http://{alertmanager}/api/v2/alerts").json()
        return {each["labels"]["alertname"]: each["annotations"]["runbook_url"] for each in alerts}

    serving.stop()
    eventually(lambda: scraped.alerts() == {"BlockdexDown": "pending"}, "the loss is noticed")
    with serve(*SMALL, "--http-address", f"127.0.0.1:{blockdex_port}"):
        eventually(lambda: scraped.alerts() == {"BlockdexEngineRestarted": "firing"}, "the restart is noticed")
        (runbook,) = [
            rule["annotations"]["runbook_url"] for rule in GROUP["rules"] if rule["alert"] == "BlockdexEngineRestarted"
        ]
        eventually(lambda: told() == {"BlockdexEngineRestarted": runbook}, "Alertmanager hears of it")
