"""`triscope doctor`: the machine, the backends, the services at the configured addresses."""

from __future__ import annotations

import shutil
import socket
from typing import Any
from urllib.parse import urlsplit

import msgspec
from rich.console import Console
from rich.table import Table

from apps.common.settings import Loaded, Settings, known_keys, masked
from shared_runtime.backends.base import backends
from shared_runtime.host import host

TIMEOUT_SECONDS = 2.0


def settings_rows(loaded: Loaded) -> list[dict[str, str]]:
    """Each setting with its value (secrets masked) and where it came from."""
    return [
        {"name": key, "value": masked(key, getattr(loaded.settings, key)), "origin": loaded.origin.get(key, "default")}
        for key in known_keys()
    ]


def examine(settings: Settings) -> dict[str, Any]:
    """Facts about this machine as plain data."""
    engines = []
    for name, backend in backends().items():
        for device in backend.devices:
            state = backend.availability(device)
            engines.append({"backend": name, "device": device, "version": state.version, "lacks": state.lacks})
    services = [
        _service("log", settings.log_url, {"kafka": 9092}),
        _service("database", settings.database_url, {"postgresql+psycopg": 5432, "postgresql": 5432}),
        _service("blobs", settings.blob_url, {}),
    ]
    free = shutil.disk_usage(_existing(settings)).free
    return {
        "host": msgspec.to_builtins(host()) | {"fingerprint": host().fingerprint},
        "backends": engines,
        "services": services,
        "home": {"path": settings.home, "free_gib": round(free / 2**30, 1)},
    }


def _existing(settings: Settings) -> str:
    path = settings.home_path
    while not path.exists():
        path = path.parent
    return str(path)


def _service(kind: str, url: str, ports: dict[str, int]) -> dict[str, Any]:
    """Whether something listens at `url`; files need no one to."""
    parts = urlsplit(url)
    shown = masked(kind, url)
    if parts.scheme not in ports:
        return {"service": kind, "address": shown, "reachable": None, "detail": "a local file or folder" if parts.path else parts.scheme}
    for address in parts.netloc.rpartition("@")[2].split(","):
        name, _, port = address.rpartition(":") if ":" in address else (address, "", "")
        try:
            with socket.create_connection((name, int(port or ports[parts.scheme])), TIMEOUT_SECONDS):
                continue
        except (OSError, ValueError) as error:
            return {"service": kind, "address": shown, "reachable": False, "detail": f"{address}: {error}"}
    return {"service": kind, "address": shown, "reachable": True, "detail": "answers"}


def show(findings: dict[str, Any], console: Console) -> None:
    """Print the findings as tables."""
    facts = findings["host"]
    table = Table("host", "")
    for key in ("cpu", "cores", "memory_gib", "vector", "gpus", "system", "python", "fingerprint"):
        value = facts[key]
        table.add_row(key, ", ".join(str(v) for v in value) or "none" if isinstance(value, (list, tuple)) else str(value))
    table.add_row("home", f"{findings['home']['path']} ({findings['home']['free_gib']} GiB free)")
    console.print(table)
    table = Table("backend", "device", "state")
    for row in findings["backends"]:
        table.add_row(row["backend"], row["device"], f"version {row['version']}" if row["lacks"] is None else f"lacks {row['lacks']}")
    console.print(table)
    table = Table("service", "address", "state")
    for row in findings["services"]:
        state = {True: "reachable", False: f"NOT reachable: {row['detail']}", None: row["detail"]}[row["reachable"]]
        table.add_row(row["service"], row["address"], state)
    console.print(table)
