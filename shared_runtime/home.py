"""Where an installation keeps what it writes."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """`TRISCOPE_HOME`, or the user's data folder for `triscope`."""
    return Path(os.environ.get("TRISCOPE_HOME") or platformdirs.user_data_path("triscope", appauthor=False)).expanduser()
