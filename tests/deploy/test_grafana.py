"""The dashboard: what Grafana's own types make of it, and whether its panels are where one sees them."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from support.deployed import DEPLOY, read_yaml

DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "blockdex.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
COLUMNS = 24


def assert_kept(ours: Any, theirs: Any, path: str = "dashboard") -> None:
    """Whether all that we say is there still; what Grafana fills in is its own affair."""
    if isinstance(ours, dict):
        for name, value in ours.items():
            assert name in theirs, f"{path}.{name} is not a field of Grafana's"
            assert_kept(value, theirs[name], f"{path}.{name}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), path
        for place, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_kept(mine, other, f"{path}[{place}]")
    else:
        assert ours == theirs, path


def test_grafana_knows_every_field() -> None:
    register_default_plugins()
    understood = Dashboard.from_json(DASHBOARD)
    assert_kept(DASHBOARD, json.loads(JSONEncoder().encode(understood)))


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = [(panel["title"], panel["gridPos"]) for panel in PANELS]
    for (_, a), (title, b) in combinations(places, 2):
        apart_across = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart_down = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart_across or apart_down, title
    assert all(place["x"] + place["w"] <= COLUMNS for _, place in places)


def test_every_panel_asks_the_chosen_source_and_has_queries_told_apart() -> None:
    (source,) = read_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    chosen = DASHBOARD["templating"]["list"][0]
    assert (chosen["type"], chosen["query"], chosen["current"]["value"]) == (
        "datasource",
        source["type"],
        source["uid"],
    )
    expected = {"type": source["type"], "uid": f"${{{chosen['name']}}}"}
    for panel in PANELS:
        if panel["type"] != "row":
            assert panel["datasource"] == expected
            assert all(target["datasource"] == expected for target in panel["targets"])
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_every_alert_has_a_panel_that_leads_to_its_runbook() -> None:
    (group,) = read_yaml(DEPLOY / "prometheus" / "alerts.yml")["groups"]
    runbooks = {f"Runbook: {rule['alert']}": rule["annotations"]["runbook_url"] for rule in group["rules"]}
    links = {(link["title"], link["url"]) for panel in PANELS for link in panel.get("links", [])}
    assert links == set(runbooks.items())
