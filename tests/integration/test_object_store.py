"""Blobs in S3: stored, read, missing, and an object store that goes away while the line runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest

from apps.common.blobs import BlobStore, BlobsUnavailableError
from apps.common.errors import BlobError
from apps.common.settings import load_settings
from apps.industrial.acquisition.generated import GeneratedSource, write_dataset
from apps.industrial.bootstrap import open_industrial
from apps.industrial.evaluation.dataset import good_samples
from apps.industrial.images import png
from apps.industrial.messages import FRAMES
from apps.industrial.worker import GROUP
from tests.conftest import Commands, eventually
from tests.services import ObjectStore

AWAY_SECONDS = 20.0
"""Longer than a handler's retries of old took, with those of the S3 client."""
URL = "s3://triscope/blobs"


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with ObjectStore() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # one that was made before knows another address
        yield server


def test_blobs_in_a_bucket(objects: ObjectStore) -> None:
    store = BlobStore(URL)
    content = bytes(range(256)) * 40_000
    reference = store.put(content)
    assert store.put(content) == reference
    assert BlobStore(URL).get(reference) == content
    with pytest.raises(BlobError, match="no blob") as missing:
        store.get("sha256:" + "0" * 64)
    assert not isinstance(missing.value, BlobsUnavailableError)


def test_blobs_in_a_bucket_are_removed_where_they_are_old(objects: ObjectStore) -> None:
    store = BlobStore(URL)
    reference, now = store.put(b"content"), datetime.now(UTC)
    assert not store.remove(reference, now - timedelta(hours=2))
    assert store.get(reference) == b"content"
    assert store.remove(reference, now + timedelta(hours=2))
    with pytest.raises(BlobError, match="no blob"):
        store.get(reference)
    assert store.remove(reference, now), "it is gone"
    assert store.put(b"content") == reference
    assert store.get(reference) == b"content"


def test_no_bucket_is_made(objects: ObjectStore) -> None:
    with pytest.raises(BlobsUnavailableError, match=r"tricsope/blobs do not answer: .*check blob_url"):
        BlobStore("s3://tricsope/blobs").put(b"content")


def test_parts_wait_for_the_blobs(objects: ObjectStore, commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRISCOPE_BLOB_URL", URL)
    write_dataset(tmp_path / "parts", "cast", good=12, each=1)
    service, log = open_industrial(load_settings().settings)
    service.teach("cast", good_samples(tmp_path / "parts" / "train" / "good"))
    parts = [png(image) for image, _ in GeneratedSource("cast", 8).parts()]
    for part in parts:
        service.submit(part, "cast")
    objects.stop()
    station = commands.start("industrial", "station")
    feeder = commands.start("industrial", "feed", "texture:cast", "--recipe", "cast", "--per-second", "8", "--number", "8", until=None)
    with pytest.raises(BlobsUnavailableError, match="do not answer"):
        service.submit(parts[0], "cast")
    time.sleep(AWAY_SECONDS)
    assert station.poll() is None
    assert feeder.poll() is None
    assert service.store.counts("cast").total == 0
    objects.start()
    assert feeder.wait(120) == 0
    eventually(lambda: service.store.counts("cast").total == 2 * len(parts), timeout=120)
    eventually(lambda: not any(log.lag(GROUP, FRAMES.name).values()), timeout=60)
    assert not any(log.lag("nobody", FRAMES.dead_letters).values())
    assert station.poll() is None
    service.close()
    log.close()
