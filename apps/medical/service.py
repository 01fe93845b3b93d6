"""The use cases of the medical app: take studies in, segment one, write what a clinician receives."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import Counter, Histogram
from pydicom.dataset import FileDataset

import shared_runtime as rt
from apps.common.blobs import BlobStore
from apps.common.logs import private
from apps.medical.dicom.files import Instances, add_instance, read_instances
from apps.medical.dicom.segmentation_object import write_segmentation
from apps.medical.dicom.series import Series, group_series, read_volume
from apps.medical.errors import InputError, MedicalError
from apps.medical.messages import RESULTS, STUDIES, ResultMessage, StudyMessage
from apps.medical.preview import write_preview
from apps.medical.segmentation.hippocampus import Segmentation, segment_hippocampi
from apps.medical.store import DONE, REFUSED, SETTLED, MedicalStore, Study
from apps.medical.volume import Volume, read_nifti, write_nifti
from pipelines import Log, PermanentError
from pipelines.messages import check_text

logger = logging.getLogger(__name__)
studies_total = Counter("triscope_medical_studies", "Studies by what became of them.", ("status",))
study_seconds = Histogram(
    "triscope_medical_study_seconds", "Time of a study that was segmented.", buckets=(0.5, 1, 2, 4, 8, 15, 30, 60, 120)
)
NIFTI_SUFFIXES = (".nii", ".nii.gz")
GIVEN_UP = "it could not be processed: "
"""How the reason begins of a study that was refused for no fault of its own: sent again, it is tried again."""
ZIP_DATE = (1980, 1, 1, 0, 0, 0)
Report = dict[str, Any]


@dataclass(frozen=True)
class Accepted:
    """What `receive` took in: ids of the studies, and what was passed over with the reason."""

    study_ids: list[str]
    skipped: list[tuple[str, str]]


def is_nifti(path: Path) -> bool:
    """Whether the name is that of a NIfTI file."""
    return path.is_file() and path.name.lower().endswith(NIFTI_SUFFIXES)


def read_input(path: Path, series_uid: str | None = None) -> tuple[Volume, list[str]]:
    """The volume at `path` (DICOM file, folder, zip; NIfTI) and notes on what was left aside.

    Of several DICOM series the largest regular MR volume is taken, or the one of `series_uid`.
    Raises InputError where there is none, with the reason of the best candidate.
    """
    if is_nifti(path):
        return read_nifti(path), []
    found = read_instances(path)
    candidates = [s for s in group_series(found.datasets) if series_uid in (None, s.uid)]
    damaged = [f"{name}: {why}" for name, why in found.skipped if why.startswith("damaged")]
    if not candidates:
        what = f"with SeriesInstanceUID {series_uid}" if series_uid else "of images"
        why = damaged[0] if damaged else f"{len(found.datasets)} DICOM objects, {len(found.skipped)} other files"
        raise InputError(f"{path} holds no DICOM series {what} ({why}); expected a T1 MR series or a NIfTI file")
    candidates.sort(key=lambda s: s.modality != "MR")
    notes, reasons = [f"passed over {d}" for d in damaged], []
    for position, series in enumerate(candidates):
        try:
            volume = read_volume(series)
        except InputError as error:
            reasons.append(str(error))
            continue
        left = [s.name for s in candidates[:position] + candidates[position + 1 :]]
        return volume, notes + [f"left aside {name}" for name in left] + [f"refused: {reason}" for reason in reasons]
    raise InputError(reasons[0])


def write_outputs(volume: Volume, result: Segmentation, session: rt.Session, read_seconds: float, notes: list[str], out: Path) -> Report:
    """Write `segmentation.nii.gz`, `segmentation.dcm` (for DICOM), `preview.png` and `report.json`; the report."""
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    model, flags = session.model, list(result.flags)
    write_nifti(result.labels, volume.affine, out / "segmentation.nii.gz")
    if volume.datasets:
        try:
            write_segmentation(result.labels, result.structures, volume, model.name, model.version, out / "segmentation.dcm")
        except MedicalError as error:
            flags.append(f"no DICOM SEG was written: {error}")
    write_preview(volume, result.labels, result.structures, out / "preview.png")
    seconds = {"read": read_seconds, **result.seconds, "write": time.monotonic() - start}
    report: Report = {
        "volumes_ml": {name: round(value, 4) for name, value in result.volumes_ml.items()},
        "flags": flags,
        "notes": notes,
        "quality": {name: round(value, 4) for name, value in result.quality.items()},
        "structures": [{"value": s.value, "name": s.name, "side": s.side, "colour": s.colour} for s in result.structures],
        "model": {"name": model.name, "version": model.version, "sha256": model.sha256},
        "plan": msgspec.to_builtins(session.plan),
        "image": {
            "shape": list(volume.voxels.shape),
            "spacing_mm": [round(s, 4) for s in volume.spacing_mm],
            "modality": volume.modality or "unknown",
            "format": "DICOM" if volume.datasets else "NIfTI",
        },
        "seconds": {name: round(value, 3) for name, value in seconds.items()} | {"total": round(sum(seconds.values()), 3)},
    }
    (out / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    return report


def segment_file(path: Path, session: rt.Session, out: Path, series_uid: str | None = None) -> Report:
    """Read, segment and write; the report. Raises InputError for input that can't be segmented."""
    start = time.monotonic()
    volume, notes = read_input(path, series_uid)
    with private(volume.patient):
        read_seconds = time.monotonic() - start
        return write_outputs(volume, segment_hippocampi(volume, session), session, read_seconds, notes, out)


def pack(datasets: Sequence[FileDataset]) -> bytes:
    """DICOM objects as a zip that depends on their content alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for dataset in sorted(datasets, key=lambda d: str(d.SOPInstanceUID)):
            part = io.BytesIO()
            dataset.save_as(part, enforce_file_format=True)
            archive.writestr(zipfile.ZipInfo(f"{dataset.SOPInstanceUID}.dcm", ZIP_DATE), part.getvalue(), zipfile.ZIP_DEFLATED, 1)
    return buffer.getvalue()


class MedicalService:
    """The use cases over a log, a store and blobs. `open_session` is called once, at the first study."""

    def __init__(self, log: Log, store: MedicalStore, blobs: BlobStore, open_session: Callable[[], rt.Session]) -> None:
        self._log, self.store, self.blobs = log, store, blobs
        self._open_session = open_session
        self._session: rt.Session | None = None
        self._lock = threading.Lock()

    def session(self) -> rt.Session:
        """The model's session, opened once."""
        with self._lock:
            if self._session is None:
                self._session = self._open_session()
            return self._session

    def receive(self, path: Path, source: str) -> Accepted:
        """Take in every series at `path` (or a NIfTI file): blob, store, `medical.studies`."""
        if is_nifti(path):
            content = path.read_bytes()
            blob = self.blobs.put(content)
            return Accepted([self._announce(blob.removeprefix("sha256:")[:32], blob, "nifti", source, "", path.name)], [])
        found = read_instances(path)
        accepted = self.receive_instances(found, source)
        if not accepted.study_ids:
            why = found.skipped[0] if found.skipped else ("", "no images among its objects")
            raise InputError(f"{path} holds no DICOM series of images ({' '.join(why).strip()}); expected a T1 MR series or a NIfTI file")
        return accepted

    def receive_instances(self, found: Instances, source: str) -> Accepted:
        """Take in parsed DICOM objects, a study a series."""
        return Accepted([self._receive_series(series, source) for series in group_series(found.datasets)], found.skipped)

    def _receive_series(self, series: Series, source: str) -> str:
        first = series.instances[0]
        patient = str(first.get("PatientName", "") or first.get("PatientID", "") or "")
        with private(patient, first.get("PatientID", "")):
            blob = self.blobs.put(pack(series.instances))
            return self._announce(series.identity, blob, "dicom", source, patient, str(first.get("SeriesDescription", "") or ""))

    def _announce(self, study_id: str, blob: str, format: str, source: str, patient: str, description: str) -> str:
        self.store.add(study_id, source=source, blob=blob, patient=patient, description=description)
        STUDIES.send(self._log, StudyMessage(study_id, blob, format, source), source=f"triscope/{source}")
        logger.info("study received", extra={"study_id": study_id, "source": source})
        return study_id

    def process(self, message: StudyMessage, traceparent: str = "") -> Study:
        """Segment one study, store the outcome and send it to `medical.results`.

        One that has an outcome is not done again, but its outcome is sent again: a worker may have ended between storing and
        sending it. Raises PermanentError for input that no retry mends.
        """
        check_text("study_id", message.study_id, least=1, most=64)
        check_text("blob", message.blob, least=1, most=80)
        known = self.store.find(message.study_id)
        if known is None:
            self.store.add(message.study_id, source=message.source, blob=message.blob)
        elif known.status in SETTLED and not known.reason.startswith(GIVEN_UP):
            logger.info("study is done already", extra={"study_id": message.study_id})
            return self._send_outcome(known, traceparent)
        start = time.monotonic()
        try:
            volume, notes = self._volume(message)
        except InputError as error:
            return self._refuse(message, str(error), traceparent)
        with private(volume.patient), tempfile.TemporaryDirectory(prefix="triscope-") as folder:
            session = self.session()
            try:
                result = segment_hippocampi(volume, session)
            except InputError as error:
                return self._refuse(message, str(error), traceparent, volume)
            report = write_outputs(volume, result, session, time.monotonic() - start - sum(result.seconds.values()), notes, Path(folder))
            files = {path.name: self.blobs.put(path.read_bytes()) for path in sorted(Path(folder).iterdir())}
            self.store.settle(
                message.study_id, DONE, report=report, files=files, patient=volume.patient or None, description=volume.description or None
            )
        studies_total.labels(DONE).inc()
        study_seconds.observe(report["seconds"]["total"])
        logger.info("study done", extra={"study_id": message.study_id, "seconds": report["seconds"]["total"]})
        return self._send_outcome(self.store.get(message.study_id), traceparent)

    def _send_outcome(self, study: Study, traceparent: str) -> Study:
        """Send the outcome of a study to `medical.results`. Raises PermanentError for one that was refused."""
        if study.status == REFUSED:
            answer = ResultMessage(study.study_id, REFUSED, "", reason=study.reason)
        else:
            report = study.report
            answer = ResultMessage(study.study_id, DONE, report["model"]["name"], report["volumes_ml"], report["flags"], "", study.files)
        RESULTS.send(self._log, answer, source="triscope/medical", traceparent=traceparent)
        if study.status == REFUSED:
            raise PermanentError(study.reason)
        return study

    def give_up(self, message: StudyMessage, reason: str, traceparent: str = "") -> None:
        """Settle a study that could not be processed for no fault of its own; sent again it is tried again."""
        known = self.store.find(message.study_id)
        if known is None:
            self.store.add(message.study_id, source=message.source, blob=message.blob)
        if known is None or known.status not in SETTLED:
            with contextlib.suppress(PermanentError):
                self._refuse(message, f"{GIVEN_UP}{reason}", traceparent)

    def _refuse(self, message: StudyMessage, reason: str, traceparent: str, volume: Volume | None = None) -> Study:
        patient = None if volume is None else volume.patient or None
        self.store.settle(message.study_id, REFUSED, reason=reason, patient=patient)
        studies_total.labels(REFUSED).inc()
        return self._send_outcome(self.store.get(message.study_id), traceparent)

    def _volume(self, message: StudyMessage) -> tuple[Volume, list[str]]:
        content = self.blobs.get(message.blob)
        if message.format == "nifti":
            with tempfile.TemporaryDirectory(prefix="triscope-") as folder:
                path = Path(folder) / ("image.nii.gz" if content[:2] == b"\x1f\x8b" else "image.nii")
                path.write_bytes(content)
                return read_nifti(path, "the NIfTI file"), []
        if message.format != "dicom":
            raise InputError(f"unknown format {message.format!r}; expected 'dicom' or 'nifti'")
        found = Instances()
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for member in archive.infolist():
                    add_instance(found, member.filename, archive.read(member))
        except zipfile.BadZipFile as error:
            raise InputError(f"the study's blob is no zip archive: {error}; send the study again") from error
        series = group_series(found.datasets)
        if len(series) != 1:
            raise InputError(f"the study's blob holds {len(series)} series of images; expected one")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # pydicom's remarks on values of foreign headers
            return read_volume(series[0]), []

    def volume_of(self, study: Study) -> Volume:
        """The image of a stored study."""
        return self._volume(StudyMessage(study.study_id, study.blob, _format_of(study), study.source))[0]


def _format_of(study: Study) -> str:
    return "nifti" if study.report.get("image", {}).get("format") == "NIfTI" else "dicom"
