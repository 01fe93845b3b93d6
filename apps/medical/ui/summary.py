"""The medical app in a few lines, for the start page."""

from __future__ import annotations

import streamlit as st

from apps.medical.store import DONE, RECEIVED, REFUSED
from apps.medical.ui.page import medical, waiting


def summary() -> None:
    """Counts and lag."""
    counts = medical()[0].store.counts()
    behind = waiting()
    for column, (label, value) in zip(
        st.columns(4),
        {
            "done": counts.get(DONE, 0),
            "refused": counts.get(REFUSED, 0),
            "received": counts.get(RECEIVED, 0),
            "waiting": "?" if behind is None else behind,
        }.items(),
        strict=True,
    ):
        column.metric(label, value)
