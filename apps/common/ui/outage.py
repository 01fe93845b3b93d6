"""What a page shows while the log, the database or the blobs do not answer."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import ParamSpec

import streamlit as st

from apps.common.ui.text import plain
from pipelines import UnavailableError

P = ParamSpec("P")
AGAIN_SECONDS = 3.0


def outage_said(draw: Callable[P, None]) -> Callable[P, None]:
    """`draw`, which says in its place what does not answer; for each part of a page and each fragment."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            draw(*args, **kwargs)
        except UnavailableError as error:
            st.error(f"Waiting: {plain(error)}")

    return drawn


def page_of(draw: Callable[[], None]) -> Callable[[], None]:
    """A page that says what does not answer where it can't be opened, and is drawn again until it can.

    Its parts say so themselves: Streamlit's browser side may fail for good ("'setIn' cannot be called on an ElementNode") where a
    whole page is drawn again and again beside fragments that run by themselves.
    """

    @functools.wraps(draw)
    def drawn() -> None:
        try:
            draw()
        except UnavailableError as error:
            st.error(f"Waiting: {plain(error)}")
            _again(time.monotonic())

    return drawn


@st.fragment(run_every=AGAIN_SECONDS)
def _again(since: float) -> None:
    st.caption(f"This page is drawn again every {AGAIN_SECONDS:.0f} s until it does; nothing that was sent is lost.")
    if time.monotonic() - since > AGAIN_SECONDS / 2:
        st.rerun()
