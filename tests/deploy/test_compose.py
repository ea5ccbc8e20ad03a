"""`deploy/compose.yaml`: valid, no more privileged than it must be, and in agreement with the files that it names."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blockdex.loadtest.arguments import parse
from blockdex.server.addresses import Address
from support.deployed import DEPLOY, image_settings, read_yaml, settings_of
from support.programs import BIN, REPOSITORY, run

COMPOSE = DEPLOY / "compose.yaml"
FILE = read_yaml(COMPOSE)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
SERVERS = ("server", "server-cpu")


def with_defaults(value: str) -> str:
    """A value as compose reads it where no variable is set."""
    return re.sub(r"\$\{\w+:-(.*?)\}", r"\1", value)


def test_it_keeps_the_compose_specification() -> None:
    run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_the_linter_finds_no_privilege_but_the_one_that_triton_needs() -> None:
    done = subprocess.run(
        [BIN / "compose-lint", "check", "--format", "json", COMPOSE], capture_output=True, text=True, check=False
    )
    findings = {(each["rule_id"], each["service"]) for each in json.loads(done.stdout)["findings"]}
    # Our images have no digest before they are built, and whoever deploys pins the others' to what their registry has.
    unpinned = {("CL-0019", name) for name in SERVICES}
    assert findings == unpinned | {("CL-0022", "server")}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service["user"].startswith(("0:", "root"))
    assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_names_is_there(name: str) -> None:
    service = SERVICES[name]
    targets = re.findall(r"^FROM \S+ AS (\S+)$", (REPOSITORY / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    if "build" in service:
        assert (COMPOSE.parent / service["build"]["context"]).resolve() == REPOSITORY
        assert service["image"] == f"blockdex:{service['build']['target']}"
        assert service["build"]["target"] in targets
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert (COMPOSE.parent / source).is_dir() if source.startswith(".") else source in FILE["volumes"]
    assert set(service["networks"]) <= FILE["networks"].keys()
    assert set(service.get("depends_on", [])) <= SERVICES.keys()


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_gets_settings_that_it_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {key: with_defaults(value) for key, value in SERVICES[name]["environment"].items()}
    settings = settings_of(environment, monkeypatch)
    assert settings.device == ("cpu" if name == "server-cpu" else "cuda")
    assert settings.log_format == "json"
    ports = {Address.parse(value).port for value in image_settings().values()}
    assert {int(port.rsplit(":", 1)[1]) for port in SERVICES[name]["ports"]} == ports


def test_one_profile_starts_one_server_under_one_name() -> None:
    assert [SERVICES[name]["profiles"] for name in SERVERS] == [["gpu"], ["cpu"]]
    for name in SERVERS:
        assert SERVICES[name]["networks"]["blockdex"]["aliases"] == ["blockdex"]
    (gpu,) = SERVICES["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "reservations" not in SERVICES["server-cpu"]["deploy"]["resources"]


def test_the_load_test_understands_its_arguments(tmp_path: Path) -> None:
    command, *words = SERVICES["loadtest"]["command"]
    assert command == "loadtest"
    arguments = parse([word.replace("/reports/", f"{tmp_path}/") for word in words])
    http = Address.parse(image_settings()["BLOCKDEX_HTTP_ADDRESS"]).port
    assert (arguments.target.address, arguments.target.http_address) == ("blockdex:50051", f"blockdex:{http}")
    assert f"reports:{Path(words[-1].removeprefix('--output=')).parent}" in SERVICES["loadtest"]["volumes"]


def test_prometheus_and_grafana_find_one_another_and_the_server() -> None:
    scraped = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]
    (target,) = next(job["static_configs"][0]["targets"] for job in scraped if job["job_name"] == "blockdex")
    assert target == f"blockdex:{Address.parse(image_settings()['BLOCKDEX_HTTP_ADDRESS']).port}"
    (source,) = read_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = read_yaml(DEPLOY / "grafana/provisioning/dashboards/blockdex.yaml")["providers"]
    folder = provider["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in SERVICES["grafana"]["volumes"]
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/blockdex.json"
    assert (DEPLOY / "grafana" / "dashboards" / "blockdex.json").exists()
