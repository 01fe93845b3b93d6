"""C-STORE from dcmtk and from a real Orthanc; SEG stored in Orthanc and read back; Kafka and PostgreSQL end to end."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pynetdicom import AE, _config

from apps.common.settings import Settings, load_settings
from apps.medical.bootstrap import open_medical
from apps.medical.dicom.network import StorageProvider
from apps.medical.messages import RESULTS
from tests.conftest import Commands, eventually
from tests.phantoms import HEAD, blob, dicom_slices, save_series, unpack_head
from tests.services import Orthanc, free_port


@pytest.fixture
def listener(commands: Commands) -> int:
    port = free_port()
    commands.start("medical", "listen", TRISCOPE_DICOM_PORT=str(port), TRISCOPE_DICOM_QUIET_SECONDS="1")
    return port


def test_storescu_sends_a_series_that_becomes_one_study(
    listener: int, settings: Settings, tmp_path: Path, program: Callable[[str], str]
) -> None:
    folder = save_series(dicom_slices(blob(), patient="Secret^Name"), tmp_path / "series")
    files = sorted(map(str, folder.iterdir()))
    command = [program("storescu"), "-aec", "TRISCOPE", "127.0.0.1", str(listener), *files]
    assert subprocess.run(command, env={**os.environ, "TCP_NODELAY": "1"}, capture_output=True, check=False).returncode == 0
    service, log = open_medical(settings)
    eventually(lambda: len(service.store.latest()) == 1, timeout=20)
    (study,) = service.store.latest()
    assert study.source == "c-store STORESCU"
    assert study.patient == "Secret^Name"
    assert service.volume_of(study).voxels.shape == (20, 24, 10)
    log.close()


def test_echo_answers_and_a_study_pending_at_the_end_is_not_lost(
    commands: Commands, settings: Settings, tmp_path: Path, program: Callable[[str], str]
) -> None:
    port = free_port()
    process = commands.start("medical", "listen", TRISCOPE_DICOM_PORT=str(port), TRISCOPE_DICOM_QUIET_SECONDS="600")
    assert subprocess.run([program("echoscu"), "127.0.0.1", str(port)], check=False).returncode == 0
    folder = save_series(dicom_slices(blob()), tmp_path / "series")
    subprocess.run([program("storescu"), "127.0.0.1", str(port), *map(str, folder.iterdir())], check=True, capture_output=True)
    code, seconds = commands.stop(process)
    assert (code, seconds < 5) == (0, True)
    service, log = open_medical(settings)
    assert len(service.store.latest()) == 1
    log.close()


def test_what_a_killed_listener_had_acknowledged_is_handed_over_by_the_next(
    commands: Commands, settings: Settings, tmp_path: Path, program: Callable[[str], str]
) -> None:
    port = free_port()
    options = {"TRISCOPE_DICOM_PORT": str(port), "TRISCOPE_DICOM_QUIET_SECONDS": "600"}
    process = commands.start("medical", "listen", **options)
    folder = save_series(dicom_slices(blob()), tmp_path / "series")
    subprocess.run([program("storescu"), "127.0.0.1", str(port), *map(str, folder.iterdir())], check=True, capture_output=True)
    process.kill()
    process.wait()
    service, log = open_medical(settings)
    assert service.store.latest() == []
    commands.start("medical", "listen", **options | {"TRISCOPE_DICOM_QUIET_SECONDS": "1"})
    eventually(lambda: len(service.store.latest()) == 1, timeout=20)
    (study,) = service.store.latest()
    assert service.volume_of(study).voxels.shape == (20, 24, 10)
    assert list((settings.home_path / "incoming").iterdir()) == []
    log.close()


def test_a_large_instance_is_in_memory_once_and_kept_as_it_was_sent(commands: Commands, settings: Settings) -> None:
    port = free_port()
    process = commands.start("medical", "listen", TRISCOPE_DICOM_PORT=str(port), TRISCOPE_DICOM_QUIET_SECONDS="600")
    small, large = dicom_slices(blob())[:2]
    large.Rows, large.Columns = 4096, 8192
    large.PixelData = np.random.default_rng(0).integers(0, 4096, (4096, 8192), np.uint16).tobytes()
    requester = AE()
    requester.add_requested_context(small.SOPClassUID, small.file_meta.TransferSyntaxUID)
    eventually(lambda: requester.associate("127.0.0.1", port).is_established)
    sender = requester.associate("127.0.0.1", port)
    assert sender.send_c_store(small).Status == 0
    before = _peak_bytes(process.pid)
    assert sender.send_c_store(large).Status == 0
    assert _peak_bytes(process.pid) - before < 1.6 * len(large.PixelData)
    sender.release()
    kept = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, Path(settings.home).rglob("*.dcm"))}
    assert kept[large.SOPInstanceUID].PixelData == large.PixelData
    assert kept[small.SOPInstanceUID].file_meta.TransferSyntaxUID == small.file_meta.TransferSyntaxUID
    process.kill()
    process.wait()


def test_an_instance_with_a_damaged_header_is_refused_and_its_neighbour_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, damaged = sorted(save_series(dicom_slices(blob())[:2], tmp_path / "series").iterdir())
    content = damaged.read_bytes()
    assert content.count(b"\x10\x00\x20\x00LO") == 1
    damaged.write_bytes(content.replace(b"\x10\x00\x20\x00LO", b"\x10\x00\x20\x00lo"))
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)  # sends a file as it is
    spool, got = tmp_path / "spool", []
    options: dict[str, Any] = {"spool": spool, "address": "127.0.0.1", "port": 0, "ae_title": "T", "quiet_seconds": 600}
    with StorageProvider(lambda found, _: got.append(len(found.datasets)), **options) as provider:
        requester, meta = AE(), pydicom.dcmread(whole).file_meta
        requester.add_requested_context(meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID)
        sender = requester.associate("127.0.0.1", provider.port)
        assert [sender.send_c_store(str(path)).Status for path in (damaged, whole)] == [0xC000, 0]
        sender.release()
        assert not list(spool.rglob("*.part"))
    assert got == [1]


def _peak_bytes(process: int) -> int:
    """The most memory that a process has held."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def test_a_port_in_use_is_one_clear_line(commands: Commands) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = commands.run("medical", "listen", TRISCOPE_DICOM_PORT=str(port))
    assert answer.returncode == 2
    assert str(port) in answer.stderr.strip().splitlines()[-1]


def test_orthanc_sends_a_head_and_takes_the_seg_back(
    commands: Commands, settings: Settings, tmp_path: Path, program: Callable[[str], str]
) -> None:
    port = free_port()
    binary = shutil.which("Orthanc") or (program("Orthanc") if not Path("/usr/sbin/Orthanc").exists() else "/usr/sbin/Orthanc")
    commands.start("medical", "listen", TRISCOPE_DICOM_PORT=str(port), TRISCOPE_DICOM_QUIET_SECONDS="2")
    commands.start("medical", "worker")
    service, log = open_medical(settings)
    with Orthanc(binary, tmp_path, port) as orthanc:
        head = unpack_head(tmp_path / "head")
        for file in sorted(head.iterdir()):
            orthanc.post("/instances", file.read_bytes())
        (series,) = json.loads(orthanc.get("/series"))
        orthanc.post("/modalities/triscope/store", series.encode())
        eventually(lambda: [s.status for s in service.store.latest()] == ["done"], timeout=150)
        (study,) = service.store.latest()
        assert study.source == f"c-store {orthanc.aet}"
        segmentation = service.blobs.get(study.files["segmentation.dcm"])
        stored = orthanc.post("/instances", segmentation)
        assert stored["Status"] == "Success"
        back = pydicom.dcmread(io.BytesIO(orthanc.get(f"/instances/{stored['ID']}/file")))
    sent = pydicom.dcmread(io.BytesIO(segmentation))
    assert back.SOPInstanceUID == sent.SOPInstanceUID
    np.testing.assert_array_equal(back.pixel_array, sent.pixel_array)
    sources = {pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID for f in head.iterdir()}
    referred = {i.ReferencedSOPInstanceUID for i in back.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referred <= sources
    file = tmp_path / "seg.dcm"
    file.write_bytes(segmentation)
    answer = subprocess.run([program("dciodvfy"), str(file)], capture_output=True, text=True, check=False)
    assert "Error" not in answer.stderr + answer.stdout, answer.stderr
    log.close()


def test_a_study_through_a_real_kafka_broker(commands: Commands, kafka: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRISCOPE_LOG_URL", f"kafka://{kafka}")
    applied = commands.run("pipeline", "topics", "--apply", "--json", "-")
    assert applied.returncode == 0, applied.stderr
    assert all(row["present"] for row in json.loads(applied.stdout)["topics"])
    service, log = open_medical(load_settings().settings)
    worker = commands.start("medical", "worker")
    (study_id,) = service.receive(HEAD, "test").study_ids
    eventually(lambda: service.store.get(study_id).status == "done", timeout=120)
    consumer = log.consumer("reader", [RESULTS.name])
    deadline, found = time.monotonic() + 40, []
    while not found and time.monotonic() < deadline:
        found = [RESULTS.decode(r).payload for r in consumer.poll(1.0)]
    consumer.close()
    assert found[0].study_id == study_id
    assert found[0].volumes_ml["left hippocampus"] > 1
    code, seconds = commands.stop(worker)
    assert (code, seconds < 5) == (0, True)
    log.close()


def test_the_store_on_postgresql(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setenv("TRISCOPE_DATABASE_URL", postgres)
    service, log = open_medical(load_settings().settings)
    assert service.store.add("s1", source="test", blob="sha256:0", patient="A^B")
    assert not service.store.add("s1", source="test", blob="sha256:0")
    service.store.settle("s1", "done", report={"volumes_ml": {"x": 1.5}}, files={"a": "b"})
    study = service.store.get("s1")
    assert (study.status, study.report, study.files, study.patient) == ("done", {"volumes_ml": {"x": 1.5}}, {"a": "b"}, "A^B")
    assert service.store.counts() == {"done": 1}
    assert service.store.add("s2", source="\udcff" * 300, blob="sha256:0", patient="A\0^B")
    service.store.settle("s2", "refused", reason="tag \0 " + "x" * 5000, description="\0")
    odd = service.store.get("s2")
    assert (odd.patient, odd.description, len(odd.source), odd.reason[:6]) == ("A^B", "", 200, "tag  x")
    again, other = open_medical(load_settings().settings)
    assert {s.study_id for s in again.store.latest()} == {"s1", "s2"}
    other.close()
    log.close()
