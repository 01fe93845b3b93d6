"""Real services for tests: each started on loopback in its own folder, and stopped at the end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path

from moto.server import ThreadedMotoServer


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class KafkaBroker:
    """One KRaft node from an unpacked Apache Kafka distribution. With `users` (passwords by name) clients come through SASL (PLAIN or
    SCRAM-SHA-512) over TLS, and `folder / "ca.pem"` says who signed its certificate; at `with_certificate` it takes clients with one of the
    same authority, as `client.pem` and `client.key`."""

    def __init__(self, home: Path, folder: Path, users: Mapping[str, str] | None = None) -> None:
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
        if users is not None:
            self.with_certificate = f"127.0.0.1:{free_port()}"
            own |= _secured(folder, own["listeners"], self.with_certificate, users)
        kept = [line for line in lines if line.split("=")[0].strip() not in own]
        self._scram = [
            part for name, password in (users or {}).items() for part in ("--add-scram", f"SCRAM-SHA-512=[name={name},password={password}]")
        ]
        self._config = folder / "server.properties"
        self._config.write_text("\n".join([*kept, *(f"{k}={v}" for k, v in own.items())]) + "\n")

    def __enter__(self) -> KafkaBroker:
        storage = self._home / "bin" / "kafka-storage.sh"
        command = [storage, "format", "--standalone", "-t", str(uuid.uuid4()), "-c", self._config, *self._scram]
        subprocess.run(command, check=True, capture_output=True, env=self._environment())
        self.start()
        return self

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "KAFKA_HEAP_OPTS": "-Xmx512m", "LOG_DIR": str(self._folder / "logs")}

    def start(self) -> None:
        """Start the formatted node, also after `kill`."""
        log = self._folder / "broker.log"
        with log.open("w") as stream:
            command = [self._home / "bin" / "kafka-server-start.sh", self._config]
            self._process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=self._environment(), start_new_session=True
            )
        deadline = time.monotonic() + 90
        while "Kafka Server started" not in log.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(log.read_text()[-2000:])
            time.sleep(0.2)

    def kill(self) -> None:
        """End it at once, as a power failure does."""
        self._process.kill()
        self._process.wait()

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()


class ObjectStore:
    """Moto's S3 with a bucket `triscope`; what was stored outlives `stop`. `environment` is what its clients need."""

    def __init__(self) -> None:
        self._port = free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "triscope",
            "AWS_SECRET_ACCESS_KEY": "triscope",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it, also after `stop`."""
        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        """End it."""
        self._server.stop()

    def __enter__(self) -> ObjectStore:
        self.start()
        request = urllib.request.Request(f"{self.address}/triscope", method="PUT")
        with urllib.request.urlopen(request, timeout=30):
            return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _secured(folder: Path, listeners: str, with_certificate: str, users: Mapping[str, str]) -> dict[str, str]:
    """Settings of a broker that takes `users` over TLS, with a certificate of an authority of its own in `folder`."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)

    new = ("-newkey", "rsa:2048", "-nodes")
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=authority of a test")
    openssl("req", *new, "-keyout", "broker.key", "-out", "broker.csr", "-subj", "/CN=broker")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
    openssl("x509", "-req", "-in", "broker.csr", *signed, "-out", "broker.pem")
    openssl("req", *new, "-keyout", "client.key", "-out", "client.csr", "-subj", "/CN=bank")
    openssl("x509", "-req", "-in", "client.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2", "-out", "client.pem")
    (folder / "store.pem").write_text((folder / "broker.key").read_text() + (folder / "broker.pem").read_text())
    modules, known = "org.apache.kafka.common.security", {"broker": "between brokers", **users}
    accounts = " ".join(f'user_{name}="{password}"' for name, password in known.items())
    named = f"{listeners.replace('PLAINTEXT://', 'CLIENTS://')},CERTIFICATES://{with_certificate}"
    return {
        "listeners": named,
        "advertised.listeners": named,
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,CLIENTS:SASL_SSL,CERTIFICATES:SSL",
        "listener.name.certificates.ssl.client.auth": "required",
        "inter.broker.listener.name": "CLIENTS",
        "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "listener.name.clients.plain.sasl.jaas.config": (
            f'{modules}.plain.PlainLoginModule required username="broker" password="{known["broker"]}" {accounts};'
        ),
        "listener.name.clients.scram-sha-512.sasl.jaas.config": f"{modules}.scram.ScramLoginModule required;",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(folder / "store.pem"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(folder / "ca.pem"),
    }


class Postgres:
    """A PostgreSQL server in a folder; root runs it as the user `postgres`."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._port = free_port()
        self.url = f"postgresql+psycopg://triscope@127.0.0.1:{self._port}/postgres"
        folder.mkdir()
        prefix: list[str] = []
        if os.geteuid() == 0:
            for parent in [folder, *folder.parents][:4]:
                parent.chmod(0o755)
            shutil.chown(folder, "postgres")
            prefix = ["runuser", "-u", "postgres", "--"]
        data, place = folder / "data", ["-p", str(self._port), "-k", folder, "-c", "listen_addresses=127.0.0.1"]
        subprocess.run([*prefix, binaries / "initdb", "-D", data, "-U", "triscope", "-A", "trust"], check=True, capture_output=True)
        self._control = [*prefix, binaries / "pg_ctl", "-D", data]
        self._start = [*self._control, "start", "-w", "-l", folder / "log", "-o", " ".join(map(str, place))]

    def start(self) -> None:
        """Start it; returns when it takes connections."""
        subprocess.run(self._start, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        """End it, and every connection, at once."""
        subprocess.run([*self._control, "stop", "-m", "immediate"], check=True, capture_output=True)

    def __enter__(self) -> Postgres:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


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
