"""The charts of the finance page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import altair as alt
import numpy as np
import pandas as pd

from apps.finance.features.schema import SECOND
from apps.finance.messages import Reason
from apps.finance.store import NOTHING, Case

COLOURS = {"this one": "#d62728", "fraud": "#ff7f0e", "genuine": "#2ca02c", "no label yet": "#7f7f7f"}


def reasons_chart(reasons: Sequence[Reason]) -> alt.Chart:
    """What raised the score, as bars in words."""
    table = pd.DataFrame({"reason": [r.text for r in reasons], "share": [r.contribution for r in reasons]})
    words = alt.Axis(title=None, labelLimit=480)
    chart: alt.Chart = (
        alt.Chart(table)
        .mark_bar(color=COLOURS["this one"])
        .encode(
            x=alt.X("share", title="raises the log-odds of fraud by"), y=alt.Y("reason", sort="-x", axis=words), tooltip=["reason", "share"]
        )
        .properties(height=50 + 32 * len(reasons))
    )
    return chart


def moment(time_us: int) -> datetime:
    """Event time as a date with time, UTC."""
    return datetime.fromtimestamp(time_us / SECOND, UTC)


def timeline_chart(cases: Sequence[Case], chosen: str, usual: float | None = None) -> alt.LayerChart | alt.FacetChart:
    """Amounts over event time with what is known of each; a line at the usual amount."""
    states = ["this one" if c.transaction.transaction_id == chosen else _state(c) for c in cases]
    table = pd.DataFrame(
        {
            "time": [moment(c.transaction.event_us) for c in cases],
            "amount": [c.transaction.amount_minor / 100 for c in cases],
            "state": states,
            "score": [c.transaction.score for c in cases],
            "card": [c.transaction.customer_id for c in cases],
            "terminal": [c.transaction.terminal_id for c in cases],
        }
    )
    colour = alt.Color(
        "state", scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())), legend=alt.Legend(orient="bottom", title=None)
    )
    points = (
        alt.Chart(table)
        .mark_circle(size=70, opacity=0.85)
        .encode(x=alt.X("time:T", title=None), y=alt.Y("amount", title="amount"), color=colour, tooltip=list(table.columns))
    )
    layers = [points]
    if usual is not None:
        line = pd.DataFrame({"amount": [usual]})
        layers.append(alt.Chart(line).mark_rule(strokeDash=[5, 4], color="#1f77b4").encode(y="amount", tooltip=alt.value("usual amount")))
    return alt.layer(*layers).properties(height=230)


def _state(case: Case) -> str:
    return "no label yet" if case.fraud is None else ("fraud" if case.fraud else "genuine")


def histogram_chart(scores: Sequence[float], threshold: float) -> alt.LayerChart | alt.FacetChart:
    """How many of the last transactions have which score, and the threshold."""
    edges = np.linspace(0, 1, 41)
    counts, _ = np.histogram(scores, edges)
    table = pd.DataFrame({"from": edges[:-1], "to": edges[1:], "transactions": counts + 0.5})
    bars = (
        alt.Chart(table)
        .mark_bar(color="#1f77b4")
        .encode(
            x=alt.X("from", title="score (probability of fraud)", scale=alt.Scale(domain=[0, 1])),
            x2="to",
            y=alt.Y("transactions", scale=alt.Scale(type="log", domainMin=0.5), title="transactions"),
            y2=alt.datum(0.5),
        )
    )
    layers = [bars]
    if threshold < NOTHING:
        rule = pd.DataFrame({"threshold": [threshold]})
        layers.append(alt.Chart(rule).mark_rule(color=COLOURS["this one"], size=2).encode(x="threshold", tooltip="threshold"))
    return alt.layer(*layers).properties(height=200)
