"""The use cases of the industrial app: teach a recipe, take frames in, judge them, take the operator's decisions."""

from __future__ import annotations

import logging
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prometheus_client import Counter, Histogram

import shared_runtime as rt
from apps.common.blobs import BlobStore, BlobsUnavailableError
from apps.common.errors import BlobError
from apps.industrial.anomaly.calibration import USUAL, Rates
from apps.industrial.errors import IndustrialError, InputError
from apps.industrial.evaluation.dataset import Sample
from apps.industrial.images import decode_image, png
from apps.industrial.inspection.inspector import PASS, Inspection, Inspector, overlay
from apps.industrial.inspection.recipe import Facts, RecipeBook, checked_name
from apps.industrial.inspection.taught_images import TaughtImage
from apps.industrial.learning import Report
from apps.industrial.messages import FRAMES, VERDICTS, BoxMessage, FrameMessage, VerdictMessage
from apps.industrial.store import DEFECT, GOOD, IndustrialStore, Part
from apps.industrial.teaching import Taught, advice, teach
from pipelines import Log, PermanentError
from pipelines.messages import check_text, now_rfc3339, parse_rfc3339
from pipelines.patience import patiently

logger = logging.getLogger(__name__)
judged_total = Counter("triscope_industrial_verdicts", "Parts by verdict.", ("recipe", "station", "verdict"))
inspection_seconds = Histogram(
    "triscope_industrial_inspection_seconds",
    "From the frame's bytes to its verdict.",
    ("recipe",),
    buckets=(0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2),
)
SOURCE = "triscope/industrial"
MOST_STATIONS, OTHERS = 200, "others"
"""Stations that a worker's metrics tell apart: a camera that sends its serial number as the station must not fill Prometheus."""
LEAST_DAYS, MOST_DAYS = 0.1, 36_500.0
"""Pictures are kept so long at least: those that were just sent may be on their way to the worker."""
LOADED_RECIPES = 8
"""Recipes that are kept ready, so that the line changes over at once."""


def checked_days(days: float) -> float:
    """`days`, where pictures may be deleted after so many. Raises InputError."""
    if not LEAST_DAYS <= days <= MOST_DAYS:
        raise InputError(f"pictures of parts that passed can't be deleted after {days:g} days; expected {LEAST_DAYS:g} to {MOST_DAYS:g}")
    return days


class IndustrialService:
    """The use cases over a log, a store, blobs and recipes. `open_session`: a session of a model folder, or of the shipped network."""

    def __init__(
        self, log: Log, store: IndustrialStore, blobs: BlobStore, recipes: RecipeBook, open_session: Callable[[Path | None], rt.Session]
    ) -> None:
        self._log, self.store, self.blobs, self.recipes = log, store, blobs, recipes
        self._open_session = open_session
        self._shared: rt.Session | None = None
        self._inspectors: OrderedDict[str, Inspector] = OrderedDict()
        self._lock = threading.Lock()
        self._stations: set[str] = set()

    def inspector(self, name: str) -> Inspector:
        """The recipe ready to judge; a recipe that was changed is loaded again. Raises RecipeNotFoundError."""
        facts = self.recipes.facts(name)
        with self._lock:
            held = self._inspectors.get(name)
            if held is not None and held.recipe.facts == facts:
                self._inspectors.move_to_end(name)
                return held
            try:
                made = self._opened(name, held)
            except InputError:
                if self.recipes.facts(name) == facts:
                    raise
                made = self._opened(name, held)  # it was taught anew while it was read
            if held is not None and held.session is not made.session:
                self._let_go(held)
            self._inspectors.pop(name, None)
            self._inspectors[name] = made
            while len(self._inspectors) > LOADED_RECIPES:
                self._let_go(self._inspectors.popitem(last=False)[1])
            return made

    def _opened(self, name: str, held: Inspector | None) -> Inspector:
        """The recipe with the session that it is `held` with, where its network is the same."""
        recipe = self.recipes.load(name)
        if held is not None and held.recipe.facts.network == recipe.facts.network:
            return Inspector(recipe, held.session)
        if recipe.model is None:
            self._shared = self._shared or self._open_session(None)
            return Inspector(recipe, self._shared)
        session = self._open_session(recipe.model)
        try:
            return Inspector(recipe, session)
        except InputError:
            session.close()
            raise

    def _let_go(self, held: Inspector) -> None:
        """Free the session of a recipe that has one of its own."""
        if held.session is not self._shared:
            held.session.close()

    def teach(
        self,
        name: str,
        good: Sequence[Sample],
        defects: Sequence[Sample] = (),
        *,
        again: bool = False,
        rates: Rates | None = None,
        seconds: float | None = None,
        device: str = "auto",
        actor: str = "operator",
        report: Report = lambda step, share: None,
    ) -> Taught:
        """Teach a recipe and keep it; `again`: from what it was taught from before as well, where there is such a recipe. Its `rates`
        stay where they are not given. Raises InputError."""
        before: list[TaughtImage] = []
        white: float | None = None
        if again and checked_name(name) in self.recipes.names():
            before, white = self.recipes.images(name), self.recipes.facts(name).white
            if not before and not good:
                raise InputError(f"recipe {name!r} kept no images, as an earlier version taught it; give images of good parts")
        taught = teach(
            checked_name(name),
            good,
            defects,
            self._open_session,
            before=before,
            white_before=white,
            rates=rates or self.rates(name),
            seconds=seconds,
            device=device,
            report=report,
        )
        self.recipes.save(taught.recipe)
        facts = taught.recipe.facts
        self.store.note(actor, "industrial.teach", name, good=facts.good, defects=facts.defects)
        logger.info("recipe taught", extra={"recipe": name, "good": facts.good, "defects": facts.defects})
        return taught

    def rates(self, name: str) -> Rates:
        """What a recipe's thresholds were set for; the usual ones where there is no such recipe, or none that can be read."""
        try:
            return self.recipes.facts(name).rates
        except IndustrialError:
            return USUAL

    def set_rates(self, name: str, rates: Rates, actor: str) -> Facts:
        """Move a recipe's thresholds, with the audit log; the line judges by them from the next part on. Raises InputError."""
        facts = self.recipes.set_rates(name, rates)
        self.store.note(actor, "industrial.thresholds", name, review_rate=rates.review, fail_rate=rates.fail)
        return facts

    def advice(self, name: str) -> str:
        """What more good parts and labelled defects would bring the recipe. Raises RecipeNotFoundError."""
        facts = self.recipes.facts(name)
        return advice(facts.good, facts.defects)

    def submit(
        self,
        content: bytes,
        recipe: str,
        station: str = "station-1",
        serial: str = "",
        lot: str = "",
        event_time: str = "",
        patient_until: threading.Event | None = None,
    ) -> str:
        """Hand a frame to the line: blob, then `industrial.frames`; its id. Nothing is decoded here.

        With `patient_until` a frame is sent again while the log or the blobs do not answer, until that is set. Raises UnavailableError.
        """
        name, taken = checked_name(recipe), event_time or now_rfc3339()
        blob = patiently(lambda: self.blobs.put(content), patient_until)
        frame = FrameMessage(str(uuid.uuid4()), taken, station, name, blob, serial, lot)
        patiently(lambda: FRAMES.send(self._log, frame, SOURCE), patient_until)
        return frame.frame_id

    def process(self, frame: FrameMessage, traceparent: str = "") -> Part | None:
        """Judge a frame once: store and `industrial.verdicts`. Raises PermanentError for what no retry mends."""
        for field in ("frame_id", "station", "serial", "lot"):
            check_text(field, getattr(frame, field), least=field == "frame_id")
        check_text("event_time", frame.event_time, most=40)
        parse_rfc3339(frame.event_time)
        known = self.store.find(frame.frame_id)
        if known is None:
            begin = time.perf_counter()
            try:
                inspector = self.inspector(frame.recipe)
                image = decode_image(self.blobs.get(frame.blob), f"frame {frame.frame_id}", inspector.recipe.facts.white)
            except IndustrialError as error:
                raise PermanentError(str(error)) from error
            result = inspector.inspect(image)
            drawn = "" if result.verdict == PASS else self.blobs.put(png(overlay(image, result)))
            milliseconds = 1e3 * (time.perf_counter() - begin)
            verdict = _message(frame, result, drawn, inspector.session.model.name, milliseconds)
            if self.store.add(verdict):
                judged_total.labels(frame.recipe, self._counted_as(frame.station), verdict.verdict).inc()
                inspection_seconds.labels(frame.recipe).observe(milliseconds / 1e3)
        else:
            verdict = known.verdict
        VERDICTS.send(self._log, verdict, SOURCE, traceparent)
        return self.store.find(frame.frame_id)

    def _counted_as(self, station: str) -> str:
        if len(self._stations) < MOST_STATIONS:
            self._stations.add(station)
        return station if station in self._stations else OTHERS

    def judge(self, frame_id: str, judged: str, actor: str, note: str = "") -> None:
        """The operator confirms or overrules a verdict. Overruled parts join the recipe's next teaching."""
        self.store.judge(frame_id, judged, actor, note)

    def learned_from_line(self, recipe: str, folder: Path) -> tuple[list[Sample], list[Sample]]:
        """Good and defective parts that the operator decided on, written to `folder` as samples for teaching."""
        good, bad = [], []
        white = self.recipes.facts(recipe).white if recipe in self.recipes.names() else None
        for number, part in enumerate(self.store.judged(recipe)):
            if not part.verdict.blob:
                continue
            path = folder / f"{number:06d}-{re.sub(r'[^0-9A-Za-z-]', '_', part.verdict.frame_id)[:60]}.png"
            try:
                path.write_bytes(png(decode_image(self.blobs.get(part.verdict.blob), white=white)))
            except BlobsUnavailableError:
                raise
            except (IndustrialError, BlobError) as error:
                logger.warning("a judged part can't be used: %s", error)
                continue
            if part.judged == GOOD:
                good.append(Sample(path, "good", decided=True, called=_called(part)))
            elif part.judged == DEFECT:
                bad.append(Sample(path, part.verdict.kind or "defect", called=_called(part)))
        return good, bad

    def tidy(self, days: float, stop: threading.Event | None = None) -> int:
        """Delete pictures of parts that passed more than `days` ago; how many were deleted, up to `stop`.

        Verdicts stay, and so do pictures of other parts, of those that the operator decided on, and what was sent again since. Raises
        InputError, UnavailableError.
        """
        before, deleted = datetime.now(UTC) - timedelta(days=checked_days(days)), 0
        for references in self.store.passed_pictures(before.isoformat(timespec="milliseconds")):
            if stop is not None and stop.is_set():
                break
            gone = [reference for reference in references if self.blobs.remove(reference, before)]
            self.store.forget_pictures(gone)
            deleted += len(gone)
        if deleted:
            logger.info("pictures deleted", extra={"pictures": deleted, "days": days})
        return deleted

    def picture(self, part: Part) -> bytes:
        """The part with its defect map, or the frame as it was taken where it passed."""
        return self.blobs.get(part.verdict.overlay or part.verdict.blob)

    def close(self) -> None:
        """Free the sessions."""
        with self._lock:
            for held in self._inspectors.values():
                self._let_go(held)
            self._inspectors.clear()
            if self._shared is not None:
                self._shared.close()
                self._shared = None


def _called(part: Part) -> str:
    """A part's name for the operator."""
    return part.verdict.serial or part.verdict.frame_id


def _message(frame: FrameMessage, result: Inspection, drawn: str, model: str, milliseconds: float) -> VerdictMessage:
    return VerdictMessage(
        frame_id=frame.frame_id,
        event_time=frame.event_time,
        station=frame.station,
        recipe=frame.recipe,
        verdict=result.verdict,
        score=round(result.score, 5),
        reasons=list(result.reasons),
        boxes=[BoxMessage(b.x, b.y, b.width, b.height, b.area, b.peak) for b in result.boxes],
        kind=result.kind,
        serial=frame.serial,
        lot=frame.lot,
        blob=frame.blob,
        overlay=drawn,
        model=model,
        ms=round(milliseconds, 2),
    )
