"""`deploy/kubernetes`: built as kubectl builds it, held against the schemas, and against the images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor

from blockdex.server.addresses import Address
from support.deployed import DEPLOY, image_settings, settings_of
from support.programs import program, run

FOLDERS = ("base", "gpu", "sidecar")
OLDEST = "1.34"
"""The first Kubernetes with all that these files ask for: resource.k8s.io/v1."""

Resource = dict[str, Any]


@cache
def kubectl() -> str:
    path = program("kubectl", "kubernetes-client")
    version = json.loads(run(path, "version", "--client", "--output", "json"))["clientVersion"]
    assert int(version["minor"].rstrip("+")) >= 21, (
        f"{path} is {version['gitVersion']}, whose kustomize is too old: 1.21"
    )
    return path


@cache
def built(folder: str) -> list[Resource]:
    """The resources of a folder, overlays applied."""
    return list(yaml.safe_load_all(run(kubectl(), "kustomize", DEPLOY / "kubernetes" / folder)))


def one(folder: str, kind: str) -> Resource:
    (resource,) = [resource for resource in built(folder) if resource["kind"] == kind]
    return resource


def pods() -> Iterator[tuple[str, Resource]]:
    """The pod template of every folder."""
    for folder in FOLDERS:
        for resource in built(folder):
            if resource["kind"] in {"StatefulSet", "Job"}:
                yield folder, resource["spec"]["template"]


def containers(template: Resource) -> list[Resource]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def server(template: Resource) -> Resource:
    (container,) = [each for each in containers(template) if each["name"] == "blockdex"]
    return container


def variables(container: Resource) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_every_resource_keeps_its_schema(folder: str, version: str) -> None:
    for resource in built(folder):
        if resource["kind"] != "ServiceMonitor":
            kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("folder", ["base", "gpu"])
def test_the_service_monitor_keeps_the_schema_of_its_definition(folder: str) -> None:
    monitor = one(folder, "ServiceMonitor")
    # The models pass over a field that they do not know: what does not come back was not known.
    known = ServiceMonitor.model_validate(monitor).model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert known == monitor


def test_the_base_and_the_overlay_have_what_a_server_needs() -> None:
    kinds = {"StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor"}
    assert {resource["kind"] for resource in built("base")} == kinds
    assert {resource["kind"] for resource in built("gpu")} == kinds
    assert one("base", "Service")["spec"]["clusterIP"] == "None"
    assert one("base", "StatefulSet")["spec"]["serviceName"] == one("base", "Service")["metadata"]["name"]


@pytest.mark.parametrize("folder", ["base", "gpu"])
def test_every_selector_finds_the_server(folder: str) -> None:
    stateful_set, service = one(folder, "StatefulSet"), one(folder, "Service")
    labels = stateful_set["spec"]["template"]["metadata"]["labels"]
    selectors = [
        stateful_set["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        one(folder, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(folder, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors)
    monitor = one(folder, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
    # The name of the scrape job, which alerts and dashboard look for.
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "blockdex"


def test_the_network_policy_lets_in_engines_and_monitoring_alone() -> None:
    policy = one("base", "NetworkPolicy")["spec"]
    engines, monitoring = policy["ingress"]
    assert engines["from"] == [{"podSelector": {"matchLabels": {"blockdex-client": "true"}}}]
    assert [port["port"] for port in engines["ports"]] == ["grpc"]
    assert [port["port"] for port in monitoring["ports"]] == ["http"]
    assert policy["egress"] == []
    assert policy["policyTypes"] == ["Ingress", "Egress"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_ports_and_probes_are_where_the_server_listens(folder: str) -> None:
    (template,) = [template for name, template in pods() if name == folder]
    container = server(template)
    addresses = image_settings() | variables(container)
    grpc, http = (Address.parse(addresses[f"BLOCKDEX_{kind}_ADDRESS"]) for kind in ("GRPC", "HTTP"))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == http.port
    assert http.host == "0.0.0.0"
    assert container["startupProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    if folder == "sidecar":
        assert grpc.host == "127.0.0.1"
        (engine,) = template["spec"]["containers"]
        assert engine["args"] == ["--address", str(grpc)]
    else:
        assert grpc.host == "0.0.0.0"
        assert container["readinessProbe"]["grpc"] == {"port": grpc.port}
        assert ports["grpc"] == grpc.port


def test_every_container_is_confined() -> None:
    for _, template in pods():
        assert template["spec"]["automountServiceAccountToken"] is False
        context = template["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == 10001
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]


def test_every_server_gets_settings_that_it_knows_and_time_to_stop() -> None:
    for folder, template in pods():
        with pytest.MonkeyPatch.context() as monkeypatch:
            settings = settings_of(variables(server(template)), monkeypatch)
        assert settings.device == ("cpu" if folder == "base" else "cuda")
        assert template["spec"]["terminationGracePeriodSeconds"] > settings.shutdown_grace_seconds


def test_only_a_gpu_server_has_a_folder_for_compiled_kernels_and_a_gpu() -> None:
    for folder, template in pods():
        container = server(template)
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert set(mounts.values()) <= volumes.keys()
        assert ("/var/cache/triton" in mounts) == (folder != "base")
        assert container["image"] == ("blockdex:cpu" if folder == "base" else "blockdex:server")
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (folder == "gpu")


def test_the_sidecar_and_its_engine_name_one_claim() -> None:
    template = one("sidecar", "Job")["spec"]["template"]
    claims = [container["resources"]["claims"] for container in containers(template)]
    assert claims == [[{"name": "gpu"}], [{"name": "gpu"}]]
    (claim,) = template["spec"]["resourceClaims"]
    assert claim["resourceClaimTemplateName"] == one("sidecar", "ResourceClaimTemplate")["metadata"]["name"]
    assert server(template)["restartPolicy"] == "Always"
    assert server(template) in template["spec"]["initContainers"]
    sockets = [
        [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "sockets"]
        for container in containers(template)
    ]
    assert sockets == [["/run/blockdex"], ["/run/blockdex"]]
