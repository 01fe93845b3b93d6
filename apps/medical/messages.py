"""What the medical app sends and receives: `medical.studies` v1 and `medical.results` v1."""

from __future__ import annotations

import msgspec

from pipelines import Topic


class StudyMessage(msgspec.Struct, frozen=True):
    """A volume to segment. `blob` refers to a zip of DICOM files or one NIfTI file."""

    study_id: str
    blob: str
    format: str = "dicom"
    source: str = "unknown"


class ResultMessage(msgspec.Struct, frozen=True):
    """What became of a study: `status` is "done" or "refused"; `files` refers to the outputs by name."""

    study_id: str
    status: str
    model: str
    volumes_ml: dict[str, float] = {}
    flags: list[str] = []
    reason: str = ""
    files: dict[str, str] = {}


STUDIES = Topic("medical.studies", StudyMessage, key="study_id")
RESULTS = Topic("medical.results", ResultMessage, key="study_id")
TOPICS = (STUDIES, RESULTS)
