"""Every command, port, volume and variable of the deployment files exists in the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

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
            assert volume.split(":")[0] in COMPOSE["volumes"], volume
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.M) == ["triscope", "triscope"]
    assert all(s["volumes"] == ["triscope:/var/lib/triscope"] for s in OURS.values())
    assert "TRISCOPE_HOME=/var/lib/triscope" in DOCKERFILE


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
