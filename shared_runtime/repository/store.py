"""Models by name: those of this installation first, then the shipped ones."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared_runtime.errors import ModelNotFoundError
from shared_runtime.home import home


def shipped_models() -> Path:
    """The folder of the models that travel with the distribution."""
    return Path(str(importlib.resources.files("triscope_data"))) / "models"


@dataclass(frozen=True)
class ModelRepository:
    """Folders that hold one model folder a name, searched in order."""

    roots: Sequence[Path]

    @classmethod
    def default(cls) -> ModelRepository:
        """`TRISCOPE_HOME/models`, then the shipped models."""
        return cls((home() / "models", shipped_models()))

    def names(self) -> list[str]:
        """The names that can be loaded, sorted."""
        found = {card.parent.name for root in self.roots for card in root.glob("*/card.toml")}
        return sorted(name for name in found if not name.startswith("."))  # those are being written, or were left by who was killed

    def places(self, name: str) -> list[Path]:
        """Where model `name` may lie, in the order in which it is looked for."""
        return [root / name for root in self.roots]

    def folder(self, name: str) -> Path:
        """The folder of model `name`. Raises ModelNotFoundError, naming the nearest known name."""
        if name in self.names():
            for folder in self.places(name):
                if (folder / "card.toml").is_file():
                    return folder
        near = difflib.get_close_matches(name, self.names(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known models: {', '.join(self.names()) or 'none'}"
        raise ModelNotFoundError(f"no model named {name!r}; {hint}")
