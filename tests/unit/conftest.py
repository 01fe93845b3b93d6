"""What the unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from apps.common.settings import Settings
from apps.industrial.acquisition.generated import write_dataset
from apps.industrial.bootstrap import open_industrial
from apps.industrial.evaluation.dataset import good_samples
from apps.industrial.inspection.recipe import Recipe
from apps.industrial.service import IndustrialService
from shared_runtime.repository.store import ModelRepository


@pytest.fixture
def repository(tmp_path: Path) -> ModelRepository:
    """An empty model repository."""
    return ModelRepository((tmp_path / "models",))


@pytest.fixture
def cast(settings: Settings, tmp_path: Path) -> Iterator[tuple[IndustrialService, Recipe]]:
    """A service with the recipe `cast`, taught from the few parts of a data set in `tmp_path`."""
    write_dataset(tmp_path, "cast", good=10, each=1)
    service, log = open_industrial(settings)
    yield service, service.teach("cast", good_samples(tmp_path / "train" / "good")).recipe
    service.close()
    log.close()
