"""`deploy/compose.yaml`: valid, no more privileged than it must be, and in agreement with the files that it names."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from blockdex.loadtest.arguments import parse
from blockdex.server.addresses import Address
from blockdex.server.bootstrap import check_exposure
from support.credentials import OPERATOR, Papers
from support.deployed import DEPLOY, image_settings, read_yaml, services, settings_of
from support.programs import BIN, REPOSITORY, run

COMPOSE = DEPLOY / "compose.yaml"
GPU, MPS, SECURED = (DEPLOY / f"compose.{name}.yaml" for name in ("gpu", "mps", "secured"))
SERVICES = services()
SERVERS = {"cpu": SERVICES["blockdex"], "cuda": services(GPU.name)["blockdex"]}
GUARDED = services(SECURED.name)
SHARED = services(GPU.name, MPS.name)
VOLUMES = {name for path in (COMPOSE, GPU, MPS) for name in read_yaml(path)["volumes"]}
OURS = {name for name, service in SERVICES.items() if "build" in service}
EVERY = SERVICES | {"blockdex on a GPU": SERVERS["cuda"], "blockdex with MPS": SHARED["blockdex"], "mps": SHARED["mps"]}


def with_defaults(value: str) -> str:
    """A value as compose reads it where no variable is set."""
    return re.sub(r"\$\{\w+:-(.*?)\}", r"\1", value)


def test_it_keeps_the_compose_specification() -> None:
    run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE, GPU, MPS, SECURED)


OVERRIDES = {"cpu": (), "gpu": (GPU.name,), "mps": (GPU.name, MPS.name), "secured": (SECURED.name,)}


@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
def test_the_linter_finds_no_privilege(overrides: tuple[str, ...], tmp_path: Path) -> None:
    merged = tmp_path / "compose.yaml"
    merged.write_text(yaml.safe_dump(read_yaml(COMPOSE) | {"services": services(*overrides)}), encoding="utf-8")
    done = subprocess.run(
        [BIN / "compose-lint", "check", "--format", "json", merged], capture_output=True, text=True, check=False
    )
    findings = {(each["rule_id"], each["service"]) for each in json.loads(done.stdout)["findings"]}
    # Our images have no digest before they are built, and take the cores that there are.
    unpinned = {("CL-0019", name) for name, service in services(*overrides).items() if "sha256" not in service["image"]}
    assert findings == unpinned | {("CL-0026", name) for name in OURS}


def test_what_runs_without_a_profile_is_a_server_and_its_dashboards() -> None:
    plain = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert plain == {"blockdex", "prometheus", "alertmanager", "grafana"}


@pytest.mark.parametrize("name", EVERY)
def test_a_service_is_confined(name: str) -> None:
    service = EVERY[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service["user"].startswith(("0:", "root"))
    limits = service["deploy"]["resources"]["limits"]
    assert limits.keys() >= {"memory", "pids"}
    # Docker refuses a container more than the host has.
    assert float(limits.get("cpus", 0)) <= 1
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", EVERY)
def test_what_a_service_names_is_there(name: str) -> None:
    service = EVERY[name]
    targets = re.findall(r"^FROM \S+ AS (\S+)$", (REPOSITORY / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    if "build" in service:
        assert (COMPOSE.parent / service["build"]["context"]).resolve() == REPOSITORY
        assert service["image"] == f"blockdex:{service['build']['target']}"
        assert service["build"]["target"] in targets
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert (COMPOSE.parent / source).is_dir() if source.startswith(".") else source in VOLUMES
    assert set(service.get("networks", [])) <= read_yaml(COMPOSE)["networks"].keys()
    assert set(service.get("depends_on", [])) <= SHARED.keys()


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_gets_settings_that_it_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {key: with_defaults(value) for key, value in SERVERS[name]["environment"].items()}
    settings = settings_of(environment, monkeypatch)
    assert settings.device == name
    assert settings.log_format == "json"
    assert settings.insecure, "it is published on the loopback alone"
    ports = {Address.parse(value).port for value in image_settings().values()}
    assert {int(port.rsplit(":", 1)[1]) for port in SERVERS[name]["ports"]} == ports


def test_a_gpu_and_a_place_for_its_kernels_are_asked_for_by_the_second_file_alone() -> None:
    (gpu,) = SERVERS["cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "reservations" not in SERVERS["cpu"]["deploy"]["resources"]
    kept = "triton:/var/cache/triton"
    assert (kept in SERVERS["cuda"]["volumes"], kept in SERVERS["cpu"]["volumes"]) == (True, False)


def test_a_server_under_mps_meets_its_daemon() -> None:
    daemon, server = SHARED["mps"], SHARED["blockdex"]
    assert (daemon["ipc"], server["ipc"]) == ("shareable", "service:mps")
    # MPS serves one user, through one folder, on one GPU.
    assert server["user"] == daemon["user"]
    assert server["environment"].items() >= daemon["environment"].items()
    assert f"mps:{daemon['environment']['CUDA_MPS_PIPE_DIRECTORY']}" in set(server["volumes"]) & set(daemon["volumes"])
    assert server["deploy"]["resources"]["reservations"] == daemon["deploy"]["resources"]["reservations"]


def test_a_secured_server_and_those_who_call_it_show_what_is_in_one_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = settings_of(
        {key: with_defaults(value) for key, value in GUARDED["blockdex"]["environment"].items()}, monkeypatch
    )
    check_exposure(settings)
    assert not settings.insecure
    place = "/run/secrets/blockdex"
    named = {settings.access_file, settings.tls_cert, settings.tls_key, settings.http_tls_cert, settings.http_tls_key}
    assert named == {Path(place, name) for name in ("access.toml", "tls.crt", "tls.key")}
    callers = {name: GUARDED[name]["command"] for name in ("loadtest", "engine", "prometheus")}
    for service in ("blockdex", *callers):
        assert f"${{BLOCKDEX_SECRETS:-./secrets}}:{place}:ro" in GUARDED[service]["volumes"]
    for service in ("loadtest", "engine"):
        assert {f"--tls-ca={place}/ca.crt", f"--token-file={place}/token"} <= set(callers[service])
    papers = Papers(tmp_path)
    (tmp_path / "ca.crt").write_bytes((tmp_path / "ca.pem").read_bytes())
    (tmp_path / "token").write_text(OPERATOR, encoding="utf-8")
    folders = {place: str(papers.folder), "/reports/": f"{tmp_path}/"}
    words = [_placed(word, folders) for word in callers["loadtest"][1:]]
    target = parse(words).target
    assert (target.endpoint.token, target.http_address) == (OPERATOR, "https://blockdex:9051")
    plain, secured = (read_yaml(DEPLOY / "prometheus" / f"prometheus{kind}.yml") for kind in ("", ".secured"))
    assert "--config.file=/etc/prometheus/prometheus.secured.yml" in callers["prometheus"]
    assert secured["scrape_configs"][0] == plain["scrape_configs"][0] | {
        "scheme": "https",
        "tls_config": {"ca_file": f"{place}/ca.crt"},
        "authorization": {"credentials_file": f"{place}/token"},
    }
    assert secured | {"scrape_configs": plain["scrape_configs"]} == plain


def _placed(word: str, folders: dict[str, str]) -> str:
    for there, here in folders.items():
        word = word.replace(there, here)
    return word


def test_the_load_test_understands_its_arguments(tmp_path: Path) -> None:
    command, *words = SERVICES["loadtest"]["command"]
    assert command == "loadtest"
    arguments = parse([word.replace("/reports/", f"{tmp_path}/") for word in words])
    http = Address.parse(image_settings()["BLOCKDEX_HTTP_ADDRESS"]).port
    assert (arguments.target.endpoint.address, arguments.target.http_address) == ("blockdex:50051", f"blockdex:{http}")
    assert f"reports:{Path(words[-1].removeprefix('--output=')).parent}" in SERVICES["loadtest"]["volumes"]


def test_prometheus_alertmanager_and_grafana_find_one_another_and_the_server() -> None:
    configuration = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")
    jobs = configuration["scrape_configs"]
    (target,) = next(job["static_configs"][0]["targets"] for job in jobs if job["job_name"] == "blockdex")
    assert target == f"blockdex:{Address.parse(image_settings()['BLOCKDEX_HTTP_ADDRESS']).port}"
    (told,) = configuration["alerting"]["alertmanagers"]
    assert told["static_configs"] == [{"targets": ["alertmanager:9093"]}]
    assert SERVICES["alertmanager"]["ports"] == ["127.0.0.1:9093:9093"]
    (source,) = read_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = read_yaml(DEPLOY / "grafana/provisioning/dashboards/blockdex.yaml")["providers"]
    folder = provider["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in SERVICES["grafana"]["volumes"]
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/blockdex.json"
    assert (DEPLOY / "grafana" / "dashboards" / "blockdex.json").exists()
