"""The control charts of the station's page."""

from __future__ import annotations

import altair as alt
import pandas as pd

from apps.industrial.spc import Chart


def control_chart(chart: Chart, title: str) -> alt.LayerChart | alt.FacetChart:
    """Points, centre line, limits; points that break a rule in red, the rule in words under the pointer."""
    words: dict[int, list[str]] = {}
    for position, rule in chart.alarms:
        words.setdefault(position, []).append(rule)
    table = pd.DataFrame(
        {
            "group": range(1, len(chart.values) + 1),
            "value": chart.values,
            "lower": chart.lower,
            "upper": chart.upper,
            "centre": chart.centre,
            "rule": ["; ".join(words.get(i, ["in control"])) for i in range(len(chart.values))],
            "state": ["alarm" if i in words else "in control" for i in range(len(chart.values))],
        }
    )
    base = alt.Chart(table).encode(x=alt.X("group:Q", title="group of 25 parts", axis=alt.Axis(tickMinStep=1)))
    colour = alt.Color("state", scale=alt.Scale(domain=["in control", "alarm"], range=["#1f77b4", "#d62728"]), legend=None)
    return alt.layer(
        base.mark_line(color="#1f77b4").encode(y=alt.Y("value:Q", title=title)),
        base.mark_line(color="#7f7f7f").encode(y="centre:Q"),
        base.mark_line(color="#d62728", strokeDash=[5, 4]).encode(y="upper:Q"),
        base.mark_line(color="#d62728", strokeDash=[5, 4]).encode(y="lower:Q"),
        base.mark_circle(size=70).encode(y="value:Q", color=colour, tooltip=["group", "value", "rule"]),
    ).properties(height=200)
