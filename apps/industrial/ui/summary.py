"""The industrial app in a few lines, for the start page."""

from __future__ import annotations

import streamlit as st

from apps.industrial.ui.page import industrial, waiting


def summary() -> None:
    """Counts and lag."""
    counts = industrial()[0].store.counts()
    behind = waiting()
    figures = {"passed": counts.passed, "to review": counts.review, "failed": counts.failed, "waiting": "?" if behind is None else behind}
    for column, (label, value) in zip(st.columns(4), figures.items(), strict=True):
        column.metric(label, value)
