"""What the unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared_runtime.repository.store import ModelRepository


@pytest.fixture
def repository(tmp_path: Path) -> ModelRepository:
    """An empty model repository."""
    return ModelRepository((tmp_path / "models",))
