"""Every command, port, volume and variable of the deployment files exists in the code."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import typer
import yaml

from apps.cli import app
from apps.common.settings import Settings, known_keys

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
OURS = {name: service for name, service in COMPOSE["services"].items() if service.get("image") == "triscope:cpu"}


def exists(words: list[str]) -> bool:
    """Whether `triscope WORDS...` names a command (options and arguments may follow)."""
    node: Any = typer.main.get_command(app)
    for word in words:
        if not hasattr(node, "commands"):
            return True
        if word not in node.commands:
            return False
        node = node.commands[word]
    return not hasattr(node, "commands")


def test_there_are_services_of_ours() -> None:
    assert set(OURS) == {"worker", "finance-worker", "industrial-worker", "listener", "pages"}


@pytest.mark.parametrize("name", OURS)
def test_commands_exist(name: str) -> None:
    assert exists(OURS[name]["command"])
    assert not exists(["medical", "nonsense"])
    probe = OURS[name]["healthcheck"]["test"]
    if probe[1] == "triscope":
        assert exists(probe[2:])


@pytest.mark.parametrize("name", OURS)
def test_variables_are_settings_and_ports_are_listened_on(name: str) -> None:
    service = OURS[name]
    variables = {k.removeprefix("TRISCOPE_").lower(): v for k, v in service["environment"].items() if k.startswith("TRISCOPE_")}
    assert set(variables) <= set(known_keys())
    listened = {variables.get("ui_port", str(Settings().ui_port)), variables.get("dicom_port", str(Settings().dicom_port))}
    assert ("metrics_port" in variables) == name.endswith("worker"), "the workers, and only they, serve /metrics"
    for port in service.get("ports", []):
        host, _, inside = port.split(":")
        assert host == "127.0.0.1"
        assert inside in listened
        assert inside in re.findall(r"EXPOSE (.*)", DOCKERFILE)[0].split()


def test_addresses_name_services_of_the_file() -> None:
    for service in OURS.values():
        for key in ("TRISCOPE_LOG_URL", "TRISCOPE_DATABASE_URL"):
            host = re.search(r"://(?:[^@/]*@)?([a-z]+):", service["environment"][key])
            assert host is not None
            assert host[1] in COMPOSE["services"]
    peer = COMPOSE["services"]["orthanc"]["environment"]["ORTHANC__DICOM_MODALITIES"]
    assert '"listener"' in peer
    assert str(Settings().dicom_port) in peer
    assert Settings().dicom_ae_title in peer


def test_every_service_has_a_health_check_and_no_root_and_volumes_are_declared() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["healthcheck"]["test"], name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (source.startswith("./deploy/") and (ROOT / source).is_dir()), volume
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.M) == ["triscope", "triscope"]
    assert all(s["volumes"] == ["triscope:/var/lib/triscope"] for s in OURS.values())
    assert "TRISCOPE_HOME=/var/lib/triscope" in DOCKERFILE


def test_prometheus_scrapes_the_workers_where_they_serve() -> None:
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for static in job["static_configs"] for target in static["targets"]}
    served = {f"{name}:{s['environment']['TRISCOPE_METRICS_PORT']}" for name, s in OURS.items() if name.endswith("worker")}
    assert targets == served
    assert all(OURS[name]["environment"]["TRISCOPE_METRICS_ADDRESS"] == "0.0.0.0" for name in ("worker", "finance-worker"))


def names_in(expression: str) -> set[str]:
    """The metrics of ours that an expression reads, without the suffixes of counters and histograms."""
    return {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in re.findall(r"\btriscope_\w+", expression)}


def test_rules_and_dashboards_read_metrics_that_exist() -> None:
    import apps.finance.service
    import apps.industrial.service
    import apps.medical.service  # noqa: F401

    known = {family.name for family in prometheus_client.REGISTRY.collect()}
    rules = [r for g in yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())["groups"] for r in g["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    expressions = [rule["expr"] for rule in rules]
    dashboards = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
    assert [path.stem for path in dashboards] == ["finance", "industrial", "medical"]
    for path in dashboards:
        panels = json.loads(path.read_text())["panels"]
        expressions += [target["expr"] for panel in panels for target in panel["targets"]]
        assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(expressions) > 30
    for expression in expressions:
        assert names_in(expression) or set(re.findall(r"triscope:[\w:]+", expression)) <= recorded or "up{" in expression
        assert names_in(expression) <= known, expression
    assert all(rule["annotations"]["action"] for rule in rules if "alert" in rule)


def test_promtool_accepts_configuration_and_rules(program: Callable[[str], str]) -> None:
    folder = ROOT / "deploy" / "prometheus"
    for kind, name in (("config", "prometheus.yml"), ("rules", "rules.yml")):
        done = subprocess.run([program("promtool"), "check", kind, folder / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_no_secret_stands_in_the_files() -> None:
    for text in ((ROOT / "docker-compose.yml").read_text(), DOCKERFILE):
        assert not re.search(r"(?i)(password|secret|token)[ \t]*[:=][ \t]*['\"]?(?!/run|\$|\[)[a-z0-9]{4,}", text)
    assert set(COMPOSE["secrets"]) == {"postgres_password", "pgpass"}


def test_what_the_dockerfile_copies_and_installs_exists() -> None:
    for line in re.findall(r"^COPY (?!--)(.*)$", DOCKERFILE, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    extras = {extra for found in re.findall(r"\.whl\)\[([a-z0-9,]+)\]", DOCKERFILE) for extra in found.split(",")}
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert extras <= declared
    assert {f"--target {stage}" for stage in ("cpu", "gpu")} <= {f"--target {s}" for s in re.findall(r"AS (\w+)", DOCKERFILE)}
    command = re.findall(r"^CMD \[(.*)\]", DOCKERFILE, re.M)[0].replace('"', "").split(", ")
    assert exists(command)
