"""Reduced forms for an NVIDIA GPU through the torch backend: TF32, FP16 and, from Hopper on, FP8 (e4m3)."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shared_runtime.backends.base import Executable, backends
from shared_runtime.backends.torch_float8 import MULTIPLE, takes
from shared_runtime.errors import UnsupportedModelError
from shared_runtime.graph.check import read_whole
from shared_runtime.graph.lean import lean
from shared_runtime.graph.passes.base import PassRefused, plain_session, prepared
from shared_runtime.graph.passes.precision import to_float16
from shared_runtime.graph.passes.simplify import OpsetUpgrade
from shared_runtime.model import Model
from shared_runtime.quantization.samples import SampleStore
from shared_runtime.signature import Tensors
from shared_runtime.variants import Variant, VariantFacts

LARGEST_FLOAT8 = 448.0
_FLOAT8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
PRODUCTS = ("Gemm", "MatMul")
LAYERS = ("Conv", "ConvTranspose", *PRODUCTS)


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
        self._float = prepared(read_whole(model.graph))
        self._peaks = tensor_peaks(self._float, calibration)
        self.layers = tuple(node.name for node in self._float.graph.node if node.op_type in LAYERS)

    def proto(self, reverted: frozenset[str]) -> onnx.ModelProto:
        return to_float16(self._float, self._peaks, reverted)


class Float8(_TorchForm):
    """Products with a constant matrix in FP8 (e4m3, one scale for the matrix and one for what it is multiplied with), which the torch
    backend gives to the GPU's FP8 units; the rest, convolutions among it, in half precision.

    Scales are powers of two: a floating-point format loses nothing by that, and half precision holds them exactly.
    """

    passes = ("fp16", "fp8 e4m3")

    def __init__(self, model: Model, calibration: SampleStore, device: str = "cuda") -> None:
        super().__init__(model)
        self.facts = VariantFacts("float8-torch", "float8", "torch", device, "model.onnx")
        plain = prepared(read_whole(model.graph))
        with contextlib.suppress(PassRefused):
            OpsetUpgrade().apply(plain)  # FP8 in half precision is of operator set 19; the torch backend reads it in older ones too
        peaks = tensor_peaks(plain, calibration)
        self._half = to_float16(plain, peaks)
        constants = {item.name: item for item in self._half.graph.initializer if item.data_type == TensorProto.FLOAT16}
        sources = {node.name: node.input[0] for node in plain.graph.node if node.op_type in PRODUCTS}
        self._peaks = {
            node.name: peaks[sources[node.name]]
            for node in self._half.graph.node
            if node.op_type in PRODUCTS and node.input[1] in constants and sources[node.name] in peaks and takes(constants[node.input[1]])
        }
        self.layers = tuple(self._peaks)
        if not self.layers:
            raise UnsupportedModelError(f"{model.name!r} has no product with a constant matrix of sides that are multiples of {MULTIPLE}")

    @staticmethod
    def supported() -> bool:
        """Whether the GPU computes in FP8 (compute capability 8.9 or later)."""
        import torch

        return bool(torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))

    def proto(self, reverted: frozenset[str]) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(self._half)
        graph = proto.graph
        weights = {item.name: item for item in graph.initializer}
        zero = numpy_helper.from_array(np.array(0, _FLOAT8), "float8_zero")
        nodes: list[onnx.NodeProto] = []
        done: set[str] = set()
        for node in graph.node:
            if node.name in self._peaks and node.name not in reverted:
                source, weight = node.input[:2]
                if source not in done:
                    scale = _scale(self._peaks[node.name], f"{source}_scale")
                    graph.initializer.append(scale)
                    nodes.append(helper.make_node("QuantizeLinear", [source, scale.name, zero.name], [f"{source}_float8"]))
                    nodes.append(helper.make_node("DequantizeLinear", [f"{source}_float8", scale.name], [f"{source}_back"]))
                if weight not in done:
                    values = numpy_helper.to_array(weights[weight]).astype(np.float32)
                    scale = _scale(float(np.abs(values).max(initial=0)), f"{weight}_scale")
                    stored = (values / numpy_helper.to_array(scale).astype(np.float32)).astype(_FLOAT8)
                    graph.initializer.extend([numpy_helper.from_array(stored, f"{weight}_float8"), scale])
                    nodes.append(helper.make_node("DequantizeLinear", [f"{weight}_float8", scale.name], [f"{weight}_back"]))
                done |= {source, weight}
                node.input[0], node.input[1] = f"{source}_back", f"{weight}_back"
            nodes.append(node)
        graph.initializer.append(zero)
        used = {name for node in nodes for name in node.input}
        kept = [item for item in graph.initializer if item.name in used]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(kept)
        return proto


def _scale(peak: float, name: str) -> TensorProto:
    """The power of two that brings `peak` within FP8's range, as a constant in half precision."""
    exponent = np.ceil(np.log2(max(peak, 1e-12) / LARGEST_FLOAT8))
    return numpy_helper.from_array(np.array(2.0 ** np.clip(exponent, -24, 15), np.float16), name)


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
