"""A live table whose selection is bound to the row's id.

Streamlit's own table binds it to the row's position: a new row on top then puts another case under an
operator's hand. Here the browser sends the id of the row that was clicked, and rows are matched by id
when the table changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import streamlit as st

HTML = """<div class="worklist" role="grid" tabindex="0"><table><thead></thead><tbody></tbody></table></div>
<div class="held" role="status"></div>"""
CSS = """
.worklist { max-height: 420px; overflow: auto; border: 1px solid var(--st-border-color, #8884); border-radius: 8px; outline: none; }
.worklist:focus-visible { border-color: var(--st-primary-color); }
table { width: 100%; border-collapse: collapse; font: 14px var(--st-font, sans-serif); color: var(--st-text-color); }
.held { min-height: 1.4em; font: 13px var(--st-font, sans-serif); color: var(--st-text-color); opacity: 0.75; }
th { position: sticky; top: 0; text-align: left; padding: 6px 10px; background: var(--st-secondary-background-color); font-weight: 600; }
td { padding: 6px 10px; border-top: 1px solid var(--st-border-color, #8883); white-space: nowrap; max-width: 420px;
     overflow: hidden; text-overflow: ellipsis; }
tbody tr { cursor: pointer; }
tbody tr:hover { background: color-mix(in srgb, var(--st-primary-color) 10%, transparent); }
tbody tr[aria-selected="true"] { background: color-mix(in srgb, var(--st-primary-color) 25%, transparent); }
tr.warn td:first-child { box-shadow: inset 4px 0 #d97706; }
tr.bad td:first-child { box-shadow: inset 4px 0 #dc2626; }
tr.good td:first-child { box-shadow: inset 4px 0 #16a34a; }
"""
JS = """
export default function ({ data, parentElement, setStateValue }) {
  const body = parentElement.querySelector("tbody"), head = parentElement.querySelector("thead");
  const box = parentElement.querySelector(".worklist");
  const row = (cells, tag) => {
    const tr = document.createElement("tr");
    for (const text of cells) { const c = document.createElement(tag); c.textContent = text; c.title = text; tr.append(c); }
    return tr;
  };
  head.replaceChildren(row(data.columns, "th"));
  const held = parentElement.querySelector(".held");
  const show = (items) => {
    const known = new Map([...body.children].map((tr) => [tr.dataset.id, tr]));
    body.replaceChildren(...items.map((item) => {
      const text = item.cells.join("\\u0001"), old = known.get(item.id);
      const tr = old && old.dataset.text === text ? old : row(item.cells, "td");
      tr.dataset.id = item.id;
      tr.dataset.text = text;
      tr.className = item.tone;
      tr.setAttribute("role", "row");
      return tr;
    }));
    mark(box.dataset.selected);
  };
  // Under the pointer rows keep their places: what is new waits until the pointer has left.
  const place = () => {
    const items = box.latestRows, shown = [...body.children].map((tr) => tr.dataset.id);
    if (!box.matches(":hover") || !shown.length) { show(items); held.textContent = ""; return; }
    const fresh = new Map(items.map((item) => [item.id, item]));
    const kept = shown.map((id) => fresh.get(id) ?? box.shownRows.get(id));
    const waiting = items.filter((item) => !shown.includes(item.id)).length;
    show(kept);
    held.textContent = waiting ? `${waiting} new; shown when the pointer leaves the list` : "";
  };
  const mark = (id) => { for (const tr of body.children) tr.setAttribute("aria-selected", String(tr.dataset.id === id)); };
  const choose = (id) => { box.dataset.selected = id; mark(id); setStateValue("selected", id); };
  box.dataset.selected = data.selected ?? "";
  box.shownRows = new Map([...(box.shownRows ?? []), ...(box.latestRows ?? []).map((item) => [item.id, item])]);
  box.latestRows = data.rows;
  place();
  box.onpointerleave = () => { box.shownRows = new Map(); requestAnimationFrame(place); };
  body.onclick = (event) => { const tr = event.target.closest("tr"); if (tr) choose(tr.dataset.id); };
  box.onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const all = [...body.children], at = all.findIndex((tr) => tr.getAttribute("aria-selected") === "true");
    const next = all[Math.min(all.length - 1, Math.max(0, at + step))];
    if (next) { next.scrollIntoView({ block: "nearest" }); choose(next.dataset.id); }
  };
}
"""


@dataclass(frozen=True)
class Row:
    """One row: its id, the text of its cells, and a tone ("good", "warn", "bad" or empty)."""

    id: str
    cells: tuple[str, ...]
    tone: str = ""


def worklist(columns: Sequence[str], rows: Sequence[Row], key: str) -> str | None:
    """Draw the table; the id of the chosen row, or None. A chosen row that left the table is no choice."""
    state = st.session_state.get(key)
    selected = state.get("selected") if state else None
    known = {row.id for row in rows}
    component = st.components.v2.component("triscope_worklist", html=HTML, css=CSS, js=JS)
    result = component(
        data={
            "columns": list(columns),
            "rows": [{"id": row.id, "cells": list(row.cells), "tone": row.tone} for row in rows],
            "selected": selected,
        },
        key=key,
        default={"selected": None},
        on_selected_change=lambda: None,
    )
    chosen = result.get("selected") if result else None
    return chosen if chosen in known else None
