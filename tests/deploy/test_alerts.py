"""Prometheus's and Alertmanager's configuration and the alerts, in the hands of promtool and amtool."""

from __future__ import annotations

from support.deployed import DEPLOY, read_yaml
from support.programs import REPOSITORY, program, run

PROMETHEUS = DEPLOY / "prometheus"
ALERTMANAGER = DEPLOY / "alertmanager" / "alertmanager.yml"
CASES = REPOSITORY / "tests" / "deploy" / "alerts_test.yml"


def promtool(*arguments: object) -> None:
    run(program("promtool", "prometheus"), *map(str, arguments))


def test_configuration_and_rules_are_valid() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "config", "--syntax-only", PROMETHEUS / "prometheus.secured.yml")
    promtool("check", "rules", PROMETHEUS / "alerts.yml")


def test_alertmanager_takes_its_configuration_and_tells_whom_it_should() -> None:
    amtool = program("amtool", "prometheus-alertmanager")
    run(amtool, "check-config", ALERTMANAGER)
    for severity, receiver in (("critical", "wake"), ("warning", "tell")):
        routed = run(amtool, "config", "routes", "test", f"--config.file={ALERTMANAGER}", f"severity={severity}")
        assert routed.strip() == receiver


def test_alerts_fire_when_they_should_and_not_when_they_should_not() -> None:
    promtool("test", "rules", CASES)


def test_every_alert_is_tested_both_ways() -> None:
    (group,) = read_yaml(PROMETHEUS / "alerts.yml")["groups"]
    tested = {
        (check["alertname"], bool(check["exp_alerts"]))
        for case in read_yaml(CASES)["tests"]
        for check in case["alert_rule_test"]
    }
    assert tested == {(rule["alert"], fires) for rule in group["rules"] for fires in (True, False)}
