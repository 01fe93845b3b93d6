"""The finance app in a few lines, for the start page."""

from __future__ import annotations

import streamlit as st

from apps.finance.features.schema import DAY
from apps.finance.ui.page import finance, waiting


def summary() -> None:
    """Counts, today's alerts and lag."""
    store = finance()[0].store
    latest, behind = store.latest(), waiting()
    today = latest.event_us // DAY * DAY if latest else 0
    figures = {
        "decided": f"{store.total():,}",
        "alerts today": f"{store.alerts_between(today, today + DAY)} of {store.budget()}",
        "without a verdict": str(len(store.alerts(open_only=True))),
        "waiting": "?" if behind is None else f"{behind:,}",
    }
    for column, (label, value) in zip(st.columns(4), figures.items(), strict=True):
        column.metric(label, value)
