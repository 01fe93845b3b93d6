"""Judges one image by a recipe: pass, review or fail, with a score, a defect map and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

import shared_runtime as rt
from apps.industrial.errors import InputError
from apps.industrial.features import MAP, PEAK, prepared
from apps.industrial.images import Pixels, unusable
from apps.industrial.inspection.recipe import Recipe, side_of, unusual

PASS, REVIEW, FAIL = "pass", "review", "fail"
Array = NDArray[np.float32]
BATCH = 8
"""Images that the network sees at once."""
LARGEST_BOXES = 20
FAINT = 0.25
LIFT, LIFTED = 0.25, (-2.0, 8.0)
"""How much of its image's score, within limits, a place is given: on an unusual part every place is a little more suspect."""
SURPRISE = 2.0
"""Deviations from good parts beyond which the network that knows synthetic defects alone is heard."""


class Box(msgspec.Struct, frozen=True):
    """A place that is not as it should be, in pixels of the image; `area`: pixels inside its outline; `peak`: times the map's threshold."""

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float


@dataclass(frozen=True)
class Inspection:
    """What the inspector says of an image. `map` (MAP, MAP): the defect map, 1 at its threshold."""

    verdict: str
    score: float
    reasons: tuple[str, ...]
    map: Array
    boxes: tuple[Box, ...]
    kind: str = ""
    kind_probability: float = 0.0


def features(session: rt.Session, images: Sequence[Pixels]) -> dict[str, Array]:
    """The network's outputs for all images, float32."""
    starts = range(0, len(images), BATCH)
    parts = [session.run({"pixels": np.stack([prepared(image) for image in images[i : i + BATCH]])}) for i in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def learned_scores(seen: dict[str, Array]) -> Array:
    """(N,) the learned network's logit: of the image, and of its map's peak, which a recipe's own network says itself."""
    peak = seen["peak"] if "peak" in seen else np.sort(seen["map"].reshape(len(seen["map"]), -1), axis=1)[:, -PEAK:].mean(axis=1)
    return np.asarray((seen["image"] + peak) / 2, np.float32)


def combined(good: Array, learned: Array, weight: float, scale: tuple[float, float]) -> Array:
    """Scores or maps of the statistics of good parts and of the learned network together: 0 for a usual good part.

    `weight`: what the network has to say; `scale`: median and spread of its logits on good parts. Without
    defects to learn from (weight 0) it knows synthetic ones alone: only what stands far out from good parts counts.
    """
    standard = (learned - scale[0]) / scale[1]
    if not weight:
        return np.asarray(good + np.maximum(standard - SURPRISE, 0), np.float32)
    return np.asarray((1 - weight) * good + weight * standard, np.float32)


def scale_of(logits: np.ndarray) -> tuple[float, float]:
    """Median and spread of logits on good parts."""
    return float(np.median(logits)), float(logits.std() + 0.5)


def lifted(maps: Array, scores: Array) -> Array:
    """Maps (N, MAP, MAP) of how far places are from good parts, raised by the `scores` (N,) of their images."""
    return np.asarray(maps + LIFT * np.clip(scores, *LIFTED)[:, None, None], np.float32)


def relative(maps: Array, threshold: float) -> Array:
    """Maps in deviations from usual places, as shares of their `threshold`: 1 at it, whatever its sign.

    Usual places lie at 0 where the threshold is a deviation or more above them, else a deviation below it: a learned network finds no place
    of a good part as suspect as the whole part is.
    """
    lift = max(0.0, 1.0 - threshold)
    return np.asarray((maps + lift) / (threshold + lift), np.float32)


class Inspector:
    """A recipe with its network, ready to judge. Threads may share it."""

    def __init__(self, recipe: Recipe, session: rt.Session) -> None:
        """Raises InputError where the recipe was taught with another network than the session's."""
        if recipe.facts.network != session.model.sha256:
            raise InputError(
                f"recipe {recipe.facts.name!r} was taught with another network ({recipe.facts.network[:12] or 'an earlier version'}) than "
                f"{session.model.name} {session.model.version} ({session.model.sha256[:12]}); teach it again"
            )
        self.recipe, self.session = recipe, session

    def inspect(self, image: Pixels) -> Inspection:
        """The verdict on one image, or REVIEW with the reason where the frame says nothing about the part."""
        return self.inspect_many([image])[0]

    def inspect_many(self, images: Sequence[Pixels]) -> list[Inspection]:
        """The same for several images, which share the network's batches."""
        seen = features(self.session, images)
        good, facts = self.recipe.good, self.recipe.facts
        unlike, places = good.judged(seen["fine"], seen["whole"])
        if self.recipe.regions:
            places += self.recipe.regions.maps(seen)
        scores = combined(unlike, learned_scores(seen), facts.learned_weight, facts.learned_scale)
        if self.recipe.probe:
            scores = self.recipe.probe.joined(scores, seen["whole"])
        maps = combined(lifted(places, unlike), seen["map"], facts.learned_weight, facts.map_scale)
        kinds = self.recipe.kinds.probabilities(seen["embedding"]) if self.recipe.kinds else None
        return [self._conclude(image, float(scores[i]), maps[i], None if kinds is None else kinds[i]) for i, image in enumerate(images)]

    def _conclude(self, image: Pixels, score: float, raw: Array, kinds: Array | None) -> Inspection:
        facts = self.recipe.facts
        scaled = relative(raw, facts.map_threshold)
        if doubt := unusable(image, facts.sharpness) or self._misfit(image):
            return Inspection(REVIEW, score, (doubt,), scaled, ())
        if not (np.isfinite(score) and np.isfinite(scaled).all()):  # no comparison holds for it, and it would pass
            doubt = "the network gave no number for this frame: look at it, and teach the recipe again where it goes on"
            return Inspection(REVIEW, facts.calibration.fail.value, (doubt,), np.nan_to_num(scaled), ())
        calibration = facts.calibration
        if score > calibration.fail.value:
            verdict, reason = FAIL, f"score {score:.2f} is above the fail threshold {calibration.fail.value:.2f}"
        elif score > calibration.review.value:
            verdict, reason = REVIEW, f"score {score:.2f} is above the review threshold {calibration.review.value:.2f}"
        else:
            return Inspection(PASS, score, (), scaled, ())
        boxes = boxes_of(scaled, image.shape[1], image.shape[0])
        if kinds is None or self.recipe.kinds is None:
            return Inspection(verdict, score, (reason,), scaled, boxes)
        best = int(kinds.argmax())
        return Inspection(verdict, score, (reason,), scaled, boxes, self.recipe.kinds.names[best], float(kinds[best]))

    def _misfit(self, image: Pixels) -> str | None:
        facts = self.recipe.facts
        height, width = image.shape[:2]
        if unusual(width / height, facts.aspect):
            return f"the frame has {width} x {height} pixels, another shape than the recipe's parts (width / height {facts.aspect[0]:.2f})"
        if facts.side and unusual(side_of(width, height), facts.side):
            across, down = facts.side[0] * facts.aspect[0] ** 0.5, facts.side[0] / facts.aspect[0] ** 0.5
            return (
                f"the frame has {width} x {height} pixels, the recipe's parts about {across:.0f} x {down:.0f}: "
                "set the camera as it was when teaching"
            )
        if (image.ndim == 3) and not facts.colour:
            return "the frame is in colour, the recipe was taught in grey: set the camera as it was when teaching"
        if (image.ndim == 2) and facts.colour:
            return "the frame is grey, the recipe was taught in colour: set the camera as it was when teaching"
        return None


def boxes_of(scaled: Array, width: int, height: int) -> tuple[Box, ...]:
    """Outlines of the map above 1, on an image of `width` x `height`; the strongest first, or the peak alone where none is above.

    Beside a strong defect its surroundings are no defect of their own: places below a quarter of the peak are left out.
    """
    peak = float(scaled.max())
    level = max(1.0, peak * FAINT) if peak > 1 else peak * 0.98
    count, labels, stats, _ = cv2.connectedComponentsWithStats((scaled >= level).astype(np.uint8), connectivity=8)
    across, down = width / MAP, height / MAP
    found = []
    for index in range(1, count):
        x, y, w, h, area = (int(v) for v in stats[index])
        own = float(scaled[labels == index].max())
        left, top = int(x * across), int(y * down)
        found.append(Box(left, top, max(1, int(w * across)), max(1, int(h * down)), max(1, int(area * across * down)), round(own, 3)))
    return tuple(sorted(found, key=lambda box: -box.peak)[:LARGEST_BOXES])


def overlay(image: Pixels, result: Inspection) -> Pixels:
    """The image in RGB with the defect map laid over it (from half the threshold or a quarter of its peak on) and the boxes."""
    canvas = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image.copy()
    height, width = canvas.shape[:2]
    strongest = max(2.0, float(result.map.max()))
    large = cv2.resize(result.map, (width, height), interpolation=cv2.INTER_LINEAR)
    heat = np.clip((large - strongest / 4) / (strongest * 0.75), 0, 1)
    colours = cv2.cvtColor(cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    share = (0.45 * np.minimum(1, heat * 3))[..., None]
    mixed = (canvas * (1 - share) + colours * share).astype(np.uint8)
    line = max(1, round(min(width, height) / 250))
    for box in result.boxes:
        cv2.rectangle(mixed, (box.x, box.y), (box.x + box.width, box.y + box.height), (255, 60, 60), line)
    return mixed
