"""The charts of the station's page: control charts, and the scores that thresholds come from."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from apps.industrial.anomaly.calibration import Calibration
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


def scores_chart(good: Sequence[float], line: Sequence[float], calibration: Calibration, colours: dict[str, str]) -> alt.LayerChart:
    """Scores of the good parts that the thresholds come from, and of the last parts of the `line`, as shares, with the thresholds.

    What lies far above them stands at the right edge.
    """
    limits = {"review": calibration.review.value, "fail": calibration.fail.value}
    edge = limits["fail"] + 2 * max(1.0, limits["fail"] - min(good))
    table = pd.DataFrame(
        {
            "score": [min(score, edge) for score in (*good, *line)],
            "whose": ["good, as taught"] * len(good) + ["on the line"] * len(line),
            "share": [1 / len(good)] * len(good) + [1 / max(1, len(line))] * len(line),
        }
    )
    bars = alt.Chart(table).mark_bar(opacity=0.6)
    rules = alt.Chart(pd.DataFrame({"threshold": limits.keys(), "score": limits.values()})).mark_rule(size=2)
    shades = alt.Scale(domain=list(limits), range=[colours[name] for name in limits])
    return (
        alt.layer(
            bars.encode(
                x=alt.X("score:Q", bin=alt.Bin(maxbins=60), title=f"score ({edge:.1f} and above at the right edge)"),
                y=alt.Y("sum(share):Q", stack=None, title="share of the parts", axis=alt.Axis(format="%")),
                color=alt.Color("whose:N", scale=alt.Scale(range=["#1f77b4", "#7f7f7f"]), title="parts"),
            ),
            rules.encode(x="score:Q", color=alt.Color("threshold:N", scale=shades), tooltip=["threshold", "score"]),
        )
        .resolve_scale(color="independent")
        .properties(height=220)
    )
