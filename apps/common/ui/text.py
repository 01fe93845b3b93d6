"""Data in texts that Streamlit takes as Markdown."""

from __future__ import annotations

import re

MARKS = re.compile(r"([\\`*_\[\]<>$:~|#!&])")


def plain(text: object) -> str:
    """`text` as it stands: a series named `t1 <MPR Range>` keeps its name, and no identifier becomes a picture or a formula."""
    return MARKS.sub(r"\\\1", str(text)).replace("\n", " ")
