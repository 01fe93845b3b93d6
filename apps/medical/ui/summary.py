"""The medical app in a few lines, for the start page."""

from __future__ import annotations

import streamlit as st

from apps.medical.messages import STUDIES
from apps.medical.store import DONE, RECEIVED, REFUSED
from apps.medical.ui.page import medical
from apps.medical.worker import GROUP


def summary() -> None:
    """Counts and lag."""
    service, log = medical()
    counts = service.store.counts()
    waiting = sum(log.lag(GROUP, STUDIES.name).values())
    for column, (label, value) in zip(
        st.columns(4),
        {"done": counts.get(DONE, 0), "refused": counts.get(REFUSED, 0), "received": counts.get(RECEIVED, 0), "waiting": waiting}.items(),
        strict=True,
    ):
        column.metric(label, value)
