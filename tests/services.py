"""Real services for tests: each started on loopback in its own folder, and stopped at the end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class KafkaBroker:
    """One KRaft node from an unpacked Apache Kafka distribution."""

    def __init__(self, home: Path, folder: Path) -> None:
        self._home, self._folder = home, folder
        broker, controller = free_port(), free_port()
        self.address = f"127.0.0.1:{broker}"
        lines = (home / "config" / "server.properties").read_text().splitlines()
        own = {
            "listeners": f"PLAINTEXT://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}",
            "controller.quorum.bootstrap.servers": f"127.0.0.1:{controller}",
            "log.dirs": str(folder / "data"),
            "group.initial.rebalance.delay.ms": "0",
            "offsets.topic.num.partitions": "4",
        }
        kept = [line for line in lines if line.split("=")[0].strip() not in own]
        self._config = folder / "server.properties"
        self._config.write_text("\n".join([*kept, *(f"{k}={v}" for k, v in own.items())]) + "\n")

    def __enter__(self) -> KafkaBroker:
        environment = {**os.environ, "KAFKA_HEAP_OPTS": "-Xmx512m", "LOG_DIR": str(self._folder / "logs")}
        storage = self._home / "bin" / "kafka-storage.sh"
        identity = str(uuid.uuid4())
        command = [storage, "format", "--standalone", "-t", identity, "-c", self._config]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        self._log = (self._folder / "broker.log").open("w")
        start = [self._home / "bin" / "kafka-server-start.sh", self._config]
        self._process = subprocess.Popen(start, stdout=self._log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        deadline = time.monotonic() + 90
        while "Kafka Server started" not in (self._folder / "broker.log").read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((self._folder / "broker.log").read_text()[-2000:])
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Orthanc:
    """A real PACS: `http` is its REST address, `dicom_port` its DICOM port, `aet` its title."""

    aet = "CIPACS"

    def __init__(self, binary: str, folder: Path, peer_port: int) -> None:
        self.http_port, self.dicom_port = free_port(), free_port()
        self.http = f"http://127.0.0.1:{self.http_port}"
        self._binary, self._config = binary, folder / "orthanc.json"
        peer = {"AET": "TRISCOPE", "Host": "127.0.0.1", "Port": peer_port, "AllowEcho": True, "AllowStore": True}
        plugin = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
        self._config.write_text(
            json.dumps(
                {
                    "Name": "CI",
                    "StorageDirectory": str(folder / "storage"),
                    "IndexDirectory": str(folder / "storage"),
                    "Plugins": [str(plugin)] if plugin.exists() else [],
                    "HttpPort": self.http_port,
                    "RemoteAccessAllowed": False,
                    "AuthenticationEnabled": False,
                    "DicomAet": self.aet,
                    "DicomPort": self.dicom_port,
                    "DicomAlwaysAllowStore": True,
                    "DicomCheckCalledAet": False,
                    "DicomModalities": {"triscope": peer},
                    "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": True, "WadoRoot": "/wado", "Ssl": False},
                }
            )
        )

    def __enter__(self) -> Orthanc:
        environment = {**os.environ, "TCP_NODELAY": "1"}
        self._process = subprocess.Popen(
            [self._binary, self._config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                self.get("/system")
                return self
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)

    def get(self, path: str) -> bytes:
        """GET of the REST interface."""
        with urllib.request.urlopen(self.http + path, timeout=60) as answer:
            content: bytes = answer.read()
            return content

    def post(self, path: str, content: bytes) -> dict[str, object]:
        """POST to the REST interface; the JSON answer."""
        with urllib.request.urlopen(urllib.request.Request(self.http + path, data=content, method="POST"), timeout=120) as answer:
            result: dict[str, object] = json.loads(answer.read())
            return result
