"""The medical page: the worklist, and the chosen study with viewer, volumes, report and downloads."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import streamlit as st

from apps.common.blobs import BlobsUnavailableError
from apps.common.errors import BlobError
from apps.common.settings import load_settings
from apps.common.ui.outage import outage_said, page_of
from apps.common.ui.text import plain
from apps.common.ui.worklist import Row, worklist
from apps.medical.bootstrap import open_medical
from apps.medical.errors import MedicalError
from apps.medical.messages import STUDIES
from apps.medical.service import MedicalService
from apps.medical.store import DONE, RECEIVED, REFUSED, Study
from apps.medical.ui.viewer import viewer, viewer_data
from apps.medical.worker import GROUP
from pipelines import Log, PipelineError

COLUMNS = ("Status", "Patient", "Description", "Received", "Left mL", "Right mL", "Flags")
DOWNLOADS = {
    "segmentation.dcm": ("DICOM SEG", "application/dicom"),
    "segmentation.nii.gz": ("NIfTI", "application/gzip"),
    "report.json": ("Report", "application/json"),
    "preview.png": ("Preview", "image/png"),
}


@st.cache_resource
def medical() -> tuple[MedicalService, Log]:
    """The service and its log, opened once a server."""
    return open_medical(load_settings().settings)


@st.cache_data(ttl=3.0, show_spinner=False)
def waiting() -> int | None:
    """Studies in the log that no worker has settled; None while the log does not answer."""
    try:
        return sum(medical()[1].lag(GROUP, STUDIES.name).values())
    except PipelineError:
        return None


def tone(study: Study) -> str:
    """How a row is marked: good, warn (flags) or bad (refused)."""
    if study.status == REFUSED:
        return "bad"
    return "" if study.status == RECEIVED else ("warn" if study.report.get("flags") else "good")


def row(study: Study) -> Row:
    """A study as a row of the worklist."""
    volumes = study.report.get("volumes_ml", {})
    sides = [f"{volumes[name]:.2f}" if name in volumes else "" for name in ("left hippocampus", "right hippocampus")]
    if not any(sides) and "hippocampus" in volumes:
        sides = [f"{volumes['hippocampus']:.2f} (crop)", ""]
    flags = study.reason or "; ".join(study.report.get("flags", []))
    received = study.received[:19].replace("T", " ")
    return Row(study.study_id, (study.status, study.patient or "-", study.description or "-", received, *sides, flags or "-"), tone(study))


@st.fragment(run_every=2.0)
@outage_said
def studies() -> None:
    """The live worklist; a new choice redraws the page."""
    service, _ = medical()
    latest = service.store.latest()
    counts = service.store.counts()
    behind = waiting()
    state = "the log does not answer" if behind is None else f"{behind} waiting in the log"
    st.caption(f"{counts.get(DONE, 0)} done, {counts.get(REFUSED, 0)} refused, {counts.get(RECEIVED, 0)} received; {state}")
    if not latest:
        st.info("No study yet. Send one by C-STORE to `triscope medical listen`, or run `triscope medical submit FOLDER`.")
        return
    chosen = worklist(COLUMNS, [row(s) for s in latest], key="medical_worklist")
    if chosen and chosen != st.session_state.get("medical_study"):
        st.session_state["medical_study"] = chosen
        st.rerun()


@st.cache_data(max_entries=4, show_spinner="Loading the volume ...")
def picture(study_id: str, updated: str) -> bytes:
    """The viewer's bytes of a finished study."""
    service, _ = medical()
    study = service.store.get(study_id)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "labels.nii.gz"
        file.write_bytes(service.blobs.get(study.files["segmentation.nii.gz"]))
        labels = np.asanyarray(nib.load(file).dataobj).astype(np.uint8)
    return viewer_data(service.volume_of(study), labels, study.report["structures"])


def detail(study: Study) -> None:
    """The chosen study."""
    st.subheader(plain(study.description) or "Study")
    st.caption(f"{plain(study.patient) or 'no patient name'} · {study.study_id} · from {plain(study.source)} · trace {study.trace_id[:8]}")
    if study.status == REFUSED:
        st.error(f"Refused: {plain(study.reason)}")
        return
    if study.status != DONE:
        st.info("Received; a worker will segment it.")
        return
    for flag in study.report["flags"]:
        st.warning(plain(flag))
    shown = [name for name in study.report["volumes_ml"] if name.endswith("hippocampus")]
    whole = [name for name in ("left hippocampus", "right hippocampus", "hippocampus") if name in shown]
    for column, name in zip(st.columns(len(whole)), whole, strict=True):
        side = name.split(" ")[0] if " " in name else ""
        parts = {p: study.report["volumes_ml"].get(f"{side} {p} hippocampus".strip(), 0.0) for p in ("anterior", "posterior")}
        column.metric(name.capitalize(), f"{study.report['volumes_ml'][name]:.2f} mL")
        column.caption(f"anterior {parts['anterior']:.2f} mL, posterior {parts['posterior']:.2f} mL")
    viewer(picture(study.study_id, study.updated), key=f"viewer_{study.study_id}")
    st.caption("Wheel: scroll. Drag: crosshair. Right drag: window/level. Arrow keys: scroll. O: overlay on or off.")
    columns = st.columns(len(DOWNLOADS))
    service, _ = medical()
    for column, (name, (label, kind)) in zip(columns, DOWNLOADS.items(), strict=True):
        if name in study.files:
            content = io.BytesIO(service.blobs.get(study.files[name]))
            column.download_button(label, content, file_name=f"{study.study_id}_{name}", mime=kind, key=f"get_{name}_{study.study_id}")
    with st.expander("Report"):
        st.json(study.report, expanded=1)


@outage_said
def chosen_study() -> None:
    """The study that was chosen, or the newest that is done."""
    study_id = st.session_state.get("medical_study")
    if not study_id:
        latest = medical()[0].store.latest(1)
        study_id = latest[0].study_id if latest and latest[0].status != RECEIVED else None
    if study_id:
        try:
            detail(medical()[0].store.get(study_id))
        except BlobsUnavailableError:
            raise
        except (MedicalError, BlobError) as error:
            st.error(plain(error))


@page_of
def page() -> None:
    """The whole page."""
    st.title("Medical")
    st.caption("Measurements by a model, for review by a clinician; not a diagnosis.")
    medical()
    studies()
    chosen_study()
