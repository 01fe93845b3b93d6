"""The demo and the commands, as their user runs them."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import Commands
from tests.phantoms import HEAD, blob, dicom_slices, save_series


def test_the_demo_without_pages_writes_a_summary(commands: Commands, tmp_path: Path) -> None:
    answer = commands.run("--log-format", "json", "demo", "--no-ui", "--json", tmp_path / "out.json")
    assert answer.returncode == 0, answer.stderr
    whole = json.loads((tmp_path / "out.json").read_text())
    cards = whole["finance"]
    assert cards["transactions"] == cards["decided_now"] > 5000
    assert cards["dead_letters"] == 0
    assert cards["alerts"] > 50
    assert cards["matured_alerts_fraud"] > 0.5 * cards["matured_alerts"] > 10
    assert cards["newest_alert"]["reasons"]
    parts = whole["industrial"]
    assert parts["parts"] == 60
    assert parts["dead_letters"] == 0
    assert parts["defective_held"] >= 0.7 * parts["defective"] > 3
    assert parts["good_passed"] >= 40
    summary = whole["medical"]
    assert summary["status"] == "done"
    assert summary["volumes_ml"]["left hippocampus"] > 1
    assert {"segmentation.dcm", "segmentation.nii.gz", "preview.png", "report.json"} <= set(summary["files"])
    lines = [json.loads(line) for line in answer.stderr.splitlines() if line.startswith("{")]
    done = next(line for line in lines if line["message"] == "study done")
    assert len(done["trace_id"]) == 32
    assert "Sample" not in answer.stderr, "no patient name in a log"


def test_the_demo_ends_by_ctrl_c_starts_again_and_its_pages_end_with_it(commands: Commands, free_port: int) -> None:
    process = commands.start("demo", "--port", str(free_port), until="Triscope is at")
    time.sleep(3)  # the workers are at work
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    log = process.stderr.read()  # type: ignore[union-attr]
    assert process.wait(15) == 0
    assert "interrupted" in log
    assert not answers(free_port)

    process = commands.start("demo", "--port", str(free_port), until="Triscope is at")
    threading.Timer(8, process.kill).start()
    log = process.stderr.read()  # type: ignore[union-attr]
    assert "Traceback" not in log
    assert "dlq" not in log, "no card comes twice"
    deadline = time.monotonic() + 15
    while answers(free_port) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not answers(free_port)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_segment_writes_what_a_clinician_receives(commands: Commands, tmp_path: Path) -> None:
    answer = commands.run("medical", "segment", HEAD, "--out", tmp_path / "out", "--json", "-")
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"segmentation.dcm", "segmentation.nii.gz", "preview.png", "report.json"}
    labels = nib.load(tmp_path / "out" / "segmentation.nii.gz")
    voxel_ml = abs(np.linalg.det(labels.affine[:3, :3])) / 1000
    counts = np.bincount(np.asanyarray(labels.dataobj).astype(int).ravel(), minlength=5)
    assert report["volumes_ml"]["right hippocampus"] == pytest.approx((counts[3] + counts[4]) * voxel_ml, abs=1e-3)
    assert {"read", "locate", "segment", "write", "total"} <= set(report["seconds"])


def test_evaluate_writes_the_documented_json_and_the_label_maps(commands: Commands, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("case_1.nii.gz", "case_2.nii.gz"):
        image = generator.normal(0, 1, (36, 50, 36)).astype(np.float32)
        labels = np.zeros(image.shape, np.uint8)
        labels[12:24, 25:40, 12:24], labels[12:24, 10:25, 12:24] = 1, 2
        image[labels > 0] += 3
        for folder, array in (("images", image), ("labels", labels)):
            (tmp_path / folder).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / folder / name)
    for folder in ("images", "labels"):
        (tmp_path / folder / "cut.nii.gz").write_bytes((tmp_path / folder / name).read_bytes()[:500])
    arguments = ("--images", tmp_path / "images", "--labels", tmp_path / "labels", "--out", tmp_path / "out", "--json", tmp_path / "r.json")
    answer = commands.run("medical", "evaluate", *arguments)
    assert answer.returncode == 0, answer.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    for metric in ("dice", "hd95_mm", "volume_error_percent"):
        assert {"mean", "anterior", "posterior"} <= set(result["metrics"][metric])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"case_1.nii.gz", "case_2.nii.gz"}
    assert {"host", "model", "cases"} <= set(result)
    assert [case["case"] for case in result["refused"]] == ["cut.nii.gz"], "one damaged file costs the others nothing"
    assert "left out cut.nii.gz" in answer.stderr


def cut(folder: Path) -> Path:
    save_series(dicom_slices(blob()), folder)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-300])
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "nowhere", ["no file or folder"]),
        (lambda p: save_series([*dicom_slices(blob())[:4], *dicom_slices(blob())[5:]][:4], p / "x"), ["at least 15 mm"]),
        (lambda p: save_series(dicom_slices(blob(), modality="CT"), p / "ct"), ["modality CT"]),
        (lambda p: cut(p / "cut"), ["can't be decoded", "send it again"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(make: object, words: list[str], commands: Commands, tmp_path: Path) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    answer = commands.run("medical", "segment", path, "--out", tmp_path / "out")
    assert answer.returncode == 2
    lines = answer.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("triscope: ")
    assert all(word in lines[0] for word in words), lines


def test_a_changed_model_is_not_run(commands: Commands, tmp_path: Path) -> None:
    from shared_runtime.repository.store import shipped_models

    copy = tmp_path / "home" / "models" / "hippocampus-t1"
    copy.mkdir(parents=True)
    for file in (shipped_models() / "hippocampus-t1").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with (copy / "model.onnx").open("r+b") as stream:
        stream.seek(5000)
        stream.write(b"\x13\x37")
    answer = commands.run("medical", "segment", HEAD, "--out", tmp_path / "out")
    assert answer.returncode == 2
    assert "changed or damaged" in answer.stderr


def test_doctor_speaks_of_the_machine_and_the_services(commands: Commands, free_port: int) -> None:
    answer = commands.run("doctor", "--json", "-", TRISCOPE_LOG_URL=f"kafka://127.0.0.1:{free_port}")
    assert answer.returncode == 0, answer.stderr
    findings = json.loads(answer.stdout)
    assert findings["host"]["cores"] >= 1
    assert {row["backend"] for row in findings["backends"]} == {"fused", "onnxruntime", "openvino", "torch", "trees", "xgboost"}
    assert all(row["lacks"] or row["version"] for row in findings["backends"])
    log = next(row for row in findings["services"] if row["service"] == "log")
    assert log["reachable"] is False


def test_settings_are_shown_with_their_origin_and_without_secrets(commands: Commands) -> None:
    url = "postgresql+psycopg://u:hunter2@127.0.0.1/x"
    answer = commands.run("doctor", "--settings", "--json", "-", TRISCOPE_DATABASE_URL=url)
    assert "hunter2" not in answer.stdout + answer.stderr
    row = next(r for r in json.loads(answer.stdout)["settings"] if r["name"] == "database_url")
    assert row["origin"] == "environment TRISCOPE_DATABASE_URL"
    wrong = commands.run("doctor", TRISCOPE_LOG_ULR="x")
    assert wrong.returncode == 2
    assert "did you mean 'log_url'" in wrong.stderr


def test_models_are_listed_shown_and_planned(commands: Commands) -> None:
    listed = json.loads(commands.run("model", "list", "--json", "-").stdout)
    assert "hippocampus-t1" in [m["name"] for m in listed["models"]]
    plan = json.loads(commands.run("model", "plan", "hippocampus-t1", "--json", "-").stdout)
    assert plan["precision"] == "float32"
    assert len(plan["candidates"]) >= 3
    assert commands.run("model", "show", "hippocampus-t2").returncode == 2


def test_topics_are_made_and_lag_is_told(commands: Commands) -> None:
    before = json.loads(commands.run("pipeline", "topics", "--json", "-").stdout)["topics"]
    assert not any(row["present"] for row in before)
    after = json.loads(commands.run("pipeline", "topics", "--apply", "--json", "-").stdout)["topics"]
    assert {"medical.studies", "medical.results", "medical.studies.dlq"} <= {row["topic"] for row in after if row["present"]}
    lag = json.loads(commands.run("pipeline", "lag", "medical", "medical.studies", "--json", "-").stdout)
    assert lag["total"] == 0
