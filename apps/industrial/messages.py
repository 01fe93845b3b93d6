"""What the industrial app sends and receives: `industrial.frames` v1 and `industrial.verdicts` v1."""

from __future__ import annotations

import msgspec

from pipelines import Topic


class FrameMessage(msgspec.Struct, frozen=True):
    """A frame to judge. `blob` refers to the image as it was taken; `serial`: the part's number, where it has one."""

    frame_id: str
    event_time: str
    station: str
    recipe: str
    blob: str
    serial: str = ""
    lot: str = ""


class BoxMessage(msgspec.Struct, frozen=True):
    """A place on the part, in pixels."""

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float


class VerdictMessage(msgspec.Struct, frozen=True):
    """What the inspector said of a frame: verdict "pass", "review" or "fail"."""

    frame_id: str
    event_time: str
    station: str
    recipe: str
    verdict: str
    score: float
    reasons: list[str]
    boxes: list[BoxMessage] = []
    kind: str = ""
    serial: str = ""
    lot: str = ""
    blob: str = ""
    overlay: str = ""
    model: str = ""
    ms: float = 0.0


FRAMES = Topic("industrial.frames", FrameMessage, key="station")
VERDICTS = Topic("industrial.verdicts", VerdictMessage, key="station")
TOPICS = (FRAMES, VERDICTS)
