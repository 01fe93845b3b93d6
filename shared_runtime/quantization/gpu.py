"""Reduced forms for an NVIDIA GPU through the torch backend: TF32, FP16 and, from Hopper on, FP8 (e4m3)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shared_runtime.backends.base import Executable, backends
from shared_runtime.errors import UnsupportedModelError
from shared_runtime.graph.lean import lean
from shared_runtime.graph.passes.base import plain_session, prepared
from shared_runtime.graph.passes.precision import to_float16
from shared_runtime.model import Model
from shared_runtime.quantization.samples import SampleStore
from shared_runtime.signature import Tensors
from shared_runtime.variants import Variant, VariantFacts

LARGEST_FLOAT8 = 448.0
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class _TorchForm:
    """A form that the torch backend runs from an ONNX graph."""

    facts: VariantFacts
    layers: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()

    def __init__(self, model: Model) -> None:
        self._model = model
        self._work = tempfile.TemporaryDirectory(prefix="triscope-gpu-")

    def proto(self, reverted: frozenset[str]) -> onnx.ModelProto | None:
        """The graph with those layers in float; None where the float graph itself is run."""
        return None

    def compile(self, reverted: frozenset[str], threads: int) -> Executable:
        folder = Path(self._work.name)
        self.save(reverted, folder)
        return backends()["torch"].compile(self._model, self.facts.device, threads, Variant(self.facts, folder))

    def save(self, reverted: frozenset[str], folder: Path) -> None:
        proto = self.proto(reverted)
        if proto is not None:
            onnx.save(lean(proto), folder / self.facts.graph)

    def saturated(self, reverted: frozenset[str], sample: Tensors) -> int | None:
        return None

    def layer_times(self, reverted: frozenset[str], threads: int) -> dict[str, float]:
        return {}


class Tf32(_TorchForm):
    """Matrix products and convolutions in TF32: 10 bits of mantissa, by name instead of by default."""

    facts = VariantFacts("tf32-torch", "tf32", "torch", "cuda")
    passes = ("engine precision",)


class Float16(_TorchForm):
    """Weights and activations in half precision; layers whose values overflow on the calibration set stay in float."""

    facts = VariantFacts("float16-torch", "float16", "torch", "cuda", "model.onnx")
    passes = ("fp16",)

    def __init__(self, model: Model, calibration: SampleStore, device: str = "cuda") -> None:
        super().__init__(model)
        self.facts = VariantFacts("float16-torch", "float16", "torch", device, "model.onnx")
        self._float = prepared(onnx.load(str(model.graph)))
        self._peaks = tensor_peaks(self._float, calibration)
        self.layers = tuple(node.name for node in self._float.graph.node if node.op_type in LAYERS)

    def proto(self, reverted: frozenset[str]) -> onnx.ModelProto:
        return to_float16(self._float, self._peaks, reverted)


class Float8(_TorchForm):
    """Weights (a scale a channel) and activations (one scale) of matrix products and convolutions in e4m3, the rest in half
    precision. torch multiplies what was rounded to FP8 in half precision: the size and the values of FP8, not its speed."""

    passes = ("fp8 e4m3",)

    def __init__(self, model: Model, calibration: SampleStore, device: str = "cuda") -> None:
        super().__init__(model)
        self.facts = VariantFacts("float8-torch", "float8", "torch", device, "model.onnx")
        self._float = prepared(onnx.load(str(model.graph)))
        self._peaks = tensor_peaks(self._float, calibration)
        constant = {item.name for item in self._float.graph.initializer}
        self.layers = tuple(
            node.name
            for node in self._float.graph.node
            if node.op_type in LAYERS and node.input[1] in constant and node.input[0] in self._peaks
        )
        if not self.layers:
            raise UnsupportedModelError(f"{model.name!r} has no layer for FP8 ({', '.join(LAYERS)} with constant weights)")

    @staticmethod
    def supported() -> bool:
        """Whether the GPU computes in FP8 (compute capability 8.9 or later)."""
        import torch

        return bool(torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))

    def proto(self, reverted: frozenset[str]) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(self._float)
        weights = {item.name: item for item in proto.graph.initializer}
        nodes: list[onnx.NodeProto] = []
        done: set[str] = set()
        zero = helper.make_tensor("float8_zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
        for node in proto.graph.node:
            if node.name in self.layers and node.name not in reverted:
                source, weight = node.input[0], node.input[1]
                tag = f"{source}_float8"
                if tag not in done:
                    scale = np.float32(max(self._peaks[source], 1e-12) / LARGEST_FLOAT8)
                    proto.graph.initializer.append(numpy_helper.from_array(np.array(scale), f"{tag}_scale"))
                    nodes.append(helper.make_node("QuantizeLinear", [source, f"{tag}_scale", zero.name], [tag]))
                    nodes.append(helper.make_node("DequantizeLinear", [tag, f"{tag}_scale"], [f"{tag}_back"]))
                    done.add(tag)
                if weight not in done:
                    nodes.append(_weight_node(proto, weights[weight], node))
                    done.add(weight)
                node.input[0], node.input[1] = f"{tag}_back", f"{weight}_back"
            nodes.append(node)
        proto.graph.initializer.append(zero)
        used = {name for node in nodes for name in node.input}
        kept = [item for item in proto.graph.initializer if item.name in used]
        del proto.graph.node[:], proto.graph.initializer[:]
        proto.graph.node.extend(nodes)
        proto.graph.initializer.extend(kept)
        return proto


def _weight_node(proto: onnx.ModelProto, item: TensorProto, node: onnx.NodeProto) -> onnx.NodeProto:
    """Store a weight in FP8 with one scale a channel; the node that gives it back."""
    values = numpy_helper.to_array(item)
    axis = 0 if node.op_type == "Conv" else 1 if node.op_type == "ConvTranspose" else values.ndim - 1
    if node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
        axis = 0
    others = tuple(a for a in range(values.ndim) if a != axis)
    scale = np.maximum(np.abs(values).max(axis=others) / LARGEST_FLOAT8, 1e-12).astype(np.float32)
    shape = [-1 if a == axis else 1 for a in range(values.ndim)]
    stored = helper.make_tensor(f"{item.name}_float8", TensorProto.FLOAT8E4M3FN, values.shape, (values / scale.reshape(shape)).ravel())
    proto.graph.initializer.extend([stored, numpy_helper.from_array(scale, f"{item.name}_scale")])
    return helper.make_node("DequantizeLinear", [stored.name, f"{item.name}_scale"], [f"{item.name}_back"], axis=axis)


def tensor_peaks(proto: onnx.ModelProto, calibration: SampleStore) -> dict[str, float]:
    """The largest magnitude of every float tensor of a graph over the calibration set, one sample in memory at a time."""
    probe = onnx.ModelProto()
    probe.CopyFrom(onnx.shape_inference.infer_shapes(proto))
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*probe.graph.value_info, *probe.graph.output)}
    names = [n for node in probe.graph.node for n in node.output if n and kinds.get(n) == TensorProto.FLOAT]
    present = {output.name for output in probe.graph.output}
    peaks = [f"{name}__peak" for name in names]
    for name, peak in zip(names, peaks, strict=True):
        probe.graph.node.append(helper.make_node("Abs", [name], [f"{name}__abs"]))
        probe.graph.node.append(helper.make_node("ReduceMax", [f"{name}__abs"], [peak], keepdims=0))
    probe.graph.output.extend(helper.make_empty_tensor_value_info(peak) for peak in peaks if peak not in present)
    session = plain_session(probe, optimised=True)
    found: dict[str, float] = {}
    for inputs in calibration:
        for name, value in inputs.items():
            if value.dtype.kind == "f":
                found[name] = max(found.get(name, 0.0), float(np.abs(value).max(initial=0)))
        for name, value in zip(names, session.run(peaks, inputs), strict=True):
            found[name] = max(found.get(name, 0.0), float(value))
    return found
