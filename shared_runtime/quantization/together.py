"""Several samples in one run: an engine may be right row by row and wrong for many rows, and scales may be taken over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from shared_runtime.backends.base import Executable
from shared_runtime.errors import UnsupportedModelError
from shared_runtime.numeric import difference_of_floats, strays
from shared_runtime.quantization.judge import Judge
from shared_runtime.signature import Signature, Tensors

COUNTS = (2, 8, 40)
"""How many samples run at once: a few, and more than the 32 rows that plans and servers ask for."""
MOST_ELEMENTS = 6_100_000
"""Input elements in one run, at most: 40 colour pictures of 224 x 224, two volumes of 128 x 128 x 128."""
STEADY = 5e-3
"""How far a form may be from itself on the same samples, relative: kernels of GPUs may add in another order each time."""
MOST_SECONDS = 10.0
"""How long a run of many samples may take, by the time that one takes."""
MIXES = 1e-3
"""From this relative difference on, the float model's rows depend on those beside them, and the metric says nothing of them together."""


@dataclass(frozen=True)
class Together:
    """The most samples that were run at once (1 where the model does not take several), the metric's drop on such runs over the whole
    validation set (None where it was not measured), and why the form does not pass ("" where it does)."""

    samples: int = 1
    drop: float | None = None
    why: str = ""


def judge_together(executable: Executable, reference: Executable, judge: Judge, signature: Signature, dynamic: bool = False) -> Together:
    """Whether a form that passed sample by sample also does on samples laid behind each other, as a server's batches bring them.

    `reference` is the float model. First the numbers of 2, 8 and 40 samples of one size (over again where there are fewer), then the metric
    over the set in runs of up to 40. `dynamic`: the form takes scales over all that is in a run; its numbers differ, and the metric
    alone says whether that matters.
    """
    if not signature.joins_rows or not len(judge.samples):
        return Together()
    first = judge.samples[0]
    alike = [item for item, inputs in enumerate(judge.samples) if _sizes(inputs) == _sizes(first)]
    begin = time.perf_counter()
    own = [executable.run(judge.samples[item]) for item in alike[:2]]
    seconds = (time.perf_counter() - begin) / len(own)
    most = int(min(COUNTS[-1], MOST_ELEMENTS / max(1, sum(value.size for value in first.values())), MOST_SECONDS / seconds))
    counts = sorted({min(count, most) for count in COUNTS} - {0, 1})
    pair = [alike[0], alike[-1]]
    floats = _float_together(reference, judge, pair) if counts else None
    if floats is None:
        return Together()
    mixes = difference_of_floats(joined([judge.reference[item] for item in pair]), floats) > MIXES
    own += [executable.run(judge.samples[item]) for item in alike[2:most]]
    for count in [] if dynamic else counts:
        places = [place % len(alike) for place in range(count)]
        items = [alike[place] for place in places]
        alone = joined([judge.reference[item] for item in items])
        wanted = _float_together(reference, judge, items) if mixes else alone
        near = difference_of_floats(joined([own[place] for place in places]), alone)
        try:
            outputs = executable.run(joined([judge.samples[item] for item in items]))
        except UnsupportedModelError as error:
            return Together(count, None, f"{count} samples in one run: {error}")
        if wanted is not None and (far := strays(outputs, wanted, near)) is not None:
            return Together(count, None, f"{count} samples in one run are {far:.2g} from float, one by one {near:.2g}")
    again = [executable.run(judge.samples[item]) for item in alike[:most]]
    if (changed := difference_of_floats(joined(again), joined(own))) > STEADY:
        return Together(counts[-1], None, f"the same samples differ by {changed:.2g} one by one after {counts[-1]} in one run")
    if mixes:
        return Together(counts[-1])
    drop = judge.before - judge.score(in_groups(judge.samples, counts[-1], executable.run), judge.targets)
    allowed = f"{counts[-1]} samples in one run: {judge.name} drops by {drop:.4g}; allowed are {judge.max_drop:.4g}"
    return Together(counts[-1], drop, "" if drop <= judge.max_drop else allowed)


def _float_together(reference: Executable, judge: Judge, items: list[int]) -> Tensors | None:
    """What the float model gives for samples in one run; None where it does not take several, or gives them no rows of their own."""
    try:
        outputs = reference.run(joined([judge.samples[item] for item in items]))
    except UnsupportedModelError:
        return None  # free by name only: the graph holds a number of rows
    rows = sum(len(next(iter(judge.samples[item].values()))) for item in items)
    return outputs if all(len(value) == rows for value in outputs.values()) else None


def in_groups(samples: Iterable[Tensors], most: int, run: Callable[[Tensors], Tensors]) -> list[Tensors]:
    """The outputs of each sample, from runs of up to `most` neighbours of the same sizes."""
    outputs: list[Tensors] = []
    for group in _groups(samples, most):
        ends = np.cumsum([len(next(iter(inputs.values()))) for inputs in group])
        parts = {name: np.split(value, ends[:-1]) for name, value in run(joined(group)).items()}
        outputs += [{name: values[place] for name, values in parts.items()} for place in range(len(group))]
    return outputs


def joined(samples: list[Tensors]) -> Tensors:
    """Tensors behind each other, name by name."""
    return {name: np.concatenate([each[name] for each in samples]) for name in samples[0]}


def _groups(samples: Iterable[Tensors], most: int) -> Iterator[list[Tensors]]:
    group: list[Tensors] = []
    for inputs in samples:
        if group and (len(group) == most or _sizes(inputs) != _sizes(group[0])):
            yield group
            group = []
        group.append(inputs)
    if group:
        yield group


def _sizes(inputs: Tensors) -> tuple[tuple[int, ...], ...]:
    """Sizes of a sample but for its number of rows."""
    return tuple(value.shape[1:] for _, value in sorted(inputs.items()))
