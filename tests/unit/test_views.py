"""The views of a window: what one sees comes back to its place."""

from __future__ import annotations

import numpy as np

from apps.common.ui.text import plain
from apps.medical.segmentation.views import merged, views


def test_every_view_comes_back_to_its_place() -> None:
    window = np.random.default_rng(0).normal(size=(48, 64, 48)).astype(np.float32)
    seen = views(window)
    assert seen.shape == (8, 1, 48, 64, 48)
    assert len({part.tobytes() for part in seen}) == 8, "no two views are alike"
    back = merged(seen)
    assert np.allclose(back[0], window, atol=1e-6), "at the edges too, where some views have lost a voxel"


def test_a_view_that_differs_counts_an_eighth() -> None:
    window = np.zeros((48, 64, 48), np.float32)
    seen = views(window)
    seen[3] = 1
    assert np.allclose(merged(seen)[0, 8:-8, 8:-8, 8:-8], 1 / 8)


def test_data_is_no_markdown() -> None:
    assert plain("t1_mpr <MPR Range>") == r"t1\_mpr \<MPR Range\>"
    assert plain("![x](http://host/a.png) $5 and $7\n# b") == r"\!\[x\](http\://host/a.png) \$5 and \$7 \# b"
    assert plain("Müller-Lüdenscheidt, 12.5 %") == "Müller-Lüdenscheidt, 12.5 %"
