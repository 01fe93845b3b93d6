"""What workers say of themselves: to the start page, and to a real Prometheus."""

from __future__ import annotations

import json
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from apps.common.database import open_database
from apps.common.errors import UsageError
from apps.common.settings import Settings, load_settings
from apps.common.ui.workers import state_of
from apps.common.workers import SILENT_SECONDS, Worker, known_workers, serve_metrics, workers
from apps.industrial.acquisition.generated import GeneratedSource
from apps.industrial.bootstrap import open_industrial
from apps.industrial.evaluation.dataset import Sample
from apps.industrial.images import png
from tests.conftest import Commands, eventually
from tests.services import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(settings: Settings, tmp_path: Path) -> str:
    """A recipe of generated parts."""
    service, log = open_industrial(settings)
    samples = []
    for number, (image, _) in enumerate(GeneratedSource("brushed", 12, defect_share=0.0).parts()):
        path = tmp_path / f"{number}.png"
        path.write_bytes(png(image))
        samples.append(Sample(path, "good"))
    service.teach("plate", samples)
    service.close()
    log.close()
    return "plate"


def feed(settings: Settings, recipe: str, number: int) -> None:
    service, log = open_industrial(settings)
    for image, _ in GeneratedSource("brushed", number, seed=5).parts():
        service.submit(png(image), recipe)
    service.submit(b"no picture", recipe)
    service.close()
    log.close()


def test_the_start_page_knows_who_works_and_who_fell_silent(commands: Commands, settings: Settings, recipe: str) -> None:
    engine = open_database(settings.database_url)
    first, second = (commands.start("industrial", "station") for _ in range(2))
    feed(settings, recipe, 4)

    def seen() -> list[Worker]:
        return [worker for worker in known_workers(engine) if worker.worker == "industrial"]

    eventually(lambda: sum(worker.report.handled for worker in seen()) == 4)
    eventually(lambda: sum(worker.report.dead for worker in seen()) == 1)  # perhaps of the other worker, which reports later
    assert [worker.alive for worker in seen()] == [True, True]
    models = {m.model: m for worker in seen() for m in worker.report.models}
    assert models["texture-features"].runs >= 1
    assert "on cpu" in models["texture-features"].plan
    assert any("in the dead letters" in state_of(worker) for worker in seen())
    assert commands.stop(first)[0] == 0
    eventually(lambda: len(seen()) == 1)
    commands.stop(second, signal.SIGKILL)
    with engine.begin() as connection:  # instead of waiting until it is late
        late = (datetime.now(UTC) - timedelta(seconds=SILENT_SECONDS + 1)).isoformat()
        connection.execute(workers.update().values(seen=late))
    assert [worker.alive for worker in seen()] == [False]
    assert "silent for" in state_of(seen()[0])
    engine.dispose()


def test_a_real_prometheus_scrapes_a_worker(
    commands: Commands, settings: Settings, recipe: str, tmp_path: Path, program: Callable[[str], str]
) -> None:
    port, own = free_port(), free_port()
    commands.start("industrial", "station", TRISCOPE_METRICS_PORT=str(port))
    feed(settings, recipe, 3)
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ROOT / "deploy" / "prometheus" / "rules.yml")]
    config["scrape_configs"] = [{"job_name": "industrial", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [
            program("prometheus"),
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{own}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(query: str) -> list[float]:
        address = f"http://127.0.0.1:{own}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return [float(row["value"][1]) for row in json.loads(answer.read())["data"]["result"]]
        except OSError:
            return []

    try:
        eventually(lambda: ask('up{job="industrial"}') == [1.0])
        eventually(lambda: ask('triscope_records_total{outcome="handled"}') == [3.0])
        assert ask('triscope_records_total{outcome="dead"}') == [1.0]
        assert ask("sum(triscope_industrial_verdicts_total)") == [3.0]
        assert ask('triscope_model_plan_info{model="texture-features"}') == [1.0]
        assert ask('sum(triscope_model_run_rows_sum{model="texture-features"})') == [3.0]
        eventually(lambda: len(ask("triscope:records_per_second")) > 0)
        for path in (ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"):
            for panel in json.loads(path.read_text())["panels"]:
                for target in panel["targets"]:
                    answer = f"http://127.0.0.1:{own}/api/v1/query?" + urllib.parse.urlencode({"query": target["expr"]})
                    with urllib.request.urlopen(answer, timeout=5) as found:
                        assert json.loads(found.read())["status"] == "success"
    finally:
        process.terminate()
        process.wait(20)


def test_a_taken_port_for_metrics_is_told(commands: Commands) -> None:
    port = free_port()
    serve_metrics("127.0.0.1", port)
    with pytest.raises(UsageError, match="choose another TRISCOPE_METRICS_PORT"):
        serve_metrics("127.0.0.1", port)
    done = commands.run("industrial", "station", TRISCOPE_METRICS_PORT=str(port))
    assert done.returncode == 2
    assert f"/metrics can't be served on 127.0.0.1:{port}" in done.stderr
    assert load_settings().settings.metrics_port == 0
