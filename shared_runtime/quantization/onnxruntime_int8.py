"""INT8 for ONNX Runtime: static (QDQ or operator form), dynamic, and weights alone."""

from __future__ import annotations

import copy
import io
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Self

import onnx

from shared_runtime.backends.base import Executable
from shared_runtime.backends.onnxruntime import compile_file, profiled_run
from shared_runtime.errors import UnsupportedModelError
from shared_runtime.graph.check import read_whole
from shared_runtime.graph.lean import lean
from shared_runtime.graph.passes.base import attribute, prepared
from shared_runtime.host import host
from shared_runtime.model import Model
from shared_runtime.quantization.forms import BETWEEN
from shared_runtime.quantization.ranges import measure_ranges
from shared_runtime.quantization.samples import SampleStore
from shared_runtime.quantization.saturation import count_saturation
from shared_runtime.quantization.storage import RECURRENT, SMALLEST, halve, pack, weights, weighty
from shared_runtime.signature import Tensors
from shared_runtime.variants import DYNAMIC, VariantFacts

STATIC_KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
BIASED_KINDS = (*STATIC_KINDS, "InstanceNormalization", "LayerNormalization", "BatchNormalization")
DYNAMIC_KINDS = ("Gemm", "MatMul", "LSTM")
SPLIT = "_MatMul"
"""ONNX Runtime's dynamic quantizer takes a Gemm apart before it looks for the names: its product has this at the end."""


class _OnnxForm:
    """What the three have in common: a graph that is built anew for the layers put back to float.

    Layers of kinds that it can't compute in INT8 (`stored`) have their weights in INT8 until they are put back.
    """

    facts: VariantFacts
    layers: tuple[str, ...]
    passes: tuple[str, ...]
    stored: frozenset[str] = frozenset()
    _packed: frozenset[str] = frozenset()

    def __init__(self, model: Model, facts: VariantFacts) -> None:
        self._model, self.facts = model, facts
        self._work = tempfile.TemporaryDirectory(prefix="triscope-int8-")

    def packed(self, layers: frozenset[str]) -> Self:
        """The same form that stores the weights of these layers in INT8 where it computes them in float."""
        other = copy.copy(self)
        other._packed = layers
        return other

    def proto(self, reverted: frozenset[str]) -> onnx.ModelProto:
        """The quantized graph with those layers in float; its float constants are in half precision."""
        proto = self._quantized(reverted)
        whole = reverted - self._packed
        packed = (self.stored | self._packed) - whole
        named = [(node.name if node.name in self.layers else node.name.removesuffix(SPLIT), weights(node)) for node in proto.graph.node]
        kept = {weight for name, owned in named if name in whole for weight, _ in owned}
        pack(proto, {weight: axis for name, owned in named if name in packed for weight, axis in owned if weight not in kept})
        halve(proto)
        return proto

    def _quantized(self, reverted: frozenset[str]) -> onnx.ModelProto:
        """The graph as the quantizer makes it."""
        raise NotImplementedError

    def compile(self, reverted: frozenset[str], threads: int) -> Executable:
        path = Path(self._work.name) / "candidate.onnx"
        onnx.save(self.proto(reverted), path)
        return compile_file(self._model.name, path, "cpu", threads, self.facts.precision)

    def save(self, reverted: frozenset[str], folder: Path) -> None:
        onnx.save(lean(self.proto(reverted)), folder / self.facts.graph)

    def saturated(self, reverted: frozenset[str], sample: Tensors) -> int | None:
        return None

    def layer_times(self, reverted: frozenset[str], threads: int) -> dict[str, float]:
        path = Path(self._work.name) / "timed.onnx"
        onnx.save(self.proto(reverted), path)
        return node_times(self._model, path, threads)


class StaticInt8(_OnnxForm):
    """Weights and activations in INT8 with ranges from the calibration set, a channel at a time."""

    def __init__(
        self, model: Model, calibration: SampleStore, method: str = "minmax", operators: bool = False, half: bool | None = None
    ) -> None:
        """`half`: weights take half of their range, by default where the processor saturates on all of it."""
        name = "int8-onnxruntime-operators" if operators else "int8-onnxruntime"
        super().__init__(model, VariantFacts(name, "int8", "onnxruntime", "cpu", "model.onnx"))
        self._operators, self._half = operators, host().saturates if half is None else half
        self.passes = (f"onnxruntime {'operator' if operators else 'QDQ'} {method}", *(("half range weights",) if self._half else ()))
        self._prepared = _prepared(model, Path(self._work.name))
        _unshare(self._prepared, BIASED_KINDS)
        proto = onnx.load(self._prepared)
        # ONNX Runtime's quantizer gives a transposed convolution in groups too few scales.
        grouped = {n.name for n in proto.graph.node if n.op_type == "ConvTranspose" and attribute(n, "group", 1) > 1}
        layers = frozenset(_layers(proto, STATIC_KINDS)) - grouped
        if not layers:
            raise UnsupportedModelError(f"{model.name!r} has no layer that INT8 can compute ({', '.join(STATIC_KINDS)})")
        with _silent(), _refusing(model.name):
            self._ranges = measure_ranges(self._prepared, calibration, method, Path(self._work.name))
        self._unfit = self._ranges.unfit(proto.graph, layers)
        self.layers = tuple(node.name for node in proto.graph.node if node.name in layers - self._unfit)
        self.stored = frozenset(weighty(proto, (*RECURRENT, "Gather"))) | grouped | (layers & self._unfit)
        self._between = frozenset(node.name for node in proto.graph.node) - set(self.layers)
        self.layers = (*self.layers, *sorted(self.stored), BETWEEN)

    def _quantized(self, reverted: frozenset[str]) -> onnx.ModelProto:
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

        common: dict[str, Any] = {
            "per_channel": True,
            "reduce_range": self._half,
            "weight_qType": QuantType.QInt8,
            "activation_qType": QuantType.QUInt8,
            "tensors_range": self._ranges.data,
            "nodes_to_quantize": [],
            "nodes_to_exclude": sorted(reverted | self.stored | self._unfit | (self._between if BETWEEN in reverted else set())),
            "op_types_to_quantize": [kind for kind in (QLinearOpsRegistry if self._operators else QDQRegistry) if kind != "Softmax"],
            "extra_options": {"DefaultTensorType": onnx.TensorProto.FLOAT},
        }
        proto = onnx.load(self._prepared)
        with _silent(), _refusing(self._model.name):
            if self._operators:
                quantizer = ONNXQuantizer(proto, mode=_mode("QLinearOps"), static=True, **common)
            else:
                quantizer = QDQQuantizer(proto, **common)
            quantizer.quantize_model()
        return _float_softmax(quantizer.model.model)

    def saturated(self, reverted: frozenset[str], sample: Tensors) -> int | None:
        return sum(layer.saturated for layer in count_saturation(self.proto(reverted), sample))


def _float_softmax(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with each Softmax on what was not rounded: ONNX Runtime's in INT8 (`QLinearSoftmax`) wraps around where a share is
    above those of the calibration set, so that what a sharper attention looks at most counts for nothing."""
    maker = {name: node for node in proto.graph.node for name in node.output}
    passed = []
    for node in proto.graph.node:
        back = maker.get(node.input[0]) if node.op_type == "Softmax" else None
        rounded = maker.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
        if back is not None and rounded is not None and rounded.op_type == "QuantizeLinear":
            node.input[0] = rounded.input[0]
            passed += [back, rounded]
    read = {name for node in proto.graph.node for name in node.input} | {output.name for output in proto.graph.output}
    for node in passed:  # a way back before what it takes back
        if node.output[0] not in read and node in proto.graph.node:
            proto.graph.node.remove(node)
            read = {name for node in proto.graph.node for name in node.input} | {output.name for output in proto.graph.output}
    return proto


class DynamicInt8(_OnnxForm):
    """Weights in INT8, activations quantized from each request's own range: for matrix products and LSTM."""

    passes = ("onnxruntime dynamic",)

    def __init__(self, model: Model) -> None:
        super().__init__(model, VariantFacts(DYNAMIC, "int8", "onnxruntime", "cpu", "model.onnx"))
        self._prepared = _prepared(model, Path(self._work.name))
        _unshare(self._prepared, ("Gemm", "MatMul"))
        proto = onnx.load(self._prepared)
        self.layers = _layers(proto, DYNAMIC_KINDS)
        if not self.layers:
            raise UnsupportedModelError(f"{model.name!r} has no layer for dynamic INT8 ({', '.join(DYNAMIC_KINDS)} with constant weights)")
        self.stored = frozenset(weighty(proto, ("Conv", "ConvTranspose", "GRU", "RNN", "Gather")))
        self.layers = (*self.layers, *sorted(self.stored))

    def _quantized(self, reverted: frozenset[str]) -> onnx.ModelProto:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with _silent(), _refusing(self._model.name):
            path = Path(self._work.name) / "dynamic.onnx"
            quantize_dynamic(
                self._prepared,
                path,
                op_types_to_quantize=list(DYNAMIC_KINDS),
                per_channel=True,
                reduce_range=host().saturates,
                weight_type=QuantType.QInt8,
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
                nodes_to_exclude=sorted(reverted | {f"{name}{SPLIT}" for name in reverted}),
            )
        return onnx.load(path)


class WeightOnlyInt8(_OnnxForm):
    """Weights stored in INT8, symmetric, one scale a channel, and computed in float: a quarter of the size, nearly the float values."""

    passes = ("weights alone", "balanced rounding")

    def __init__(self, model: Model) -> None:
        super().__init__(model, VariantFacts("int8-weights", "int8 weights", "onnxruntime", "cpu", "model.onnx"))
        self._prepared = _prepared(model, Path(self._work.name))
        self.layers = weighty(onnx.load(self._prepared))
        if not self.layers:
            raise UnsupportedModelError(f"{model.name!r} has no layer with constant weights of {SMALLEST} elements or more")
        self.stored = frozenset(self.layers)

    def _quantized(self, reverted: frozenset[str]) -> onnx.ModelProto:
        return onnx.load(self._prepared)


def _prepared(model: Model, folder: Path) -> Path:
    """The float graph with shapes inferred and every node named, as the quantizers need it."""
    proto = prepared(read_whole(model.graph))
    try:
        proto = onnx.shape_inference.infer_shapes(proto)
    except Exception as error:
        raise UnsupportedModelError(f"shapes of {model.name!r} can't be inferred: {error}") from error
    path = folder / "prepared.onnx"
    onnx.save(proto, path)
    return path


def _unshare(path: Path, kinds: tuple[str, ...]) -> None:
    """Give every node of these kinds its own constants. ONNX Runtime's dynamic quantizer transposes a Gemm's
    weights in place, once for each that shares them; the static one gives a layer in float the INT8 weights of one that shares them, and
    numbers shared biases with names that other tensors may have. Equal constants are merged again where a graph is saved."""
    proto = onnx.load(path)
    constants = {item.name: item for item in proto.graph.initializer}
    seen: set[str] = set()
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            if node.op_type in kinds and name in constants and name in seen:
                copy = onnx.TensorProto()
                copy.CopyFrom(constants[name])
                copy.name = f"{name}_of_{node.name}_{place}"
                proto.graph.initializer.append(copy)
                node.input[place] = copy.name
            seen.add(name)
    onnx.save(proto, path)


def _layers(proto: onnx.ModelProto, kinds: tuple[str, ...]) -> tuple[str, ...]:
    constant = {item.name for item in proto.graph.initializer}
    return tuple(n.name for n in proto.graph.node if n.op_type in kinds and any(name in constant for name in n.input))


def _mode(name: str) -> Any:
    from onnxruntime.quantization.quant_utils import QuantizationMode

    return QuantizationMode[name]


@contextmanager
def _silent() -> Iterator[None]:
    """ONNX Runtime's quantizer warns on the root logger about what is done here on purpose."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):  # its calibrators print
            yield
    finally:
        root.setLevel(level)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """An error within ONNX Runtime's quantizer is a refusal of this form of the model."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"ONNX Runtime's quantizer can't convert {name!r}: {' '.join(str(error).split())[:300]}") from error


def node_times(model: Model, path: Path, threads: int) -> dict[str, float]:
    """Seconds of each node of an ONNX graph in one run, by the name it had before ONNX Runtime fused it."""
    times: dict[str, float] = {}
    runs = 5
    for event in profiled_run(model.name, path, model.probe(), "cpu", threads, runs):
        name = event["name"].removesuffix("_kernel_time").removesuffix("_nchwc").removesuffix("_quant")
        times[name] = times.get(name, 0.0) + event["dur"] / 1e6 / runs
    return times
