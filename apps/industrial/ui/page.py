"""The station's page: the part with its defect map, the lamp, the lot, the review queue, control charts, teaching."""

from __future__ import annotations

import getpass
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import streamlit as st

from apps.common.errors import BlobError
from apps.common.settings import load_settings
from apps.common.ui.outage import outage_said, page_of
from apps.common.ui.text import plain
from apps.common.ui.workers import database, workers_of
from apps.common.ui.worklist import Row, worklist
from apps.common.workers import known_workers
from apps.industrial.anomaly.calibration import LEAST_RATE, MOST_RATE, Rates
from apps.industrial.bootstrap import open_industrial
from apps.industrial.errors import InputError
from apps.industrial.evaluation.dataset import Sample
from apps.industrial.learning import Report
from apps.industrial.messages import FRAMES
from apps.industrial.service import IndustrialService
from apps.industrial.spc import p_chart, score_chart
from apps.industrial.store import DEFECT, GOOD, Part
from apps.industrial.teaching import Taught, advice
from apps.industrial.ui.charts import control_chart, scores_chart
from apps.industrial.ui.job import Teaching, TeachingJobs, new_folder
from apps.industrial.worker import GROUP
from pipelines import Log, PipelineError
from pipelines.messages import parse_rfc3339

COLUMNS = ("Verdict", "Score", "Part", "Kind", "Time (UTC)", "Operator", "Reason")
COLOURS = {"pass": "#15803d", "review": "#d97706", "fail": "#b91c1c"}
TONES = {"pass": "good", "review": "warn", "fail": "bad"}
GROUP_SIZE = 25
LARGE = 520
"""Pixels of the large picture."""
SILENT_SECONDS = 5.0
"""While frames wait and none was judged for so long, the lamp shows no verdict."""
CHOSEN = "Chosen part"
TABS = ("Review queue", CHOSEN, "Control charts", "Thresholds", "Teach")


@st.cache_resource
def industrial() -> tuple[IndustrialService, Log]:
    """The service and its log, opened once a server."""
    return open_industrial(load_settings().settings)


@st.cache_resource
def jobs() -> TeachingJobs:
    """The teachings of this server."""
    return TeachingJobs()


@st.cache_data(ttl=3.0, show_spinner=False)
def waiting() -> int | None:
    """Frames in the log that no worker has judged; None while the log does not answer."""
    try:
        return sum(industrial()[1].lag(GROUP, FRAMES.name).values())
    except PipelineError:
        return None


@st.cache_data(max_entries=64, show_spinner=False)
def picture(frame_id: str, reference: str) -> bytes:
    """A part's picture."""
    return industrial()[0].blobs.get(reference)


def row(part: Part) -> Row:
    """A part as a row; its id is the frame's."""
    v = part.verdict
    cells = (v.verdict.upper(), f"{v.score:.2f}", v.serial or v.frame_id[:8], v.kind or "-", v.event_time[:19].replace("T", " "))
    return Row(v.frame_id, (*cells, part.judged or "-", v.reasons[0] if v.reasons else "-"), TONES[v.verdict])


def silent(newest: str, behind: int | None) -> float:
    """Seconds since this page saw a new verdict, of whatever recipe, while frames wait or the log does not answer; otherwise 0."""
    state, now = st.session_state, time.monotonic()
    if behind == 0 or state.get("industrial_newest", ("",))[0] != newest:
        state["industrial_newest"] = (newest, now)
    return now - float(state["industrial_newest"][1])


def lamp(part: Part, silence: float, behind: int | None) -> None:
    """PASS, REVIEW or FAIL, to be read from three metres; grey while the station does not judge what waits."""
    v = part.verdict
    word, colour = (v.verdict.upper(), COLOURS[v.verdict]) if silence < SILENT_SECONDS else ("NO VERDICT", "#6b7280")
    st.markdown(
        f'<div role="status" aria-label="verdict" style="background:{colour};color:white;border-radius:12px;padding:18px;'
        f'text-align:center;font-size:84px;font-weight:800;line-height:1.1">{word}</div>',
        unsafe_allow_html=True,
    )
    if silence >= SILENT_SECONDS:
        what = "The log does not answer" if behind is None else f"{behind} frames wait"
        st.error(f"{what}, and none was judged for {silence:.0f} s. Is `triscope industrial station` running? The last part it judged:")
    st.markdown(f"**Part {plain(v.serial or v.frame_id[:8])}** · score {v.score:.2f} · {v.ms:.0f} ms")
    for reason in v.reasons:
        st.caption(plain(reason))
    if v.kind:
        st.caption(f"looks like: {plain(v.kind)}")


@st.fragment(run_every=1.0)
@outage_said
def live(recipe: str) -> None:
    """The newest part and the last twenty; a choice shows that part below."""
    service, _ = industrial()
    parts = service.store.latest(20, recipe=recipe)
    if not parts:
        st.info(
            f"No part yet. Start `triscope industrial station`, and send frames with `triscope industrial feed SOURCE --recipe {recipe}`."
        )
        return
    newest, behind = parts[0], waiting()
    last = service.store.latest(1)[0].verdict
    silence = silent(last.frame_id, behind)
    counts = service.store.counts(recipe, newest.verdict.lot or None)
    left, right = st.columns([2, 3])
    with left:
        show(newest)
    with right:
        lamp(newest, silence, behind)
        figures = {
            "parts": str(counts.total),
            "yield": f"{counts.passed / counts.total:.1%}" if counts.total else "-",
            "to review": str(counts.review),
            "failed": str(counts.failed),
            "waiting": "?" if behind is None else str(behind),
        }
        for column, (label, value) in zip(st.columns(len(figures)), figures.items(), strict=True):
            column.metric(label, value)
        st.caption(f"lot {plain(newest.verdict.lot)}" if newest.verdict.lot else "all parts of this recipe")
        if last.recipe != recipe:
            st.warning(f"The newest part on the line is of recipe {last.recipe}.")
        workers_of(GROUP, known_workers(database()))
    for row_of_parts in (parts[:10], parts[10:]):
        for column, part in zip(st.columns(10), row_of_parts, strict=False):
            with column:
                show(part, small=True)
    chosen = worklist(COLUMNS, [row(part) for part in parts], key="industrial_worklist")
    if chosen and chosen != st.session_state.get("industrial_part"):
        st.session_state["industrial_part"] = chosen
        st.session_state["industrial_tab"] = CHOSEN
        st.rerun()


def show(part: Part, *, small: bool = False) -> None:
    """A part's picture, or why there is none."""
    width: Literal["stretch"] | int = "stretch" if small else LARGE
    reference = part.verdict.overlay or part.verdict.blob
    caption = f"{part.verdict.verdict} {plain(part.verdict.serial)}" if small else None
    if not reference:
        st.caption(f"{caption or part.verdict.verdict}: its picture is not kept any more")
        return
    try:
        st.image(picture(part.verdict.frame_id, reference), caption=caption, width=width)
    except BlobError as error:
        st.error(plain(error))


def decision(part: Part, key: str) -> None:
    """The operator confirms or overrules."""
    v = part.verdict
    show(part)
    st.markdown(f"**{v.verdict.upper()}**, score {v.score:.2f}: {plain('; '.join(v.reasons)) or 'nothing stands out'}")
    if part.judged:
        st.success(f"{part.judged}, says {part.judged_by}" + (f": {plain(part.note)}" if part.note else ""))
    note = st.text_input("Note", key=f"note_{key}_{v.frame_id}", max_chars=500)
    good, bad = st.columns(2)
    for column, word, label in ((good, GOOD, "The part is good"), (bad, DEFECT, "It has a defect")):
        if column.button(label, key=f"{word}_{key}_{v.frame_id}", width="stretch"):
            industrial()[0].judge(v.frame_id, word, getpass.getuser(), note)
            st.rerun()


@st.fragment(run_every=2.0)
@outage_said
def review() -> None:
    """Parts that wait for a person. The part that is shown stays until it is decided, whatever joins the queue."""
    store = industrial()[0].store
    queue = store.to_review()
    if not queue:
        st.info("Nothing waits for a look.")
        return
    shown = next((part for part in queue if part.verdict.frame_id == st.session_state.get("industrial_queue")), queue[0])
    st.session_state["industrial_queue"] = shown.verdict.frame_id
    st.caption(
        f"{store.undecided()} parts wait. What you decide joins the recipe's next teaching: press Teach when some have come together."
    )
    st.markdown(f"Part **{plain(shown.verdict.serial or shown.verdict.frame_id[:8])}** · recipe {shown.verdict.recipe}")
    decision(shown, "queue")


@outage_said
def chosen_part() -> None:
    """The part that was chosen."""
    frame = st.session_state.get("industrial_part")
    part = industrial()[0].store.find(frame) if frame else None
    if part:
        decision(part, "chosen")
    else:
        st.caption("Choose a part in the list.")


@outage_said
def charts(recipe: str) -> None:
    """Control charts of the reject rate and of the score."""
    series = industrial()[0].store.series(recipe)
    if len(series) < 2 * GROUP_SIZE:
        st.info(f"{len(series)} parts so far; the charts begin at {2 * GROUP_SIZE}.")
        return
    rejects, scores = p_chart([v != "pass" for _, v, _ in series]), score_chart([s for _, _, s in series])
    for chart, title in ((rejects, "share not passed"), (scores, "mean score")):
        st.altair_chart(control_chart(chart, title), width="stretch")
        for position, rule in chart.alarms[-3:]:
            st.warning(f"{title}: group {position + 1}: {rule}")


@outage_said
def thresholds(recipe: str) -> None:
    """Where REVIEW and FAIL begin, by the shares of good parts that may lie above."""
    service, _ = industrial()
    scores, facts = service.recipes.scores(recipe), service.recipes.facts(recipe)
    if not len(scores):
        st.info("This recipe kept no scores of its good parts, as an earlier version taught it. Teach it again to move its thresholds.")
        return
    found, rates, taught = facts.calibration, facts.rates, parse_rfc3339(facts.taught)
    since = [score for taken, _, score in service.store.series(recipe) if parse_rfc3339(taken) >= taught]
    st.altair_chart(scores_chart(scores.tolist(), since, found, COLOURS), width="stretch")
    for word, threshold in (("REVIEW or FAIL", found.review), ("FAIL", found.fail)):
        low, high = (f"{100 * share:.1f}" for share in threshold.interval)
        expected = f"{100 * threshold.expected:.1f} % ({low} to {high} %)"
        st.caption(f"{word} above {threshold.value:.2f}: {expected} of good parts are expected there.")
    with st.form(f"thresholds_{recipe}_{rates.review}_{rates.fail}", border=False):
        left, right = st.columns(2)
        bounds = 100 * LEAST_RATE, 100 * MOST_RATE
        review = left.number_input("Good parts that may be looked at [%]", *bounds, 100 * rates.review, 0.5, format="%.2f")
        fail = right.number_input("Good parts that may fail [%]", *bounds, 100 * rates.fail, 0.5, format="%.2f")
        if st.form_submit_button("Move the thresholds"):
            try:
                service.set_rates(recipe, Rates(review / 100, fail / 100), getpass.getuser())
            except InputError as error:
                st.error(plain(error))
            else:
                st.rerun()


@outage_said
def teaching(recipe: str | None) -> None:
    """Teach a recipe from images that are dragged in."""
    service, _ = industrial()
    if recipe:
        st.caption(f"Recipe {recipe}: {service.advice(recipe)}.")
    with st.form("industrial_teach"):
        name = st.text_input("Name of the recipe", value=recipe or "", max_chars=63)
        good = st.file_uploader("Images of good parts (30 or more)", accept_multiple_files=True)
        bad = st.file_uploader("Images of defective parts (none are needed; five are a start)", accept_multiple_files=True)
        judged = st.checkbox("Add the parts that were judged on this page", value=True)
        again = st.checkbox("Add the images that the recipe was taught from before", value=True)
        if not st.form_submit_button("Teach", type="primary"):
            return
    folder = new_folder()
    samples, defects = _saved(good or [], folder, GOOD), _saved(bad or [], folder, DEFECT)
    actor = getpass.getuser()

    def work(folder: Path, report: Report) -> Taught:
        more_good, more_bad = service.learned_from_line(name, folder) if judged and name in service.recipes.names() else ([], [])
        taught = service.teach(name, samples + more_good, defects + more_bad, again=again, actor=actor, report=report)
        # This server keeps what was taught until the next teaching; the images lie with the recipe.
        return replace(taught, recipe=replace(taught.recipe, images=()))

    try:
        jobs().start(Teaching(name), folder, work)
    except InputError as error:
        st.error(plain(error))


@st.fragment(run_every=1.0)
@outage_said
def taught() -> None:
    """How far the teaching is, and what came of it."""
    job = jobs().latest
    if job is None:
        return
    if job.running:
        st.progress(job.share, f"Recipe {job.recipe}: {job.step} {job.share:.0%}. The page stays live; you may leave it.")
        return
    if job.taught is None:
        st.error(f"Recipe {job.recipe} was not taught: {plain(job.error)}")
        return
    facts = job.taught.recipe.facts
    expected = f"{100 * facts.calibration.fail.expected:.1f} % of good parts are expected to fail"
    st.success(f"Recipe {job.recipe}: {facts.good} good parts, {facts.defects} defects; {expected}. {advice(facts.good, facts.defects)}.")
    for outlier in job.taught.outliers:
        st.warning(f"stands apart: {plain(outlier)}")
    for left_out, why in job.taught.skipped:
        st.warning(f"left out: {plain(left_out)}: {plain(why)}")
    for warning in facts.warnings:
        st.warning(warning)
    if st.session_state.get("industrial_taught") is not job:  # once: the list of recipes has a new one
        st.session_state["industrial_taught"] = job
        st.rerun()


def _saved(files: Sequence[Any], folder: Path, kind: str) -> list[Sample]:
    samples = []
    for number, file in enumerate(files):
        path = folder / f"{kind}-{number:05d}.img"
        path.write_bytes(file.getvalue())
        samples.append(Sample(path, kind, called=file.name))
    return samples


@page_of
def page() -> None:
    """The whole page."""
    st.title("Industrial")
    service, _ = industrial()
    names = service.recipes.names()
    if names:
        recipe = st.selectbox("Recipe", names, key="industrial_recipe")
        live(recipe)
    else:
        st.info("No recipe yet. Teach one below from images of good parts, or with `triscope industrial teach --good DIR --recipe NAME`.")
    queue, chosen, control, limits, learn = st.tabs(TABS, key="industrial_tab", on_change="rerun")
    with queue:
        review()
    with chosen:
        chosen_part()
    with control:
        if names:
            charts(recipe)
    with limits:
        if names:
            thresholds(recipe)
    with learn:
        teaching(recipe if names else None)
        taught()
