"""Float graphs that exact passes rewrote: variants in float32, kept where they are faster here than the graph as it came."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from shared_runtime.backends.base import backends, specialise
from shared_runtime.certificate import Certificate, numerics
from shared_runtime.errors import UnsupportedModelError
from shared_runtime.graph.check import read_whole
from shared_runtime.graph.passes.base import pass_difference, passes, plain_session, run_pass
from shared_runtime.host import host
from shared_runtime.model import Model
from shared_runtime.numeric import difference
from shared_runtime.planning.measure import Timed, interleave, paired_ratio
from shared_runtime.quantization.samples import read_calibration
from shared_runtime.signature import Tensors
from shared_runtime.variants import FLOAT, Variant, VariantFacts, VariantStore, file_hashes

logger = logging.getLogger(__name__)
PROBE_ROWS, PROBE_SEED = 2, 7
FLOATS = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2, onnx.TensorProto.BFLOAT16: 2}
WORTH = 1.02
"""A rewritten graph becomes a variant only where the interval of its gain begins above this."""


@dataclass(frozen=True)
class Rewritten:
    """The variant, how many times as fast it is with a 95 % interval, and the passes that changed something."""

    variant: Variant
    ratio: float
    interval: tuple[float, float]
    passes: tuple[str, ...]


def rewritten(model: Model, chosen: Sequence[str], engine: str, threads: int, store: VariantStore) -> Rewritten | None:
    """The variant `rewritten-ENGINE` by the passes in `chosen`; None where they change nothing or it is not worth it here."""
    probe = model.probe()
    probes = [valid_inputs(model), probe]
    folder = Path(tempfile.mkdtemp(prefix="triscope-rewritten-"))
    try:
        path = folder / "model.onnx"
        applied = apply_passes(read_whole(model.graph), chosen, engine, probes, path)
        if not applied:
            return None
        plain, better = (backends()[engine].compile(one, "cpu", threads) for one in (model, replace(model, graph=path, sha256="")))
        for executable in (plain, better):
            specialise(executable, probe)
        error = probe_difference(model, better, threads)
        ratio, interval = compare(plain, better, probe)
        if interval[0] < WORTH:
            return None
        facts = VariantFacts(f"rewritten-{engine}", FLOAT, engine, "cpu", path.name)
        variant = store.write(model.sha256, facts, lambda part: _certificate(model, facts, path, part, applied, error, ratio, probes))
        return Rewritten(variant, ratio, interval, applied)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def apply_passes(original: onnx.ModelProto, chosen: Iterable[str], engine: str, probes: list[Tensors], path: Path) -> tuple[str, ...]:
    """Write the graph with those passes that apply for `engine`, each verified; the names of those that changed it."""
    proto, applied = original, []
    for name in chosen:
        if passes()[name].engine in ("", engine):
            proto, result = run_pass(proto, passes()[name], probes)
            if result.changes:
                applied.append(name)
    onnx.save(proto, path)
    return tuple(applied)


def compare(before: Any, after: Any, probe: Tensors) -> tuple[float, tuple[float, float]]:
    """How many times as fast `after` is on `probe`, with a 95 % interval; both are closed."""
    slow, fast = Timed(lambda: before.run(probe)), Timed(lambda: after.run(probe))
    slow.call(), fast.call()
    interleave([slow, fast], 3.0, hopeless=float("inf"))
    before.close()
    if after is not before:
        after.close()
    return paired_ratio(slow.times, fast.times)


def _certificate(
    model: Model,
    facts: VariantFacts,
    path: Path,
    part: Path,
    chosen: tuple[str, ...],
    error: float | None,
    ratio: float,
    probes: list[Tensors],
) -> Certificate:
    drop = pass_difference(read_whole(model.graph), onnx.load(path), probes) if error is None else error
    shutil.copy(path, part / facts.graph)
    digest = read_calibration(probes, model.signature, model.name).digest
    return Certificate(
        model=model.name,
        sha256=model.sha256,
        variant=facts.name,
        precision=FLOAT,
        files=file_hashes(part),
        metric="relative difference from the graph as it came",
        drop_interval=(drop, drop),
        slices={},
        calibration=None,
        validation=digest,
        passes=chosen,
        probe_error=error,
        dims=dict(model.dims),
        bytes=path.stat().st_size,
        float_bytes=float_bytes(model),
        speedup=round(ratio, 3),
        numerics=numerics(facts.engine, facts.device),
        host=host().fingerprint,
        created=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        before=1.0,
        after=1.0 - drop,
        drop=drop,
        max_drop=1e-4,
    )


def float_bytes(model: Model) -> int:
    """Size of the graph with every float weight at four bytes, however the file stores it."""
    proto = onnx.load(str(model.graph), load_external_data=False)
    floats = [item for item in proto.graph.initializer if item.data_type in FLOATS]
    stored = sum(FLOATS[item.data_type] * int(np.prod(item.dims)) for item in floats)
    return int(proto.ByteSize()) - stored + 4 * sum(int(np.prod(item.dims)) for item in floats)


def valid_inputs(model: Model) -> Tensors:
    """Inputs that passes are verified on: random ones, or the model's sample or example where it can't run on those."""
    inputs, given = model.random(2, 3), model.sample or model.example
    if given is not None:
        try:
            plain_session(model.graph).run(None, inputs)
        except Exception as error:
            logger.info("%s does not run on random inputs, given ones are taken: %s", model.name, " ".join(str(error).split())[:200])
            return given
    return inputs


def probe_difference(model: Model, executable: Any, threads: int) -> float | None:
    """Relative difference of an executable from the float reference on the signature's own seeded inputs; None where the reference
    does not run on them."""
    probe = model.random(PROBE_ROWS, PROBE_SEED)
    reference = backends()["onnxruntime"].compile(model, "cpu", threads)
    try:
        expected = reference.run(probe)
    except UnsupportedModelError:
        return None
    else:
        return difference(executable.run(probe), expected)
    finally:
        reference.close()
