"""The pages of all apps, served together: `triscope demo` and `triscope medical ui` run this file."""

from __future__ import annotations

import streamlit as st
from PIL import Image, ImageDraw

from apps.common.ui.outage import outage_said
from apps.common.ui.workers import database, models_of, workers_of
from apps.common.workers import known_workers
from apps.finance.ui.page import page as finance_page
from apps.finance.ui.summary import summary as finance_summary
from apps.finance.worker import GROUP as FINANCE
from apps.industrial.ui.page import page as industrial_page
from apps.industrial.ui.summary import summary as industrial_summary
from apps.industrial.worker import GROUP as INDUSTRIAL
from apps.medical.ui.page import page as medical_page
from apps.medical.ui.summary import summary as medical_summary
from apps.medical.worker import GROUP as MEDICAL

APPS = (
    ("Medical", MEDICAL, medical_summary),
    ("Finance", FINANCE, finance_summary),
    ("Industrial", INDUSTRIAL, industrial_summary),
)


@st.fragment(run_every=2.0)
@outage_said
def overview() -> None:
    """What each app has done."""
    running = known_workers(database())
    for title, group, summary in APPS:
        st.subheader(title)
        summary()
        workers_of(group, running)
    models_of(running)


def icon() -> Image.Image:
    """Three rings; drawn here, because a named icon would be fetched from outside."""
    image = Image.new("RGBA", (64, 64))
    pen = ImageDraw.Draw(image)
    for inset, colour in ((4, "#1f77b4"), (16, "#f28e2b"), (26, "#1f77b4")):
        pen.ellipse((inset, inset, 63 - inset, 63 - inset), outline=colour, width=6)
    return image


def start() -> None:
    """The start page."""
    st.title("Triscope")
    st.write("For people who look for the rare thing that matters.")
    overview()
    st.page_link(PAGES[1], label="Open the medical page", icon=":material/neurology:")
    st.page_link(PAGES[2], label="Open the finance page", icon=":material/credit_card:")
    st.page_link(PAGES[3], label="Open the industrial page", icon=":material/precision_manufacturing:")


PAGES = [
    st.Page(start, title="Start", icon=":material/home:", default=True),
    st.Page(medical_page, title="Medical", icon=":material/neurology:", url_path="medical"),
    st.Page(finance_page, title="Finance", icon=":material/credit_card:", url_path="finance"),
    st.Page(industrial_page, title="Industrial", icon=":material/precision_manufacturing:", url_path="industrial"),
]
st.set_page_config(page_title="Triscope", page_icon=icon(), layout="wide")
st.navigation(PAGES, position="top").run()
