"""Workers and models on the start page."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import sqlalchemy as sa
import streamlit as st

from apps.common.database import open_database
from apps.common.settings import load_settings
from apps.common.workers import Worker
from shared_runtime.telemetry.metrics import ModelStatistics


@st.cache_resource
def database() -> sa.Engine:
    """The database of all apps."""
    return open_database(load_settings().settings.database_url)


def state_of(worker: Worker) -> str:
    """A worker in a line: whether it works, how fast, what waits, what went wrong."""
    report = worker.report
    if not worker.alive:
        return f":red[●] {worker.id}: silent for {worker.silent:.0f} s; look at its log, or start it again"
    parts = [f":green[●] {worker.id}", f"{report.per_second:.1f} a second", f"{report.handled} done since {worker.started[11:19]} UTC"]
    parts.append("the log does not answer" if report.lag is None else f"{report.lag} waiting")
    if report.dead:
        parts.append(f"{report.dead} in the dead letters")
    return " · ".join(parts)


def workers_of(group: str, running: Sequence[Worker]) -> None:
    """The workers of one app."""
    own = [worker for worker in running if worker.worker == group]
    for worker in own:
        st.caption(state_of(worker))
    if not own:
        st.caption(f"no {group} worker is running")


def models_of(running: Sequence[Worker]) -> None:
    """Every model that a living worker runs: its plan, and what its runs were like."""
    seen: dict[tuple[str, str], ModelStatistics] = {}
    for worker in running:
        for model in worker.report.models if worker.alive else ():
            best = seen.get((model.model, model.version))
            if best is None or model.runs > best.runs:
                seen[model.model, model.version] = model
    if not seen:
        return
    st.subheader("Models")
    rows = [
        {
            "model": f"{m.model} {m.version}",
            "plan": m.plan,
            "runs": m.runs,
            "rows a run": round(m.rows_a_run, 1),
            "ms a run": round(m.ms_a_run, 2),
            "batches released": ", ".join(f"{reason} {n}" for reason, n in sorted(m.released.items())) or "not batched",
        }
        for _, m in sorted(seen.items())
    ]
    st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch")
