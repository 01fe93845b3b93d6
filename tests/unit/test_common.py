"""Settings, logs, blobs, database."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from apps.common.blobs import BlobStore
from apps.common.command_line import write_json
from apps.common.database import audit, open_database, write_audit
from apps.common.errors import BlobError, SettingsError
from apps.common.logs import JsonFormatter, TextFormatter, private, redact
from apps.common.settings import load_settings, masked
from pipelines import open_log
from pipelines.messages import TRACEPARENT, new_traceparent, trace_id


def test_environment_goes_before_file_before_default(tmp_path: Path) -> None:
    file = tmp_path / "triscope.toml"
    file.write_text('ui_port = 9000\nlog_level = "debug"\n')
    loaded = load_settings({"TRISCOPE_HOME": str(tmp_path), "TRISCOPE_UI_PORT": "9100"})
    assert loaded.settings.ui_port == 9100
    assert loaded.settings.log_level == "debug"
    assert loaded.settings.device == "auto"
    assert loaded.settings.log_url == f"embedded://{tmp_path}/log"
    assert loaded.origin["ui_port"] == "environment TRISCOPE_UI_PORT"
    assert loaded.origin["log_level"] == f"file {file}"
    assert "device" not in loaded.origin


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TRISCOPE_LOG_ULR", "x", ["log_ulr", "did you mean 'log_url'"]),
        ("TRISCOPE_UI_PORT", "many", ["ui_port", "many", "int"]),
        ("TRISCOPE_DEVICE", "gpu", ["device", "gpu"]),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, name: str, value: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"TRISCOPE_HOME": str(tmp_path), name: value})
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_unknown_key_in_the_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "triscope.toml").write_text("threds = 3\n")
    with pytest.raises(SettingsError, match="did you mean 'threads'"):
        load_settings({"TRISCOPE_HOME": str(tmp_path)})


def test_secrets_are_masked() -> None:
    assert masked("database_url", "postgresql+psycopg://me:s3cret@db/x") == "postgresql+psycopg://me:***@db/x"
    assert masked("api_token", "abc") == "***"
    assert masked("log_url", "kafka://a:9092") == "kafka://a:9092"


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"msg": message, "levelname": "INFO", "name": "apps.test"})
    made.__dict__.update(extra)
    return made


def test_json_logs_carry_the_trace_id() -> None:
    token = TRACEPARENT.set(new_traceparent())
    try:
        line = json.loads(JsonFormatter().format(record("done", study_id="s1")))
        assert line["trace_id"] == trace_id(TRACEPARENT.get())
        assert (line["message"], line["study_id"], line["level"]) == ("done", "s1", "info")
    finally:
        TRACEPARENT.reset(token)


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_no_patient_card_or_secret_reaches_a_log(formatter: logging.Formatter) -> None:
    with private("Müller^Anna-Maria", "PID-99"):
        line = formatter.format(record("reading Anna-Maria of MÜLLER", patient="pid-99", url="postgresql://u:hunter2@h/d"))
    card = formatter.format(record("card 4111 1111 1111 1111 and 5500-0000-0000-0004", pan="4111111111111111"))
    for word in ("anna", "müller", "99", "hunter2"):
        assert word not in line.lower()
    assert "4111" not in card
    assert "0004" not in card
    after = formatter.format(record("Anna-Maria"))
    assert "Anna-Maria" in after, "what was private is so during its own work alone"


def test_identifiers_survive_redaction() -> None:
    uid = "1.2.826.0.1.3680043.8.498.17256976650935676"
    assert redact(uid) == uid
    assert redact("1700000000000") == "1700000000000"


def test_blobs_are_kept_once_by_content(tmp_path: Path) -> None:
    store = BlobStore(f"file://{tmp_path}/blobs")
    first, second = store.put(b"content"), store.put(b"content")
    assert first == second
    assert store.get(first) == b"content"
    files = [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()]
    assert len(files) == 1
    files[0].write_bytes(b"Content")
    with pytest.raises(BlobError, match="changed on disk"):
        store.get(first)


@pytest.mark.parametrize("reference", ["sha256:" + "0" * 64, "../../etc/passwd", "sha256:../../etc/passwd", "md5:1"])
def test_a_reference_that_is_none_reads_nothing(tmp_path: Path, reference: str) -> None:
    with pytest.raises(BlobError):
        BlobStore(f"file://{tmp_path}").get(reference)


def test_the_database_is_migrated_once_and_audits(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/deep/x.sqlite"
    open_database(url).dispose()
    engine = open_database(url)
    names = set(sa.inspect(engine).get_table_names())
    assert {"audit", "medical_studies", "alembic_version"} <= names
    with engine.begin() as connection:
        write_audit(connection, "me", "look", "s1", why="because")
    with engine.connect() as connection:
        row = connection.execute(audit.select()).mappings().one()
    assert (row["actor"], row["action"], row["subject"], row["detail"]) == ("me", "look", "s1", {"why": "because"})
    engine.dispose()


def test_names_that_are_no_utf8_come_out_as_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"teil-\xe4.png")
    write_json({"images": [{"path": name}], "refused": (name,)}, str(tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == {
        "images": [{"path": "teil-\\udce4.png"}],
        "refused": ["teil-\\udce4.png"],
    }


def test_a_home_of_any_name_holds_everything(tmp_path: Path) -> None:
    root = tmp_path / "root"
    home = root / "my #1 50%25?x=y" / "home"
    settings = load_settings({"TRISCOPE_HOME": str(home)}).settings
    open_database(settings.database_url).dispose()
    log = open_log(settings.log_url)
    log.create_topic("t", 1)
    log.close()
    BlobStore(settings.blob_url).put(b"x")
    assert {path.name for path in home.iterdir()} >= {"triscope.sqlite", "log", "blobs"}
    assert [path.name for path in root.iterdir()] == ["my #1 50%25?x=y"]


def test_a_settings_file_that_is_no_utf8_says_so(tmp_path: Path) -> None:
    (tmp_path / "triscope.toml").write_bytes(b'dicom_ae_title = "Z\xfcrich"')
    with pytest.raises(SettingsError, match="can't be read: 'utf-8' codec"):
        load_settings({"TRISCOPE_HOME": str(tmp_path)})


def test_the_command_starts_without_what_single_commands_need() -> None:
    heavy = "{'cv2', 'highdicom', 'openvino', 'polars', 'pydicom', 'scipy', 'sklearn', 'sqlalchemy', 'streamlit', 'torch', 'xgboost'}"
    ran = subprocess.run([sys.executable, "-c", f"import sys, apps.cli; print({heavy} & set(sys.modules))"], capture_output=True, text=True)
    assert ran.stdout.strip() == "set()", ran.stderr
