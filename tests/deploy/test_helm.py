"""The Helm chart, read by Helm's own library: the manifests of `deploy/kubernetes`, and what its values change."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from support.deployed import DEPLOY, Resource, built, settings_of
from support.programs import REPOSITORY

CHART = DEPLOY / "helm" / "blockdex"
NOT_OF_KUBERNETES = {"monitoring.coreos.com/v1", "cert-manager.io/v1"}
OURS = {"app.kubernetes.io/instance", "app.kubernetes.io/managed-by"}
"""Labels that a release has and a kustomization has not."""


def rendered(release: str = "blockdex", **values: Any) -> dict[str, Resource]:
    """The resources of a release, by kind."""
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name=release, namespace="prod")
    documents = [each for text in files.values() for each in yaml.safe_load_all(text) if each]
    by_kind = _by_kind(documents)
    assert len(by_kind) == len(documents)
    return by_kind


def _by_kind(resources: list[Resource]) -> dict[str, Resource]:
    """Those of cert-manager by their names as well: there are several of a kind."""
    return {
        f"{each['kind']} {each['metadata']['name']}"
        if each["apiVersion"] == "cert-manager.io/v1"
        else each["kind"]: each
        for each in resources
    }


def comparable(value: Any) -> Any:
    """Without a release's own labels, and with variables by name."""
    if isinstance(value, dict):
        return {
            key: {each["name"]: each["value"] for each in inner} if key == "env" else comparable(inner)
            for key, inner in value.items()
            if key not in OURS
        }
    return [comparable(each) for each in value] if isinstance(value, list) else value


def server(resources: dict[str, Resource]) -> Resource:
    (container,) = resources["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    return dict(container)


def test_helm_has_no_complaint_but_for_an_icon() -> None:
    found = helm_python.lint(CHART)
    assert [each["error"] for each in found["messages"]] == ["icon is recommended"]
    assert found["errors"] == []


@pytest.mark.parametrize("folder", ["base", "gpu", "secured"])
def test_a_release_is_what_kustomize_builds(folder: str) -> None:
    values: dict[str, Any] = {part: {"enabled": part == folder} for part in ("gpu", "secured")}
    release = rendered(**values, monitoring={"enabled": True})
    assert comparable(release) == comparable(_by_kind(built(folder)))
    for resource in release.values():
        if resource["apiVersion"] not in NOT_OF_KUBERNETES:
            kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_monitoring_is_there_if_asked_for_and_leads_to_ones_own_documentation() -> None:
    assert rendered().keys() == {"StatefulSet", "Service", "NetworkPolicy", "PodDisruptionBudget"}
    told = json.dumps(rendered(monitoring={"enabled": True, "docsUrl": "https://docs.here/blockdex/"}))
    assert "https://docs.here/blockdex/operations.html#blockdexdown" in told
    assert "blockdex.example" not in told


def test_releases_beside_one_another_do_not_meet() -> None:
    release = rendered("other", monitoring={"enabled": True})
    assert {each["metadata"]["name"] for each in release.values()} == {"other", "other-dashboards"}
    labels = release["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == "other"
    assert release["Service"]["metadata"]["labels"].items() >= labels.items()
    selectors = [
        release["StatefulSet"]["spec"]["selector"]["matchLabels"],
        release["Service"]["spec"]["selector"],
        release["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        release["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        release["ServiceMonitor"]["spec"]["selector"]["matchLabels"],
    ]
    assert selectors == [labels] * 5
    assert release["StatefulSet"]["spec"]["serviceName"] == release["Service"]["metadata"]["name"]


def test_a_secured_release_has_certificates_and_secrets_of_its_own() -> None:
    release = rendered("other", secured={"enabled": True}, gpu={"enabled": True}, monitoring={"enabled": True})
    certificate = release["Certificate other"]["spec"]
    assert certificate["dnsNames"] == ["other", "*.other", "localhost"]
    assert release[f"Issuer {certificate['issuerRef']['name']}"]["spec"]["ca"]["secretName"] == "other-ca"
    secrets = [each["secret"]["secretName"] for each in pod_volumes(release) if "secret" in each]
    assert secrets == [certificate["secretName"], "other-access"] == ["other-tls", "other-access"]
    (endpoint,) = release["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"]["name"] == "other-metrics"
    assert endpoint["tlsConfig"]["serverName"] == "other"
    assert server(release)["readinessProbe"]["exec"]["command"][0] == "blockdex"


def pod_volumes(resources: dict[str, Resource]) -> list[Resource]:
    return list(resources["StatefulSet"]["spec"]["template"]["spec"]["volumes"])


def test_values_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    image = {"repository": "registry.example/blockdex", "tag": "1"}
    limits = {"limits": {"memory": "1Ti"}}
    release = rendered(replicas=3, image=image, resources=limits, settings={"cache_bytes": "64GiB", "max_spans": "512"})
    assert release["StatefulSet"]["spec"]["replicas"] == 3
    assert server(release)["image"] == "registry.example/blockdex:1"
    assert server(release)["resources"] == limits
    settings = settings_of({each["name"]: each["value"] for each in server(release)["env"]}, monkeypatch)
    assert (settings.cache_bytes, settings.max_spans, settings.device) == (64 * 2**30, 512, "cpu")


@pytest.mark.parametrize("values", [{"gpus": 1}, {"replicas": -1}, {"gpu": {"enabled": "yes"}}, {"settings": {"a": 1}}])
def test_values_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmValuesError):
        rendered(**values)


def test_the_chart_has_the_version_of_the_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with helm_python.Chart.load(CHART) as chart:
        assert chart.version == chart.metadata["appVersion"] == project["version"]
