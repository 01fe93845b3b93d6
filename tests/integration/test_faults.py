"""kill -9, SIGTERM, Ctrl-C and bad messages, on real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from apps.common.settings import Settings
from apps.medical.bootstrap import open_medical
from apps.medical.dicom.files import Instances
from apps.medical.messages import RESULTS, STUDIES, StudyMessage
from apps.medical.worker import GROUP
from pipelines.transport.embedded import EmbeddedLog
from tests.conftest import Commands, eventually
from tests.phantoms import HEAD, blob, dicom_slices, save_series

PRODUCER = """
import sys
from pathlib import Path
from pipelines.transport.embedded import EmbeddedLog
log = EmbeddedLog(Path(sys.argv[1]))
number = 0
while True:
    log.produce("t", str(number).encode(), key=sys.argv[2])
    print(number, flush=True)
    number += 1
"""
CONSUMER = """
import sys, time
from pathlib import Path
from pipelines.transport.embedded import EmbeddedLog
log = EmbeddedLog(Path(sys.argv[1]))
consumer = log.consumer("g", ["t"])
while True:
    for record in consumer.poll(0.2, max_records=5):
        print(record.partition, record.offset, flush=True)
        consumer.commit(record)
"""


@pytest.mark.parametrize("delay", [0.05, 0.21, 0.4])
def test_what_producers_were_told_is_there_after_kill_9(tmp_path: Path, delay: float) -> None:
    log = EmbeddedLog(tmp_path / "log")
    log.create_topic("t", 2)
    command = [sys.executable, "-c", PRODUCER, str(tmp_path / "log")]
    processes = [subprocess.Popen([*command, key], stdout=subprocess.PIPE, text=True) for key in ("a", "b")]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    time.sleep(delay)
    told = {}
    for key, process in zip(("a", "b"), processes, strict=True):
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        told[key] = max([0, *(int(line) for line in output.split())])
    stored: dict[str, list[int]] = {"a": [], "b": []}
    for partition in range(2):
        for record in log.read(("t", partition), 0, 1_000_000):
            stored[str(record.key)].append(int(record.value))
    for key, last in told.items():
        assert stored[key] == list(range(len(stored[key]))), "no gap, no repetition, in order"
        assert len(stored[key]) >= last + 1
    log.produce("t", b"on it goes")
    log.close()


def test_a_killed_consumer_is_replaced_at_once_and_nothing_is_skipped(tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path / "log")
    log.create_topic("t", 1)
    for number in range(400):
        log.produce("t", str(number).encode())
    process = subprocess.Popen([sys.executable, "-c", CONSUMER, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = [process.stdout.readline() for _ in range(20)]
    process.kill()
    rest, _ = process.communicate()
    handled = [int(line.split()[1]) for line in [*first, *rest.splitlines()] if line.strip()]
    consumer = log.consumer("g", ["t"])
    begin = time.monotonic()
    found: list[int] = []
    while len(found) < 400 - len(handled):
        records = consumer.poll(1)
        found += [r.offset for r in records]
        assert time.monotonic() - begin < 8, "the lease of a dead process must lapse at once"
    assert set(handled) | set(found) == set(range(400))
    assert len(set(handled) & set(found)) <= 1, "at most the record between its handling and its commit comes again"
    consumer.close()
    log.close()


def test_a_worker_killed_at_work_leaves_the_study_to_the_next_one(commands: Commands, settings: Settings) -> None:
    service, log = open_medical(settings)
    (study_id,) = service.receive(HEAD, "test").study_ids
    first = commands.start("medical", "worker")
    time.sleep(2.0)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert service.store.get(study_id).status == "received"
    second = commands.start("medical", "worker")
    eventually(lambda: service.store.get(study_id).status == "done", timeout=120)
    assert service.store.get(study_id).report["volumes_ml"]["left hippocampus"] > 1
    eventually(lambda: sum(log.lag(GROUP, STUDIES.name).values()) == 0)  # stopped before this commit, it would read the study again
    code, seconds = commands.stop(second)
    assert (code, seconds < 5) == (0, True)
    log.close()


STOPPED = """
import os, signal, sys, tempfile, time
import apps.cli
def work():
    folder = tempfile.TemporaryDirectory(dir=sys.argv[1])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
apps.cli.app = work
apps.cli.main()
"""


def test_a_command_that_is_stopped_leaves_no_temporary_folder(tmp_path: Path) -> None:
    stopped = subprocess.run([sys.executable, "-c", STOPPED, str(tmp_path)], timeout=120, check=False)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.glob("tmp*")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_at_work_ends_within_five_seconds_and_loses_nothing(commands: Commands, settings: Settings, number: int) -> None:
    service, log = open_medical(settings)
    (study_id,) = service.receive(HEAD, "test").study_ids
    process = commands.start("medical", "worker")
    time.sleep(2.0)
    code, seconds = commands.stop(process, number)
    assert code == 0
    assert seconds < 5
    assert service.store.get(study_id).status == "received"
    assert sum(log.lag(GROUP, STUDIES.name).values()) == 1
    log.close()


def test_bad_studies_go_to_the_dead_letters_and_the_good_one_is_done(settings: Settings, tmp_path: Path) -> None:
    import threading

    from apps.medical.worker import run_worker

    service, log = open_medical(settings)
    slices = dicom_slices(blob())
    broken = save_series(slices[:4] + slices[5:], tmp_path / "hole")
    ct = save_series(dicom_slices(blob(3), modality="CT"), tmp_path / "ct")
    hole_id = service.receive(broken, "test").study_ids[0]
    ct_id = service.receive(ct, "test").study_ids[0]
    STUDIES.send(log, StudyMessage("gone", "sha256:" + "0" * 64), source="test")
    log.produce(STUDIES.name, b"\x00 not a study", key="x")
    good = service.receive(HEAD, "test").study_ids[0]
    again = service.receive(HEAD, "test").study_ids[0]
    assert good == again
    run_worker(service, log, threading.Event(), until_idle=True)
    assert service.store.get(good).status == "done"
    hole, tomography = service.store.get(hole_id), service.store.get(ct_id)
    assert (hole.status, tomography.status) == ("refused", "refused")
    assert "about 1 missing" in hole.reason
    assert "modality CT" in tomography.reason
    consumer = log.consumer("reader", [STUDIES.dead_letters, RESULTS.name])
    records = [r for _ in range(10) for r in consumer.poll(0.2)]
    consumer.close()
    dead = [r for r in records if r.topic == STUDIES.dead_letters]
    results = [RESULTS.decode(r).payload for r in records if r.topic == RESULTS.name]
    assert len(dead) == 4
    assert sorted(r.status for r in results) == ["done", "done", "refused", "refused", "refused"]  # type: ignore[attr-defined]
    assert service.store.get("gone").reason.startswith("it could not be processed: BlobError")
    once, twice = (r for r in results if r.status == "done")  # type: ignore[attr-defined]
    assert once == twice, "a study that comes twice is segmented once, and answered twice"
    log.close()


def test_a_study_that_could_not_be_processed_says_so_and_is_tried_again_when_it_is_sent_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from apps.medical import service as use_cases
    from apps.medical.worker import run_worker

    service, log = open_medical(settings)
    (study_id,) = service.receive(HEAD, "test").study_ids
    segment = use_cases.segment_hippocampi
    monkeypatch.setattr(use_cases, "segment_hippocampi", lambda *_: (_ for _ in ()).throw(MemoryError("not today")))
    assert run_worker(service, log, threading.Event(), until_idle=True).counts.dead == 1
    assert service.store.get(study_id).status == "refused"
    assert service.store.get(study_id).reason == "it could not be processed: MemoryError: not today"
    monkeypatch.setattr(use_cases, "segment_hippocampi", segment)
    service.receive(HEAD, "test")
    run_worker(service, log, threading.Event(), until_idle=True)
    assert service.store.get(study_id).status == "done"
    assert service.store.get(study_id).reason == ""
    log.close()


@pytest.mark.parametrize("refused", [False, True])
def test_an_outcome_that_was_stored_but_not_sent_is_sent_when_the_study_comes_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """A worker that ends between the two, or a log that fails just then, must not cost the result."""
    import threading

    from apps.medical.worker import run_worker

    service, log = open_medical(settings)
    source = save_series(dicom_slices(blob(), modality="CT"), tmp_path / "ct") if refused else HEAD
    (study_id,) = service.receive(source, "test").study_ids
    produce, failures = log.produce, ["once"]

    def failing(topic: str, *args: Any, **options: Any) -> Any:
        if topic == RESULTS.name and failures:
            failures.pop()
            raise OSError("the log is gone for a moment")
        return produce(topic, *args, **options)

    monkeypatch.setattr(log, "produce", failing)
    run_worker(service, log, threading.Event(), until_idle=True)
    assert not failures
    consumer = log.consumer("reader", [STUDIES.dead_letters, RESULTS.name])
    records = [r for _ in range(10) for r in consumer.poll(0.2)]
    consumer.close()
    (result,) = [RESULTS.decode(r).payload for r in records if r.topic == RESULTS.name]
    assert (result.study_id, result.status) == (study_id, "refused" if refused else "done")  # type: ignore[attr-defined]
    assert len([r for r in records if r.topic == STUDIES.dead_letters]) == int(refused)
    log.close()


def test_a_series_that_arrives_twice_has_one_identity(settings: Settings, tmp_path: Path) -> None:
    service, log = open_medical(settings)
    slices = dicom_slices(blob())
    first = service.receive_instances(Instances(_reread(slices, tmp_path / "a")), "test").study_ids
    second = service.receive_instances(Instances(_reread(slices[::-1], tmp_path / "b")), "test").study_ids
    assert first == second
    assert len(service.store.latest()) == 1
    log.close()


def _reread(slices: list, folder: Path) -> list:
    from apps.medical.dicom.files import read_instances

    return read_instances(save_series(slices, folder)).datasets


def test_demo_pages_end_cleanly(commands: Commands, free_port: int) -> None:
    process = commands.start("medical", "ui", "--port", str(free_port), until=None)
    import urllib.request

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/_stcore/health", timeout=1):
                return True
        except OSError:
            return False

    eventually(answers, timeout=60)
    _, seconds = commands.stop(process)
    assert seconds < 5
