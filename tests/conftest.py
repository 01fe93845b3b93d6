"""Fixtures that all tests share. Nothing here writes outside of pytest's temporary folders."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apps.common.settings import Settings, load_settings
from tests.services import KafkaBroker, Postgres

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # torch.compile starts no workers that outlive a test
REQUIRED = os.environ.get("REQUIRE_SERVICES") == "1"
"""CI sets it: a test of a real service then fails where the service is missing, instead of skipping."""


def absent(reason: str) -> None:
    """Skip loudly, or fail where the services were promised."""
    if REQUIRED:
        pytest.fail(f"{reason}; REQUIRE_SERVICES=1 promises it")
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each test has its own TRISCOPE_HOME; plans are shared, since measuring them again proves nothing."""
    for name in list(os.environ):
        if name.startswith("TRISCOPE_"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    plans = tmp_path_factory.getbasetemp() / "plans"
    plans.mkdir(exist_ok=True)
    (home / "plans").symlink_to(plans)
    monkeypatch.setenv("TRISCOPE_HOME", str(home))


@pytest.fixture
def settings() -> Settings:
    """The settings of this test's home."""
    return load_settings().settings


DATA_DIR = os.environ.get("TRISCOPE_DATA_DIR")


@pytest.fixture
def data_dir() -> Path:
    """The real data sets."""
    if not DATA_DIR:
        absent("TRISCOPE_DATA_DIR is not set: the real data sets are not here")
    return Path(str(DATA_DIR))


@pytest.fixture
def program() -> Callable[[str], str]:
    """Finds an installed program, or skips."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            absent(f"{name} is not installed")
        return str(path)

    return find


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Apache Kafka broker: KAFKA_BOOTSTRAP, or one started from KAFKA_HOME."""
    if address := os.environ.get("KAFKA_BOOTSTRAP"):
        yield address
        return
    home = os.environ.get("KAFKA_HOME")
    if not home:
        absent("neither KAFKA_HOME nor KAFKA_BOOTSTRAP is set: no real Kafka")
    with KafkaBroker(Path(str(home)), tmp_path_factory.mktemp("kafka")) as broker:
        yield broker.address


@pytest.fixture
def postgres_server(tmp_path: Path, program: Callable[[str], str]) -> Iterator[Postgres]:
    """A PostgreSQL of this test's own, under a user that is not root where need be."""
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres")) if Path("/usr/lib/postgresql").exists() else []
    binaries = candidates[-1].parent if candidates else Path(program("postgres")).parent
    with Postgres(binaries, tmp_path / "pg") as server:
        yield server


@pytest.fixture
def postgres(postgres_server: Postgres) -> str:
    """Its address."""
    return postgres_server.url


class Commands:
    """Runs `triscope` commands in this test's environment, and ends what it started."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []

    def run(self, *arguments: str | Path, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            ["triscope", *map(str, arguments)],
            executable=executable(),
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self, *arguments: str | Path, until: str | None = "ready", **environment: str) -> subprocess.Popen[str]:
        """Start in the background; returns when a line of its log holds `until`."""
        process = subprocess.Popen(
            ["triscope", *map(str, arguments)],
            executable=executable(),
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.started.append(process)
        assert process.stderr is not None
        for line in process.stderr if until else ():
            if until in line:
                break
        else:
            if until:
                raise AssertionError(f"{arguments} ended with {process.wait()} before it was ready")
        return process

    def stop(self, process: subprocess.Popen[str], number: int = signal.SIGTERM, timeout: float = 5.0) -> tuple[int, float]:
        """Signal a process: (exit code, seconds until it ended)."""
        begin = time.monotonic()
        process.send_signal(number)
        code = process.wait(timeout=timeout)
        if process.stderr is not None:
            process.stderr.close()
        return code, time.monotonic() - begin


def executable() -> str:
    """The `triscope` beside this interpreter."""
    import sys

    return str(Path(sys.executable).parent / "triscope")


@pytest.fixture
def commands() -> Iterator[Commands]:
    """`triscope` as its user runs it."""
    made = Commands()
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stderr is not None and not process.stderr.closed:
            process.stderr.close()


def eventually(check: Callable[[], bool], timeout: float = 60.0, every: float = 0.1) -> None:
    """Wait until `check` holds; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not check():
        if time.monotonic() > deadline:
            raise AssertionError(f"{check} did not hold within {timeout} s")
        time.sleep(every)
