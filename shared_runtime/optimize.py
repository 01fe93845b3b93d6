"""`rt.optimize`: every reduced form that this host's engines know, guarded by the user's metric; what passes is certified."""

from __future__ import annotations

import datetime
import inspect
import itertools
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from shared_runtime.backends.base import Executable, backends, refuse_unknown_device
from shared_runtime.certificate import Certificate, Reversion, numerics
from shared_runtime.errors import BackendUnavailableError, CalibrationError, ModelError, UnsupportedModelError, VariantRefusedError
from shared_runtime.graph.check import opset, read_whole
from shared_runtime.graph.passes.base import passes, run_pass
from shared_runtime.host import asked_cores, host
from shared_runtime.model import Model, load
from shared_runtime.quantization.catalogue import PRECISIONS, FormMaker, forms_for
from shared_runtime.quantization.guard import Guard, Guarded, Report
from shared_runtime.quantization.judge import Judge, slice_names
from shared_runtime.quantization.metrics import UNLABELLED, Metric, metric_of
from shared_runtime.quantization.samples import SampleStore, each_of, hold_out, read_calibration, read_validation, refuse_overlap
from shared_runtime.quantization.together import judge_together
from shared_runtime.rewritten import float_bytes, probe_difference, rewritten, valid_inputs
from shared_runtime.signature import Tensors
from shared_runtime.variants import DYNAMIC, Variant, VariantStore, file_hashes

logger = logging.getLogger(__name__)
MAX_DROP = 0.005
SHORT = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp8": "float8", "e4m3": "float8"}
BUDGET_SECONDS = 900.0
SIMPLIFY = (
    "constant-folding",
    "cancel-casts",
    "cancel-transposes",
    "fold-pads",
    "conv-batchnorm",
    "common-subexpressions",
    "dead-code",
)
"""Passes that every reduced form starts from: they change no value that matters to quantization."""
QUANTIZABLE_OPSET = 13
"""The operator set from which on INT8 has a scale a channel."""
OURS = ("tree-regressor", "linear-layernorm", "einsum-to-matmul")
"""Exact passes that make a graph faster and that no engine has; what they make is a variant in float32 where it is faster here."""


@dataclass
class _Job:
    """One call of `optimize`: the model, its data and its judge."""

    model: Model
    calibration: SampleStore
    judge: Judge
    threads: int
    store: VariantStore
    report: Report
    references: dict[tuple[str, str], Executable]
    hints: dict[str, tuple[Reversion, ...] | None] = field(default_factory=dict)


def optimize(
    model: Model | str | Path | Any,
    *,
    calibration: Iterable[Any],
    validation: Iterable[Any] | None = None,
    metric: Metric | str | None = None,
    max_drop: float = MAX_DROP,
    slices: Callable[[Tensors, Any], str] | Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    device: str = "auto",
    threads: int | None = None,
    budget_s: float = BUDGET_SECONDS,
    store: VariantStore | None = None,
    report: Report | None = None,
    certain: bool = False,
) -> Model:
    """The model with every reduced form that passed its guard on this host; `model.refused` says why others did not.

    `model`: loaded, or what `rt.load` takes (a torch module sees the first calibration sample as its example).
    `calibration`: an iterable of input dicts, read once, at most 300. `validation`: an iterable of (inputs, target), or the arrays (X, y);
    without it a quarter of the calibration set is held out and `metric` is agreement with the float model, which needs no target.
    `metric(outputs, targets)` over the lists of all outputs and targets, higher is better; or the name of one of `rt.metrics`.
    `max_drop`: absolute, in the metric's unit; with `certain` the upper end of the drop's 95 % interval may not be above it either.
    `slices`: the slice of each validation item, or a function of (inputs, target).
    `precisions`: of "int8", "bfloat16", "float16", "tf32", "float8"; without, all that apply.

    A form that fails is refused and the float model stays: no error. Raises CalibrationError, MetricError,
    BackendUnavailableError for what is no device.
    """
    wanted, judged_by = _precisions(precisions), metric_of(metric)
    loaded, calibration = loaded_with(model, calibration)
    data = read_calibration(calibration, loaded.signature, loaded.name)
    loaded = replace(loaded, dims=loaded.signature.dims_of(data[0]), sample=loaded.signature.row(data[0], 0))
    report = report or (lambda text: logger.info("%s", text))
    refuse_unknown_device(device)
    if not budget_s > 0:
        raise ValueError(f"budget_s is {budget_s}; expected seconds above 0")
    cores = asked_cores(threads)
    reference = backends()["onnxruntime"].compile(loaded, "cpu", cores)
    references: dict[tuple[str, str], Executable] = {("onnxruntime", "cpu"): reference}
    folder = tempfile.mkdtemp(prefix="triscope-optimize-")
    try:
        judge, data = _judge(loaded, data, validation, judged_by, max_drop, slices, reference, certain)
        job = _Job(loaded, data, judge, cores, store or VariantStore(), report, references)
        simple = simplified(loaded, Path(folder), report)
        makers = forms_for(simple, device, wanted)
        known, refused = dict(loaded.known), {}
        end = time.monotonic() + budget_s
        for place, maker in enumerate(makers):
            try:  # what one leaves of its share is the others'
                share = max(budget_s / (2 * len(makers)), (end - time.monotonic()) / (len(makers) - place))
                variant, why = _attempt(job, maker, share)
            except (UnsupportedModelError, BackendUnavailableError) as error:
                variant, why = None, " ".join(str(error).split())
            if variant is None:
                refused[maker.name] = why
                known.pop(maker.name, None)
                job.store.remove(loaded.sha256, maker.name)
                report(f"{maker.name} refused: {why}")
            else:
                known[variant.name] = variant
                refused.pop(maker.name, None)
        if precisions is None and device in ("auto", "cpu") and (gained := rewritten(loaded, OURS, "onnxruntime", cores, job.store)):
            report(f"{gained.variant.name} certified: {gained.ratio:.2f} times as fast by {', '.join(gained.passes)}")
            known[gained.variant.name] = gained.variant
        return replace(loaded, known=known, refused=refused)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for executable in references.values():
            executable.close()


def simplified(model: Model, folder: Path, report: Report) -> Model:
    """The model on a graph without what is computed for nothing, from which every form is made; each pass verified."""
    proto = read_whole(model.graph)
    probes = [valid_inputs(model)]
    if opset(proto) < QUANTIZABLE_OPSET:
        proto, result = run_pass(proto, passes()["opset-upgrade"], probes, version=17)
        report(f"pass opset-upgrade: {result.refused or 'operator set 17'}")
    for name in SIMPLIFY:
        proto, result = run_pass(proto, passes()[name], probes)
        if result.changes:
            report(
                f"pass {name}: {result.changes} places, {result.nodes[0]} to {result.nodes[1]} nodes, difference {result.difference:.1e}"
            )
    path = folder / "simplified.onnx"
    onnx.save(proto, path)
    return replace(model, graph=path)


def _precisions(names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return PRECISIONS
    usual = [precision_of(name) for name in ([names] if isinstance(names, str) else names)]
    if unknown := sorted(set(usual) - set(PRECISIONS)):
        raise UnsupportedModelError(f"unknown precision {unknown[0]!r}; expected of {', '.join(PRECISIONS)}")
    return tuple(usual)


def precision_of(name: str) -> str:
    """A precision's name as it stands here: "FP16" is float16. Raises UnsupportedModelError for what is no name."""
    if not isinstance(name, str):
        raise UnsupportedModelError(f"the precision is {name!r}; expected one of {', '.join(PRECISIONS)}")
    return SHORT.get(name.lower(), name.lower())


def loaded_with(model: Model | str | Path | Any, calibration: Iterable[Any]) -> tuple[Model, Iterable[Any]]:
    """The model, loaded with the first calibration sample as its example where it is an object; and the whole calibration data."""
    if isinstance(model, (Model, str, Path)):
        return (model if isinstance(model, Model) else load(model)), calibration
    if isinstance(calibration, Mapping):
        return load(model, example=calibration), calibration
    if hasattr(calibration, "ndim"):
        return load(model, example=calibration[:2]), calibration  # type: ignore[index]
    samples = each_of(calibration, "calibration")
    if (first := next(samples, None)) is None:
        raise CalibrationError("no calibration samples; give an iterable of input dicts (a generator works once)")
    example = _example_in(first, model)
    if not hasattr(calibration, "__iter__"):  # one of torch's data sets, whose items have no leading dimension
        parts = example if isinstance(example, (tuple, list)) else [example]
        example = [np.asarray(part)[None] for part in parts]
    return load(model, example=example), itertools.chain([first], samples)


def _example_in(sample: Any, model: Any) -> Any:
    """The inputs of an object in what a data loader gives: all arrays that it needs, without a target behind them."""
    if not isinstance(sample, (tuple, list)):
        return sample
    if len(sample) == 2 and isinstance(sample[0], (Mapping, tuple, list)):
        return sample[0]
    known = inspect.signature(model.forward).parameters.values() if hasattr(model, "forward") else ()
    needed = sum(one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in known) or 1
    arrays = all(hasattr(part, "ndim") for part in sample[:needed])
    return list(sample[:needed]) if arrays and len(sample) in (needed, needed + 1) else sample


def _judge(
    model: Model,
    data: SampleStore,
    validation: Iterable[Any] | None,
    metric: Metric,
    max_drop: float,
    slices: Callable[[Tensors, Any], str] | Sequence[str] | None,
    reference: Executable,
    certain: bool,
) -> tuple[Judge, SampleStore]:
    """The judge, and the calibration set without what it judges on."""
    if validation is None:
        kept, apart = hold_out(data, model.signature, model.name)
        targets: list[Any] = [reference.run(inputs) for inputs in apart]
        return Judge(targets, apart, targets, metric, max_drop, slice_names(slices, apart, targets), certain=certain), kept
    apart, targets, outputs, against = _validation(model, validation, metric, reference)
    refuse_overlap(data, apart, model.name)
    return Judge(outputs, apart, against, metric, max_drop, slice_names(slices, apart, targets), certain=certain), data


def _validation(
    model: Model, data: Iterable[Any], metric: Metric, reference: Executable
) -> tuple[SampleStore, list[Any], list[Tensors], Sequence[Any]]:
    """The validation inputs, their targets, the float model's outputs, and which of the two the metric compares with."""
    apart, targets = read_validation(data, model.signature, model.name, labelled=metric not in UNLABELLED)
    outputs = [reference.run(inputs) for inputs in apart]
    return apart, targets, outputs, outputs if metric in UNLABELLED else targets


def _attempt(job: _Job, maker: FormMaker, budget: float) -> tuple[Variant | None, str]:
    """Make one form by each way of calibration, guard the one that loses least, and certify it; or None and why it was refused."""
    best: tuple[float, Guard] | None = None
    for form in maker.make(job.calibration):
        key = (form.facts.engine, form.facts.device)
        if key not in job.references:
            job.references[key] = backends()[key[0]].compile(job.model, key[1], job.threads)
        guard = Guard(form, job.judge, job.references[key], job.threads, budget, job.report)
        first = guard.first()
        if best is None or first.drop < best[0]:
            best = (first.drop, guard)
        if not first.why:
            break
    assert best is not None
    guard = best[1]
    close = maker.name.replace("-bfloat16-", "-")
    if close in job.hints and job.hints[close] is None:
        return None, "a form of the same layers was refused"
    found = guard.search(job.hints.get(close) or ())
    job.hints[close] = found.reverted if found.passed else None
    return _certify(job, found) if found.passed else (None, found.verdict.why)


def _certify(job: _Job, found: Guarded) -> tuple[Variant | None, str]:
    """The variant, or None and why a form that passed sample by sample does not with several in one run."""
    judge, form, verdict = job.judge, found.form, found.verdict
    executable = form.compile(found.layers, job.threads)
    try:
        together = judge_together(executable, job.references["onnxruntime", "cpu"], judge, job.model.signature, form.facts.name == DYNAMIC)
        if together.why:
            return None, together.why
        probe_error = probe_difference(job.model, executable, job.threads)
    finally:
        executable.close()
    saturated = form.saturated(found.layers, job.calibration[0])

    def fill(folder: Path) -> Certificate:
        form.save(found.layers, folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
        return Certificate(
            model=job.model.name,
            sha256=job.model.sha256,
            variant=form.facts.name,
            precision=form.facts.precision,
            files=file_hashes(folder),
            metric=judge.name,
            before=verdict.before,
            after=verdict.after,
            drop=verdict.drop,
            drop_interval=verdict.interval,
            max_drop=judge.max_drop,
            slices=verdict.slices,
            calibration=job.calibration.digest if form.layers else None,
            validation=judge.samples.digest,
            passes=form.passes,
            layers=len(form.layers),
            reverted=found.reverted,
            packed=found.packed,
            saturated=saturated,
            together=together.samples,
            together_drop=together.drop,
            probe_error=probe_error,
            dims=dict(job.model.dims),
            bytes=size or job.model.graph.stat().st_size,
            float_bytes=float_bytes(job.model),
            speedup=None if found.speedup is None else round(found.speedup, 3),
            numerics=numerics(form.facts.engine, form.facts.device),
            host=host().fingerprint,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    variant = job.store.write(job.model.sha256, form.facts, fill)
    job.report(f"{form.facts.name} certified: {judge.name} {verdict.before:.4g} to {verdict.after:.4g}")
    return variant, ""


@dataclass
class Quantizer:
    """The guarded optimiser in the field's usual form: `Quantizer(model, precision="int8", calibration_data=...).run()`.

    Raises VariantRefusedError from `run` where no form in that precision passes; the model that was given stays as it is.
    """

    model: Any
    precision: str = "int8"
    calibration_data: Iterable[Any] = ()
    validation_data: Iterable[Any] | None = None
    metric: Metric | str | None = None
    max_drop: float = MAX_DROP
    device: str = "auto"
    threads: int | None = None
    budget_s: float = BUDGET_SECONDS
    certain: bool = False

    def run(self) -> Model:
        """The model with the certified variants of that precision."""
        made = optimize(
            self.model,
            calibration=self.calibration_data,
            validation=self.validation_data,
            metric=self.metric,
            max_drop=self.max_drop,
            precisions=(self.precision,),
            device=self.device,
            threads=self.threads,
            budget_s=self.budget_s,
            certain=self.certain,
        )
        if not any(made.variant(name).facts.precision.startswith(precision_of(self.precision)) for name in made.variants):
            reasons = "; ".join(f"{name}: {why}" for name, why in made.refused.items()) or "no engine here has it"
            raise VariantRefusedError(f"no {self.precision} form of {made.name!r} passed: {reasons}; the float model is unchanged")
        return made


def verify(
    model: Model | str | Path,
    variant: str,
    *,
    validation: Iterable[Any] | None = None,
    metric: Metric | str | None = None,
    threads: int | None = None,
    slices: Callable[[Tensors, Any], str] | Sequence[str] | None = None,
) -> dict[str, Any]:
    """Compute a certificate again: files, host and the difference on seeded inputs always; the metric where
    `validation` (and its `metric`, agreement without) is given. `holds` says whether all of it agrees."""
    model = model if isinstance(model, Model) else load(model)
    known = model.known.get(variant)
    if known is None or known.certificate is None:
        raise ModelError(f"model {model.name!r} has no variant {variant!r} with a certificate; it has {list(model.known) or 'none'}")
    certificate, cores = known.certificate, asked_cores(threads)
    found: dict[str, Any] = {"variant": variant, "void": known.why_void, "certificate": {"probe_error": certificate.probe_error}}
    if known.why_void:
        return {**found, "holds": False}
    executable = backends()[known.facts.engine].compile(model, known.facts.device, cores, known)
    try:
        found["probe_error"] = again = probe_difference(model, executable, cores)
        if again is None or certificate.probe_error is None:
            same = again is certificate.probe_error and validation is not None
            found["why"] = "" if same else "random numbers are no valid inputs of it: give validation data to measure again"
        else:
            same = bool(np.isclose(again, certificate.probe_error, rtol=0.05, atol=1e-5))
        if validation is not None:
            reference = backends()["onnxruntime"].compile(model, "cpu", cores)
            try:
                judge = _judge_again(model, validation, metric, certificate, slices, reference)
                together = judge_together(executable, reference, judge, model.signature, variant == DYNAMIC)
            finally:
                reference.close()
            verdict = judge.judge(judge.run(executable))
            found |= {"metric": judge.name, "before": verdict.before, "after": verdict.after, "drop": verdict.drop}
            found |= {"drop_interval": verdict.interval, "together": together.samples, "together_drop": together.drop}
            found["why"] = why = verdict.why or together.why
            found["same_validation_set"] = judge.samples.digest == certificate.validation
            same = same and not why
            if found["same_validation_set"] and judge.name == certificate.metric:
                same = same and bool(np.isclose(verdict.after, certificate.after, rtol=0, atol=max(1e-3, certificate.max_drop / 5)))
    finally:
        executable.close()
    return {**found, "holds": same}


def _judge_again(
    model: Model, validation: Iterable[Any], metric: Metric | str | None, certificate: Certificate, slices: Any, reference: Any
) -> Judge:
    chosen = metric_of(metric)
    apart, targets, outputs, against = _validation(model, validation, chosen, reference)
    return Judge(outputs, apart, against, chosen, certificate.max_drop, slice_names(slices, apart, targets))
