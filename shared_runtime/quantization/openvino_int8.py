"""INT8 for OpenVINO by NNCF, and the precisions that OpenVINO reaches by itself (bfloat16)."""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from shared_runtime.backends.base import Executable
from shared_runtime.backends.openvino import HINTS, compile_graph, read_network, reason, save_network
from shared_runtime.backends.openvino_mends import forks, safe
from shared_runtime.backends.signal_stack import signal_stack_kept
from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError
from shared_runtime.host import host
from shared_runtime.model import Model
from shared_runtime.quantization.forms import BETWEEN
from shared_runtime.quantization.samples import SampleStore
from shared_runtime.quantization.storage import SHORTEST, fits_int8, holds_in_half, int8_and_scale
from shared_runtime.signature import Tensors
from shared_runtime.variants import FLOAT, VariantFacts

CHANNELS = {"Convolution": (0,), "GroupConvolution": (0, 1), "ConvolutionBackpropData": (1,)}
"""Axes of a convolution's weights that have a scale an index."""
RECURRENT = ("LSTMSequence", "GRUSequence", "RNNSequence")
WEIGHTED = (*CHANNELS, "MatMul", "LSTMCell", *RECURRENT)
SUMMING = {*WEIGHTED, "Add", "Subtract"}
STATISTICS = {"Power", "Sqrt", "SquaredDifference", "Exp", "Log"}
DIFFERENCES = {"Subtract", "Divide"}
SUMS = {"ReduceMean", "ReduceSum"}
"""Kinds of operators that stay in float: always, where they read no constant, and beside one of those (`_arithmetic`)."""
SMOOTHING = "/nncf_smooth_quant"
"""What NNCF calls the factors by which it makes a layer's input easier to quantize."""
TELEMETRY = "openvino_telemetry"
"""A package by which NNCF reports each use to its maker over the network; without it NNCF reports nothing."""


class EnginePrecision:
    """OpenVINO left to compute in bfloat16, by name and with a certificate instead of by default."""

    layers: tuple[str, ...] = ()
    passes = ("engine precision",)

    def __init__(self, model: Model, precision: str) -> None:
        self.facts = VariantFacts(f"{precision}-openvino", precision, "openvino", "cpu", "", precision)
        self._model = model

    def compile(self, reverted: frozenset[str], threads: int) -> Executable:
        outputs = [spec.name for spec in self._model.signature.outputs]
        return compile_graph(self._model.name, self._model.graph, outputs, threads, self.facts.rest, self.facts.precision)

    def save(self, reverted: frozenset[str], folder: Path) -> None:
        """Nothing to write: the float graph is what runs."""

    def saturated(self, reverted: frozenset[str], sample: Tensors) -> int | None:
        return None

    def layer_times(self, reverted: frozenset[str], threads: int) -> dict[str, float]:
        return {}


class OpenVinoInt8:
    """NNCF's post-training quantization of one model; a layer goes back to float by taking the quantizers off its inputs.

    Recurrent layers that NNCF leaves in float have their weights in INT8 until they are put back.
    """

    passes: tuple[str, ...]
    _packed: frozenset[str] = frozenset()

    def __init__(self, model: Model, calibration: SampleStore, method: str = "minmax", rest: str = FLOAT) -> None:
        self.facts = _facts(rest)
        self._model = model
        self.passes = (f"nncf {method}", *(("half range weights",) if host().saturates else ()))
        self._quantized = _quantize(model, calibration, method)
        self._float = _float_operators(model)
        named = [(op.get_friendly_name(), op.get_type_name() in WEIGHTED) for op in _quantized(self._quantized)]
        self._between = frozenset(name for name, weighted in named if not weighted)
        reduced = tuple(name for name, weighted in named if weighted)
        others = [op for op in self._quantized.get_ordered_ops() if op.get_type_name() in RECURRENT and _weights(op)]
        self.stored = frozenset(op.get_friendly_name() for op in others) - set(reduced)
        self.layers = (*reduced, *sorted(self.stored), *((BETWEEN,) if self._between else ()))

    def with_rest(self, rest: str) -> OpenVinoInt8:
        """The same quantization with another precision for what is not quantized."""
        other = copy.copy(self)
        other.facts = _facts(rest)
        return other

    def packed(self, layers: frozenset[str]) -> Self:
        """The same form that stores the weights of these layers in INT8 where it computes them in float."""
        other = copy.copy(self)
        other._packed = layers
        return other

    def network(self, reverted: frozenset[str]) -> Any:
        """A copy of the quantized network with those layers in float."""
        network = self._quantized.clone()
        names = reverted | self._between if BETWEEN in reverted else reverted
        for op in _quantized(network):
            if op.get_friendly_name() in names:
                self._restore(op)
                for port in op.inputs():
                    if port.get_source_output().get_node().get_type_name() == "FakeQuantize":
                        port.replace_source_output(port.get_source_output().get_node().input_value(0))
                    if port.get_source_output().get_node().get_friendly_name().endswith(SMOOTHING):  # it is undone in NNCF's weights
                        port.replace_source_output(port.get_source_output().get_node().input_value(0))
                for target in op.output(0).get_target_inputs():
                    if target.get_node().get_type_name() == "Add":  # NNCF corrects the bias for the error of the weights
                        self._restore(target.get_node())
        packed = (self.stored | self._packed) - (reverted - self._packed)
        for op in network.get_ordered_ops():
            if op.get_friendly_name() in packed:
                _pack(op)
        _halve(network)
        network.validate_nodes_and_infer_types()
        return network

    def _restore(self, op: Any) -> None:
        """Give an operator of the quantized network its own float constants again."""
        own = self._float.get(op.get_friendly_name())
        if own is None:
            return
        for port, original in zip(op.inputs(), own.inputs(), strict=False):
            if (values := _values(original)) is not None:
                port.replace_source_output(_constant(values.copy()).output(0))

    def compile(self, reverted: frozenset[str], threads: int) -> Executable:
        outputs = [spec.name for spec in self._model.signature.outputs]
        return compile_graph(self._model.name, self.network(reverted), outputs, threads, self.facts.rest, "int8")

    def save(self, reverted: frozenset[str], folder: Path) -> None:
        save_network(self.network(reverted), folder / self.facts.graph)

    def saturated(self, reverted: frozenset[str], sample: Tensors) -> int | None:
        return None

    def layer_times(self, reverted: frozenset[str], threads: int) -> dict[str, float]:
        return network_times(self.network(reverted), self._model.probe(), threads, self.facts.rest)


def _facts(rest: str) -> VariantFacts:
    name = "int8-openvino" if rest == FLOAT else f"int8-{rest}-openvino"
    return VariantFacts(name, "int8", "openvino", "cpu", "model.xml.xz", rest)


def lacks() -> str:
    """What is missing for INT8 in OpenVINO; "" where nothing is."""
    for package in ("openvino", "nncf"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} (pip install 'triscope[optimize]')"
    return ""


def _quantize(model: Model, calibration: SampleStore, method: str) -> Any:
    if missing := lacks():
        raise BackendUnavailableError(f"INT8 for OpenVINO lacks {missing}")
    sys.modules.setdefault(TELEMETRY, None)  # type: ignore[arg-type]
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        network = _read(model)
    except RuntimeError as error:
        raise UnsupportedModelError(f"OpenVINO can't read {model.name!r}: {reason(error)}") from error
    kinds = [op.get_type_name() for op in network.get_ops()]
    if not set(kinds) & set(WEIGHTED):
        raise UnsupportedModelError(f"{model.name!r} has no layer that INT8 can compute (convolution, matrix product, LSTM)")
    if forks(network) and not network.is_dynamic():
        raise UnsupportedModelError(f"NNCF would compile {model.name!r} so that OpenVINO ends the process; export it with a free batch")
    ranges = {"minmax": RangeEstimatorParametersSet.MINMAX, "percentile": RangeEstimatorParametersSet.MEAN_QUANTILE}[method]
    options = AdvancedQuantizationParameters(
        overflow_fix=OverflowFix.ENABLE if host().saturates else OverflowFix.DISABLE,
        activations_range_estimator_params=ranges,
        disable_bias_correction=any(kind.startswith("LSTM") for kind in kinds),
    )
    transformer = kinds.count("Softmax") >= 2 and kinds.count("MatMul") > kinds.count("Convolution")
    names = {port.get_any_name() for port in network.inputs}

    def items() -> Iterator[Tensors]:
        for inputs in calibration:
            yield {name: value for name, value in inputs.items() if name in names}

    with _quiet(), signal_stack_kept():
        try:
            return nncf.quantize(
                network,
                nncf.Dataset(_Again(items)),
                subset_size=len(calibration),
                target_device=nncf.TargetDevice.CPU,
                model_type=nncf.ModelType.TRANSFORMER if transformer else None,
                ignored_scope=nncf.IgnoredScope(names=_arithmetic(network), types=list(RECURRENT), validate=False),
                advanced_parameters=options,
            )
        except Exception as error:
            raise UnsupportedModelError(f"NNCF can't quantize {model.name!r}: {' '.join(str(error).split())[:300]}") from error


def _arithmetic(network: Any) -> list[str]:
    """Names of operators that work out statistics (a spread is the small difference of two large means, then its root) or normalise
    by them. Eight bits leave nothing of such a number, and it is no work that INT8 would make faster."""
    found = set()
    for op in network.get_ordered_ops():
        kind = op.get_type_name()
        if kind in STATISTICS or (kind in DIFFERENCES and all(_values(port) is None for port in op.inputs())):
            found.add(op.get_friendly_name())
    for op in network.get_ordered_ops():
        if op.get_type_name() in SUMS:
            near = [port.get_source_output().get_node() for port in op.inputs()]
            near += [target.get_node() for target in op.output(0).get_target_inputs()]
            if any(other.get_friendly_name() in found for other in near):
                found.add(op.get_friendly_name())
    return sorted(found)


class _Again:
    """An iterable that starts anew each time."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Tensors]:
        return iter(self._make())


class _quiet:
    """NNCF draws its own progress bars; they are kept off the terminal."""

    def __enter__(self) -> None:
        import nncf.common.logging.track_progress as bars

        self._bars, self._real = bars, bars.track.__init__

        def hidden(bar: Any, *args: Any, **kwargs: Any) -> None:
            self._real(bar, *args, **{**kwargs, "disable": True})

        bars.track.__init__ = hidden

    def __exit__(self, *error: object) -> None:
        self._bars.track.__init__ = self._real


def _constant(values: Any) -> Any:
    from openvino import opset13

    return opset13.constant(values)


def _read(model: Model) -> Any:
    """The float network with constants folded: NNCF stores no weights in INT8 that a layer reads through a reshape.

    Operators that OpenVINO numbers anew with each reading have the same names each time. Raises RuntimeError.
    """
    from openvino.passes import ConstantFolding, Manager

    network = read_network(model.graph)
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(network)
    for place, op in enumerate(network.get_ordered_ops()):
        kind = op.get_type_name()
        if op.get_friendly_name().removeprefix(f"{kind}_").isdigit():
            op.set_friendly_name(f"{kind}_{place}")
    return network


def _float_operators(model: Model) -> dict[str, Any]:
    """The operators of the float network by name: what they read is what a layer goes back to."""
    return {op.get_friendly_name(): op for op in _read(model).get_ordered_ops()}


def _values(port: Any) -> Any:
    """The constant that an operator reads, in float32 where it is stored in half precision; None where it reads no constant."""
    source = port.get_source_output().get_node()
    if source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
        return source.data.astype(np.float32) if source.get_type_name() == "Constant" and source.data.dtype == np.float16 else None
    return source.data if source.get_type_name() == "Constant" else None


def _weights(op: Any) -> list[tuple[Any, tuple[int, ...]]]:
    """The ports of an operator that read float weights that gain from INT8, with their channel axes."""
    kind = op.get_type_name()
    ports: list[tuple[Any, tuple[int, ...]]] = []
    if kind in RECURRENT:
        ports = [(port, (1,)) for port in op.inputs()[-3:-1]]
    elif kind == "MatMul":
        ports = [(op.input(1), (-2 if op.get_attributes()["transpose_b"] else -1,))]
    elif kind in CHANNELS:
        ports = [(op.input(1), CHANNELS[kind])]
    read = [(port, axes, _values(port)) for port, axes in ports]
    return [(p, tuple(a % v.ndim for a in axes)) for p, axes, v in read if v is not None and fits_int8(v)]


def _pack(op: Any) -> None:
    """Store the weights that an operator reads in INT8. They are divided: what is multiplied OpenVINO takes for a layer in INT8."""
    from openvino import opset13

    for port, axes in _weights(op):
        stored, scale = int8_and_scale(_values(port), axes)
        port.replace_source_output(opset13.divide(opset13.convert(_constant(stored), "f32"), _constant(1 / scale)).output(0))


def _halve(network: Any) -> None:
    """Store float constants in half precision where it holds them, but for the ranges of quantizers.

    OpenVINO's own compression clips what half precision can't hold.
    """
    from openvino import opset13

    for op in network.get_ordered_ops():
        if op.get_type_name() != "Constant" or op.get_element_type().get_type_name() != "f32" or op.data.size < SHORTEST:
            continue
        targets = list(op.output(0).get_target_inputs())
        kinds = {target.get_node().get_type_name() for target in targets}
        if "FakeQuantize" in kinds or not holds_in_half(op.data, each=not kinds <= SUMMING):
            continue
        half = opset13.convert(_constant(op.data.astype(np.float16)), "f32")
        for target in targets:
            target.replace_source_output(half.output(0))


def _quantized(network: Any) -> list[Any]:
    """Operators that read a quantized tensor or weights stored in INT8."""
    return [
        op
        for op in network.get_ordered_ops()
        if op.get_type_name() != "FakeQuantize" and any(_reduced(port.get_source_output().get_node()) for port in op.inputs())
    ]


def _reduced(source: Any) -> bool:
    """Whether a tensor comes out of a quantizer, or out of integers that are scaled back."""
    kind = source.get_type_name()
    if kind in ("Multiply", "Subtract"):
        before = source.input_value(0).get_node()
        if kind == "Multiply" and before.get_type_name() == "Subtract":
            before = before.input_value(0).get_node()
        stored = before.input_value(0).get_node() if before.get_type_name() == "Convert" else None
        return stored is not None and stored.get_type_name() == "Constant" and stored.get_element_type().get_type_name() in ("i8", "u8")
    return bool(kind == "FakeQuantize")


def network_times(network: Any, inputs: Tensors, threads: int, rest: str) -> dict[str, float]:
    """Seconds of each node of an OpenVINO network in one run (median of five), by name."""
    import openvino

    properties = {"INFERENCE_PRECISION_HINT": HINTS[rest], "INFERENCE_NUM_THREADS": str(threads), "PERF_COUNT": "YES"}
    with signal_stack_kept():
        request = openvino.Core().compile_model(network, "CPU", properties | safe(network)).create_infer_request()
    runs: dict[str, list[float]] = {}
    for _ in range(6):
        request.infer(inputs)
        for info in request.profiling_info:
            runs.setdefault(info.node_name, []).append(info.real_time.total_seconds())
    return {name: float(np.median(times[1:])) for name, times in runs.items()}
