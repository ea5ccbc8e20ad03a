"""`deploy/kubernetes`: built as kubectl builds it, held against the schemas, and against the images."""

from __future__ import annotations

from collections.abc import Iterator

import kubernetes_validate
import pytest
from cloudcoil.models.cert_manager.v1 import Certificate, Issuer
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor
from pydantic import BaseModel

from blockdex.server.addresses import Address
from blockdex.server.bootstrap import check_exposure
from support.deployed import DEPLOY, Resource, built, image_settings, read_yaml, settings_of
from support.programs import REPOSITORY

SERVERS = ("base", "gpu", "secured")
NOT_OF_KUBERNETES = {"monitoring.coreos.com/v1", "cert-manager.io/v1"}
SIDECARS = ("engine", "vllm")
FOLDERS = (*SERVERS, *SIDECARS)
OLDEST = "1.34"
"""The first Kubernetes with all that these files ask for: resource.k8s.io/v1."""


def one(folder: str, kind: str) -> Resource:
    (resource,) = [resource for resource in built(folder) if resource["kind"] == kind]
    return resource


def pods() -> Iterator[tuple[str, Resource]]:
    """The pod template of every folder."""
    for folder in FOLDERS:
        for resource in built(folder):
            if resource["kind"] in {"StatefulSet", "Job", "Deployment"}:
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
        if resource["apiVersion"] not in NOT_OF_KUBERNETES:
            kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("folder", SERVERS)
@pytest.mark.parametrize("definition", [ServiceMonitor, PrometheusRule])
def test_what_the_operator_reads_keeps_the_schema_of_its_definition(folder: str, definition: type[BaseModel]) -> None:
    assert_known(definition, one(folder, definition.__name__))


def assert_known(definition: type[BaseModel], resource: Resource) -> None:
    """Holds a resource to its definition: what the models do not know they pass over, and do not give back."""
    assert definition.model_validate(resource).model_dump(mode="json", by_alias=True, exclude_unset=True) == resource


def test_a_secured_server_shows_a_certificate_that_is_issued_for_its_names_and_its_probes() -> None:
    issued = [each for each in built("secured") if each["apiVersion"] == "cert-manager.io/v1"]
    definitions: dict[str, type[BaseModel]] = {"Certificate": Certificate, "Issuer": Issuer}
    for resource in issued:
        assert_known(definitions[resource["kind"]], resource)
    by_name = {(each["kind"], each["metadata"]["name"]): each["spec"] for each in issued}
    certificate = by_name["Certificate", "blockdex"]
    authority = by_name["Issuer", certificate["issuerRef"]["name"]]["ca"]["secretName"]
    assert by_name["Certificate", "blockdex-ca"]["secretName"] == authority
    assert by_name["Issuer", by_name["Certificate", "blockdex-ca"]["issuerRef"]["name"]] == {"selfSigned": {}}
    service = one("secured", "Service")
    names = set(certificate["dnsNames"]) | set(certificate["ipAddresses"])
    assert names == {service["metadata"]["name"], f"*.{service['metadata']['name']}", "localhost", "127.0.0.1"}
    assert {port["name"] for port in service["spec"]["ports"]} == {"grpc", "http"}

    ((_, template),) = [pod for pod in pods() if pod[0] == "secured"]
    container = server(template)
    files = {value for name, value in variables(container).items() if value.startswith("/run/secrets/")}
    command, *words = container["readinessProbe"]["exec"]["command"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    secrets = {each["name"]: each["secret"]["secretName"] for each in template["spec"]["volumes"] if "secret" in each}
    assert secrets == {"tls": certificate["secretName"], "access": "blockdex-access"}
    assert files == {f"{mounts['tls']}/tls.crt", f"{mounts['tls']}/tls.key", f"{mounts['access']}/access.toml"}
    assert (command, words[-1]) == ("blockdex", f"{mounts['tls']}/ca.crt")
    (endpoint,) = one("secured", "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["tlsConfig"]["serverName"] in names
    assert endpoint["tlsConfig"]["ca"]["secret"]["name"] == certificate["secretName"]


def test_the_operator_and_grafana_get_the_alerts_and_the_dashboard_of_compose() -> None:
    assert one("base", "PrometheusRule")["spec"] == read_yaml(DEPLOY / "prometheus" / "alerts.yml")
    dashboards = DEPLOY / "grafana" / "dashboards"
    told = {path.name: path.read_text(encoding="utf-8") for path in dashboards.iterdir()}
    assert one("base", "ConfigMap")["data"] == told


def test_the_base_and_the_overlay_have_what_a_server_needs() -> None:
    kinds = {"StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor"}
    kinds |= {"PrometheusRule", "ConfigMap"}
    assert {resource["kind"] for resource in built("base")} == kinds
    assert {resource["kind"] for resource in built("gpu")} == kinds
    assert {resource["kind"] for resource in built("secured")} == kinds | {"Issuer", "Certificate"}
    assert one("base", "Service")["spec"]["clusterIP"] == "None"
    assert one("base", "StatefulSet")["spec"]["serviceName"] == one("base", "Service")["metadata"]["name"]


@pytest.mark.parametrize("folder", SERVERS)
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
    assert http.host == "0.0.0.0"
    probed = container["livenessProbe"]["httpGet"]["port"]
    assert ports[probed] == http.port
    if folder == "secured":
        # HTTP answers nobody but there, and the kubelet's own gRPC probe does not speak TLS.
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": probed, "scheme": "HTTPS"}
        command = container["startupProbe"]["exec"]["command"]
        assert command == container["readinessProbe"]["exec"]["command"]
        assert command[:4] == ["blockdex", "health", "--address", f"127.0.0.1:{grpc.port}"]
        return
    assert container["startupProbe"]["httpGet"] == {"path": "/readyz", "port": probed}
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": probed}
    if folder in SIDECARS:
        assert grpc.host == "127.0.0.1"
        (engine,) = template["spec"]["containers"]
        assert folder == "vllm" or engine["args"] == ["--address", str(grpc)]
        names = [port["name"] for each in containers(template) for port in each.get("ports", [])]
        assert len(set(names)) == len(names)
    else:
        assert grpc.host == "0.0.0.0"
        assert container["readinessProbe"]["grpc"] == {"port": grpc.port}
        assert ports["grpc"] == grpc.port


def test_every_probe_has_the_patience_that_is_told() -> None:
    minutes = 10
    for _, template in pods():
        probe = server(template)["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] == minutes * 60
    assert f"--start-period={minutes * 60}s" in (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    told = (REPOSITORY / "docs" / "deployment.md").read_text(encoding="utf-8")
    assert f"the probes have patience ({minutes} minutes)" in told


def test_every_container_of_ours_is_confined() -> None:
    for _, template in pods():
        assert template["spec"]["automountServiceAccountToken"] is False
        for container in containers(template):
            assert "memory" in container["resources"]["limits"]
            context = template["spec"]["securityContext"] | container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            if container["name"] != "vllm":
                assert context["readOnlyRootFilesystem"] is True
                assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 10001)


def test_every_server_gets_settings_that_it_knows_and_time_to_stop() -> None:
    for folder, template in pods():
        with pytest.MonkeyPatch.context() as monkeypatch:
            settings = settings_of(variables(server(template)), monkeypatch)
        assert settings.device == ("cuda" if folder in {"gpu", *SIDECARS} else "cpu")
        check_exposure(settings)
        assert settings.insecure is (folder != "secured")
        assert template["spec"]["terminationGracePeriodSeconds"] > settings.shutdown_grace_seconds


def test_a_gpu_server_keeps_its_compiled_kernels_between_starts() -> None:
    for folder, template in pods():
        container = server(template)
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        kept = (
            {
                claim["metadata"]["name"]: claim
                for claim in one(folder, "StatefulSet")["spec"].get("volumeClaimTemplates", [])
            }
            if folder in SERVERS
            else {}
        )
        assert set(mounts.values()) <= volumes.keys() | kept.keys()
        assert ("/var/cache/triton" in mounts) == (folder not in {"base", "secured"})
        if folder in SIDECARS:
            claim = volumes[mounts["/var/cache/triton"]]["persistentVolumeClaim"]["claimName"]
            assert claim == one(folder, "PersistentVolumeClaim")["metadata"]["name"]
        elif folder == "gpu":
            assert kept.keys() == {mounts["/var/cache/triton"]}
        assert container["image"] == ("blockdex:cpu" if folder in {"base", "secured"} else "blockdex:server")
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (folder == "gpu")


@pytest.mark.parametrize(("folder", "gpus"), [("engine", 1), ("vllm", 8)])
def test_a_sidecar_and_its_engine_name_one_claim(folder: str, gpus: int) -> None:
    ((_, template),) = [pod for pod in pods() if pod[0] == folder]
    claims = [container["resources"]["claims"] for container in containers(template)]
    assert claims == [[{"name": "gpu"}], [{"name": "gpu"}]]
    (claim,) = template["spec"]["resourceClaims"]
    shared = one(folder, "ResourceClaimTemplate")
    assert claim["resourceClaimTemplateName"] == shared["metadata"]["name"]
    (request,) = shared["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"].get("count", 1) == gpus
    assert server(template)["restartPolicy"] == "Always"
    assert server(template) in template["spec"]["initContainers"]
    sockets = [
        [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "blockdex-sockets"]
        for container in containers(template)
    ]
    assert sockets == [["/run/blockdex"], ["/run/blockdex"]]


def test_the_service_of_vllm_finds_it() -> None:
    pod = one("vllm", "Deployment")["spec"]["template"]
    assert one("vllm", "Service")["spec"]["selector"] == pod["metadata"]["labels"]
