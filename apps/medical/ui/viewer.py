"""The multi-planar viewer: three linked planes drawn in the browser from one transfer of the volume."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from apps.medical.preview import canonical, display_range
from apps.medical.volume import Volume

HERE = Path(__file__).parent
PRESETS = {"Full": (0.5, 1.0), "Brain": (0.42, 0.7), "Grey/white": (0.5, 0.4), "Bright": (0.3, 0.5), "Soft": (0.6, 1.2)}
"""Window/level presets for MR: centre and width as shares of the displayed range."""


def viewer_data(volume: Volume, labels: NDArray[np.uint8], structures: Sequence[dict[str, Any]]) -> bytes:
    """What the browser gets, once: length of a JSON header (u32), the header, grey (u8), labels (u8).

    Both arrays are (X, Y, Z) in the axes nearest to RAS, X fastest. The header holds the shape, voxel size
    [mm], the crosshair's first place, the intensities of grey 0 and 255, the structures, the presets.
    """
    image = canonical(volume.voxels, volume.affine)
    mask = np.asanyarray(canonical(labels, volume.affine).dataobj).astype(np.uint8)
    voxels = np.asanyarray(image.dataobj)
    low, high = display_range(voxels)
    grey = (np.clip((voxels - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    index = np.argwhere(mask > 0)
    centre = index.mean(0) if len(index) else (np.array(mask.shape) - 1) / 2
    if len(index):
        left = np.argwhere(np.isin(mask, [s["value"] for s in structures if s["side"] == "left"]))
        centre = left.mean(0) if len(left) else centre
    header = {
        "shape": list(mask.shape),
        "spacing": [float(v) for v in np.sqrt((np.asarray(image.affine)[:3, :3] ** 2).sum(0))],
        "cross": [round(float(v)) for v in centre],
        "range": [low, high],
        "structures": list(structures),
        "presets": PRESETS,
    }
    text = json.dumps(header).encode()
    return b"".join((struct.pack("<I", len(text)), text, grey.tobytes(order="F"), mask.tobytes(order="F")))


def viewer(data: bytes, key: str) -> None:
    """Draw the viewer. Scrolling, window/level and overlays stay in the browser."""
    component = st.components.v2.component(
        "triscope_viewer",
        html=(HERE / "viewer.html").read_text(),
        css=(HERE / "viewer.css").read_text(),
        js=(HERE / "viewer.js").read_text(),
    )
    component(data=data, key=key, height=640)
