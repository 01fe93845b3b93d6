"""OpenVINO on the CPU, held to the precision that was asked for: left alone it computes in bfloat16 on some CPUs."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import lzma
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.backends.base import Availability, Executable, precision_of, refuse_foreign, refuse_unknown_mode, zero_rows
from shared_runtime.backends.signal_stack import signal_stack_kept
from shared_runtime.backends.streams import StreamedExecutable
from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError
from shared_runtime.graph.check import has_subgraphs
from shared_runtime.host import host
from shared_runtime.model import Model
from shared_runtime.signature import Tensors
from shared_runtime.variants import FLOAT, Variant

HINTS = {FLOAT: "f32", "bfloat16": "bf16", "float16": "f16"}
UNPACK: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}
"""How a network's description is read; variants of earlier versions have it in .gz."""
MOST_SHAPES = 6
FUSING = "SNIPPETS_MODE"
NO_REGISTERS = "Not enough gp registers"
NO_FUSING = {FUSING: "DISABLE"}
"""Leave layers as they are where OpenVINO would make one kernel of several."""
ELEMENTWISE = (
    "Multiply",
    "Add",
    "Subtract",
    "Divide",
    "Relu",
    "PRelu",
    "Sigmoid",
    "Tanh",
    "Elu",
    "Gelu",
    "Swish",
    "HSwish",
    "Clamp",
    "FakeQuantize",
)
"""Layers that are fused into the one before them."""
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Relu", "MaxPool", "Concat", "Slice", "StridedSlice", "Gather", "Split")
SCALINGS = ("Convert", "Subtract", "Multiply")
"""Layers through which what is in INT8 stays so: those that move numbers about, and those that give them their scale back."""
CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
REDUCTIONS = {
    "ReduceMean": "reduce_mean",
    "ReduceMax": "reduce_max",
    "ReduceMin": "reduce_min",
    "ReduceSum": "reduce_sum",
    "ReduceProd": "reduce_prod",
    "ReduceL1": "reduce_l1",
    "ReduceL2": "reduce_l2",
}
CONSTANTS = ("Constant", "Convert")
"""What gives a scale or a bias, stored in half precision or not."""
MOST_COPIED = 1 << 18
"""A constant of more bytes stays shared by its layers."""
HALF_BYTE = 64
SOURCE_PLACES = re.compile(r"^Exception from \S+:$|^Check '.*' failed at \S+:$|^(FrontEnd API failed with )?\w*Failure:$", re.MULTILINE)
READ = "import sys, openvino; core = openvino.Core(); core.compile_model(core.read_model(sys.argv[1]), 'CPU')"
"""What is tried in a process of its own."""


class OpenVinoExecutable:
    """A compiled model for any shape, and one more for each shape it was prepared for; an infer request a thread.

    The one for any shape is compiled by `prepare_any`, or when a shape comes that was not prepared for; where its numbers would
    depend on earlier shapes, it computes INT8 in float.
    """

    device = "cpu"

    def __init__(self, network: Any, properties: dict[str, str], outputs: list[str], precision: str) -> None:
        self._network, self._properties, self._outputs, self.precision = network, properties, outputs, precision
        self._lock = threading.Lock()
        self._any: Any = None
        if not network.is_dynamic():
            self._general()
        self._prepared: dict[tuple[Any, ...], Any] = {}
        self._local = threading.local()

    def run(self, inputs: Tensors) -> Tensors:
        if (empty := zero_rows(self, inputs)) is not None:
            return empty
        try:
            results = self._request(inputs).infer(inputs, share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            shapes = {name: list(value.shape) for name, value in inputs.items()}
            raise UnsupportedModelError(f"OpenVINO failed on inputs of shape {shapes}: {reason(error)}") from error
        return {name: np.array(results[index]) for index, name in enumerate(self._outputs)}

    def run_at_once(self, parts: Sequence[Tensors]) -> list[Tensors]:
        """The outputs of several requests that run side by side, as far as the engine has streams."""
        requests = [self._request(part, place) for place, part in enumerate(parts)]
        try:
            for request, part in zip(requests, parts, strict=True):
                request.start_async(part, share_inputs=True)
            for request in requests:
                request.wait()
        except RuntimeError as error:
            raise UnsupportedModelError(f"OpenVINO failed on {len(parts)} parts: {reason(error)}") from error
        return [{name: np.array(r.get_output_tensor(i).data) for i, name in enumerate(self._outputs)} for r in requests]

    def specialise(self, inputs: Tensors) -> None:
        """Compile for exactly these shapes: the engine plans better when it knows them."""
        key = _shapes(inputs)
        if key in self._prepared or len(self._prepared) >= MOST_SHAPES or not self._network.is_dynamic():
            return
        self._prepared[key] = _compile(self._network.clone(), self._properties, {name: list(v.shape) for name, v in inputs.items()})

    def prepare_any(self) -> None:
        """Compile for any shape now, so that no request pays for it; it holds the weights once more."""
        self._general()

    def nodes(self, inputs: Tensors) -> dict[str, int]:
        """Operators of the compiled graph, by the implementation that runs them."""
        compiled = next(iter(self._prepared.values()), None) or self._general()
        kinds = (dict(op.get_rt_info()) for op in compiled.get_runtime_model().get_ordered_ops())
        return dict(Counter(str(k["runtimePrecision"].astype(str)) for k in kinds if "runtimePrecision" in k))

    def close(self) -> None:
        self._prepared.clear()
        del self._any, self._network
        self._local = threading.local()

    def _request(self, inputs: Tensors, place: int = 0) -> Any:
        key = _shapes(inputs) if self._prepared else None
        if key not in self._prepared:
            key = None
        requests = self._local.__dict__.setdefault("requests", {})
        if (key, place) not in requests:
            compiled = self._general() if key is None else self._prepared[key]
            requests[key, place] = compiled.create_infer_request()
        return requests[key, place]

    def _general(self) -> Any:
        with self._lock:
            if self._any is None:
                network, properties = self._network, self._properties
                if unsteady(network):
                    network = network.clone()
                    properties = properties | in_float(network)
                self._any = _compile(network, properties)
            return self._any


def _shapes(inputs: Tensors) -> tuple[Any, ...]:
    return tuple((name, inputs[name].shape) for name in sorted(inputs))


def _compile(network: Any, properties: dict[str, str], shapes: dict[str, list[int]] | None = None) -> Any:
    """Raises UnsupportedModelError where OpenVINO can't, BackendUnavailableError where it would compute in another precision."""
    import openvino

    try:
        if shapes:
            network.reshape(shapes)
        with signal_stack_kept():
            compiled = openvino.Core().compile_model(network, "CPU", properties)
    except RuntimeError as error:
        if NO_REGISTERS in str(error) and FUSING not in properties:  # for what it fuses into one kernel (AMX)
            return _compile(network, properties | NO_FUSING)
        raise UnsupportedModelError(f"OpenVINO can't compile {network.get_friendly_name()!r}: {reason(error)}") from error
    hint = "INFERENCE_PRECISION_HINT"
    chosen = str(compiled.get_property(hint).get_type_name())
    if chosen != properties[hint]:
        name = network.get_friendly_name()
        raise BackendUnavailableError(f"OpenVINO would compute {name!r} in {chosen}; {properties[hint]} was asked for")
    return compiled


class OpenVinoBackend:
    """The backend `openvino`."""

    name = "openvino"
    requires = "openvino"
    devices = ("cpu",)
    planned = ("cpu",)

    def availability(self, device: str) -> Availability:
        if importlib.util.find_spec("openvino") is None:
            return Availability(lacks="the package openvino (pip install openvino)")
        return Availability(version=importlib.metadata.version("openvino"))

    def modes(self, device: str) -> tuple[str, ...]:
        return ("", "streams")

    def compile(self, model: Model, device: str, threads: int, variant: Variant | None = None, mode: str = "") -> Executable:
        if lacks := self.availability(device).lacks:
            raise BackendUnavailableError(f"OpenVINO lacks {lacks}")
        refuse_foreign(self.name, device, variant)
        refuse_unknown_mode(self.name, device, mode, self.modes(device))
        graph = model.graph if variant is None else variant.graph(model.graph)
        rest = FLOAT if variant is None else variant.facts.rest
        outputs = [spec.name for spec in model.signature.outputs]
        streams = threads if mode == "streams" else 1
        executable = compile_graph(model.name, graph, outputs, threads, rest, precision_of(variant), streams)
        return executable if streams == 1 else StreamedExecutable(executable, streams, model.signature, model.name)


def compile_graph(
    name: str, graph: Path | Any, outputs: list[str], threads: int, rest: str, precision: str, streams: int = 1
) -> OpenVinoExecutable:
    """Compile an ONNX file, a file of `save_network` or an `openvino.Model`; what is not quantized computes in `rest`.

    Raises UnsupportedModelError where OpenVINO can't load it, BackendUnavailableError where it would compute in another precision.
    """

    properties = {
        "INFERENCE_PRECISION_HINT": HINTS[rest],
        "EXECUTION_MODE_HINT": "ACCURACY" if rest == FLOAT else "PERFORMANCE",
        "INFERENCE_NUM_THREADS": str(threads),
        **({"PERFORMANCE_HINT": "LATENCY"} if streams == 1 else {"NUM_STREAMS": str(streams)}),
    }
    try:
        network = read_network(graph) if isinstance(graph, Path) else graph
    except (RuntimeError, OSError, EOFError, lzma.LZMAError) as error:
        raise UnsupportedModelError(f"OpenVINO can't load {name!r}: {reason(error)}") from error
    network.set_friendly_name(name)
    mend(network)
    if host().saturates and fills_bytes(network):
        properties |= in_float(network)  # its kernels would saturate
    return OpenVinoExecutable(network, properties | safe(network), outputs, precision)


def mend(network: Any) -> None:
    """Change a network in place so that OpenVINO fuses what it can, and rightly."""
    unshare_constants(network)
    part_layers(network)


def safe(network: Any) -> dict[str, str]:
    """Properties without which OpenVINO would end the process while it compiles a network, or compute other numbers.

    OpenVINO 2026.4 takes a chain of dense layers on rows for one kernel where it knows that there are few (`TokenizeMLPSeqSnippets`).
    Where more than one layer reads a value on the way it then reads past what is there: a segmentation fault when the network is
    compiled. In INT8, on some processors, it gives other numbers.
    """
    depth, forked = dense_chain(network)
    return NO_FUSING if depth > 1 and (forked or is_quantized(network)) else {}


def unsteady(network: Any) -> bool:
    """Whether numbers of a network compiled for any shape depend on the shapes that it was given before.

    OpenVINO 2026.4 does so in INT8 on AMX, with a convolution over one axis behind another: few rows are wrong after many.
    """
    if "amx_int8" not in host().vector or not network.is_dynamic() or not is_quantized(network):
        return False
    ranks = [node.get_output_partial_shape(0).rank for node in network.get_ops() if node.get_type_name() in CONVOLUTIONS]
    return any(rank.is_dynamic or rank.get_length() == 3 for rank in ranks)


def in_float(network: Any) -> dict[str, str]:
    """Have a quantized network round where it is quantized and compute in float, in place; the properties that this takes as well.

    Rounding is written out: OpenVINO 2026.4 takes a quantizer's ranges of other channels where it knows no sizes and computes in float.
    """
    for node in network.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize":
            _write_out(node)
    network.validate_nodes_and_infer_types()
    return {"LP_TRANSFORMS_MODE": "NO"}


def _write_out(quantizer: Any) -> None:
    """Put what a quantizer computes in its place; one whose ranges are computed is left."""
    from openvino import opset13

    ranges = [constant(quantizer.input_value(place).get_node()) for place in range(1, 5)]
    if any(value is None for value in ranges):
        return
    low, high, least, most = (value.astype(np.float32) for value in ranges)
    steps = quantizer.get_attributes()["levels"] - 1
    inside = opset13.minimum(opset13.maximum(quantizer.input_value(0), opset13.constant(low)), opset13.constant(high))
    scale = (steps / np.maximum(high - low, 1e-30)).astype(np.float32)
    level = opset13.round(opset13.multiply(opset13.subtract(inside, opset13.constant(low)), opset13.constant(scale)), "half_to_even")
    back = opset13.multiply(level, opset13.constant(((most - least) / steps).astype(np.float32)))
    _take_over(opset13.add(back, opset13.constant(least)), quantizer)


def is_quantized(network: Any) -> bool:
    """Whether a network holds quantizers."""
    return any(node.get_type_name() == "FakeQuantize" for node in network.get_ops())


def part_layers(network: Any) -> None:
    """Keep apart layers that OpenVINO fuses wrongly, in place.

    OpenVINO 2026.4 fuses numbers a channel (scales, biases, ranges of quantizers) into reductions, in float as well, and into products of
    two computed matrices in INT8, and takes those of other channels, or what lies behind them in memory: from the second row or head on.
    What it sums in INT8 loses its zero point.
    """
    for node in network.get_ordered_ops():
        kind = node.get_type_name()
        reduced = kind in REDUCTIONS and _comes_quantized(node.input_value(0).get_node())
        if reduced:
            node.input(0).replace_source_output(_apart(node.input_value(0)).output(0))
        if reduced or ((kind in REDUCTIONS or kind == "MatMul") and _scaled_amiss(node)):
            uses, names = node.output(0).get_target_inputs(), node.output(0).get_names()
            after = _apart(node.output(0))
            for use in uses:
                use.replace_source_output(after.output(0))
            after.output(0).set_names(names)
    network.validate_nodes_and_infer_types()


def _comes_quantized(node: Any) -> bool:
    """Whether a value is a quantizer's, scaled and moved about."""
    while (kind := node.get_type_name()) in MOVES or kind in SCALINGS:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def _apart(value: Any) -> Any:
    """The same numbers by a layer that no other is fused into, since it reads them twice, and that takes none in INT8."""
    from openvino import opset13

    return opset13.maximum(value, value)


def _scaled_amiss(node: Any) -> bool:
    """Whether what is fused into a layer has a number for each place along an axis (any, or, behind weights, one that is not theirs),
    or quantizes what was reduced."""
    product = node.get_type_name() == "MatMul"
    own, rank = product and _weights(node.input_value(1).get_node()), node.get_output_partial_shape(0).rank
    if product and rank.is_static and rank.get_length() < 3:
        return False
    while len(uses := node.output(0).get_target_inputs()) == 1:
        node = next(iter(uses)).get_node()
        known = [constant(node.input_value(place).get_node()) for place in range(node.get_input_size())]
        if node.get_type_name() not in ELEMENTWISE or sum(values is None for values in known) != 1:
            return False
        if not product and node.get_type_name() == "FakeQuantize":
            return True
        if any(values is not None and values.size > (values.shape[-1] if own and values.ndim else 1) for values in known):
            return True
    return False


def _take_over(made: Any, node: Any) -> None:
    """Give the layers that read a node, and its names, to another."""
    uses, names = node.output(0).get_target_inputs(), node.output(0).get_names()
    made.set_friendly_name(node.get_friendly_name())
    for use in uses:
        use.replace_source_output(made.output(0))
    made.output(0).set_names(names)


def forks(network: Any) -> bool:
    """Whether a chain of dense layers on rows has a value that more than one layer reads, as blocks with a way around them have."""
    depth, forked = dense_chain(network)
    return depth > 1 and forked


def dense_chain(network: Any) -> tuple[int, bool]:
    """How many dense layers on rows follow each other at most, and whether more than one layer reads a value on their way."""
    depth: dict[str, int] = {}  # dense layers up to a value, by what makes it
    deepest, forked = 0, False
    for node in network.get_ordered_ops():
        rank = node.get_output_partial_shape(0).rank if node.get_output_size() else None
        if rank is None or (rank.is_static and rank.get_length() > 2):
            continue
        name, kind = node.get_friendly_name(), node.get_type_name()
        sources = [node.input_value(place).get_node() for place in range(node.get_input_size())]
        if kind == "MatMul" and _weights(sources[1]):
            depth.setdefault(sources[0].get_friendly_name(), 0)
            depth[name] = depth[sources[0].get_friendly_name()] + 1
            forked = forked or _read_elsewhere(sources[0])
        elif kind != "ShapeOf" and (before := [depth[n] for source in sources if (n := source.get_friendly_name()) in depth]):
            depth[name] = max(before)
        if name in depth:
            deepest, forked = max(deepest, depth[name]), forked or _readers(node) > 1
    return deepest, forked


def _weights(node: Any) -> bool:
    """Whether a node gives weights, also such as are quantized or scaled back."""
    stored = node
    while stored.get_type_name() in ("Multiply", "Subtract", "FakeQuantize", "Convert", "Reshape"):
        stored = stored.input_value(0).get_node()
    return bool(stored.get_type_name() == "Constant")


def _read_elsewhere(node: Any) -> bool:
    """Whether another layer as well reads what a dense layer is given, or what that is made of: activated, scaled, quantized."""
    while _readers(node) == 1:
        sources = [node.input_value(place).get_node() for place in range(node.get_input_size())]
        values = [source for source in sources if source.get_type_name() not in CONSTANTS]
        if len(values) != 1 or node.get_type_name() == "MatMul":
            break
        node = values[0]
    return _readers(node) > 1


def _readers(node: Any) -> int:
    """How many layers read what a layer gives."""
    return sum(use.get_node().get_type_name() != "ShapeOf" for use in node.output(0).get_target_inputs())


def reason(error: BaseException) -> str:
    """What OpenVINO says went wrong, on one line, without the places in its source code that it says it at."""
    text = str(error)
    said = text.rpartition("Summary:")[2] if "Summary:" in text else SOURCE_PLACES.sub("", text)
    return " ".join(said.replace("-- ", "").split())[:400] or " ".join(text.split())[:400]


def unshare_constants(network: Any) -> int:
    """Give each layer small constants of its own, in place; the number of copies made.

    OpenVINO fuses a bias, and then the activation and the sum behind it, into a convolution only where no other layer reads that bias
    (`GraphOptimizer::FuseConvolutionMatMulDeconvAndBias`). Networks that run the same weights twice (scales of an image, pairs) share them.
    """
    from openvino.op import Constant

    copies = 0
    for node in network.get_ordered_ops():
        if not isinstance(node, Constant) or node.get_element_type().get_type_name() not in ("f32", "f16"):
            continue
        uses = sorted(node.output(0).get_target_inputs(), key=lambda use: (use.get_node().get_friendly_name(), use.get_index()))
        if len(uses) > 1 and node.get_byte_size() <= MOST_COPIED:
            for use in uses[1:]:
                use.replace_source_output(Constant(node.data.copy()).output(0))
            copies += len(uses) - 1
    return copies


def fills_bytes(network: Any) -> bool:
    """Whether weights that are quantized take more than half of the 8 bits: as integers behind a scale, or as floats that are rounded."""
    return any(_reach(node) > HALF_BYTE for node in network.get_ordered_ops() if node.get_type_name() in ("Multiply", "FakeQuantize"))


def _reach(scaled: Any) -> float:
    """The largest distance from zero [levels] of the weights that a quantizer or a scale gives; 0 where it gives no weights."""
    source = scaled.input_value(0).get_node()
    if scaled.get_type_name() == "FakeQuantize":
        values, (low, high) = constant(source), (constant(scaled.input_value(place).get_node()) for place in (1, 2))
        if values is None or low is None or high is None:
            return 0.0
        inside = np.clip(values, low, high)
        return float(np.max(np.abs(inside) / np.maximum(np.maximum(np.abs(low), np.abs(high)), 1e-30)) * 127)
    zero: Any = np.zeros(())
    if source.get_type_name() == "Subtract":
        zero, source = constant(source.input_value(1).get_node()), source.input_value(0).get_node()
    stored = source.input_value(0).get_node() if source.get_type_name() == "Convert" else None
    if zero is None or stored is None or stored.get_element_type().get_type_name() not in ("i8", "u8"):
        return 0.0
    values = constant(stored)
    return 0.0 if values is None else float(np.abs(values.astype(np.float32) - zero).max(initial=0))


def constant(node: Any) -> Any:
    """The values of a constant, converted to float32 and reshaped where that follows; None for another node."""
    kind = node.get_type_name()
    if kind == "Constant":
        return node.data
    if kind not in ("Convert", "Reshape", "Unsqueeze", "Squeeze") or (values := constant(node.input_value(0).get_node())) is None:
        return None
    return values.astype(np.float32) if kind == "Convert" else values.reshape(list(node.output(0).get_shape()))


@lru_cache(maxsize=64)
def _killer(path: Path, changed: int) -> int:
    """The signal that ends a process in which OpenVINO reads and compiles a graph, or 0: some loops (ONNX's Scan) do that to it."""
    ended = subprocess.run([sys.executable, "-c", READ, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return max(0, -ended.returncode)


def save_network(network: Any, path: Path) -> None:
    """Write an `openvino.Model`: its description to `path` (.xml.xz: plain, it may outweigh small weights), its weights beside."""
    import openvino

    plain = path.with_suffix("")
    openvino.save_model(network, str(plain), compress_to_fp16=False)
    path.write_bytes(lzma.compress(plain.read_bytes()))
    plain.unlink()


def read_network(path: Path) -> Any:
    """An `openvino.Model` from what `save_network` wrote, or from any file that OpenVINO reads.

    Raises RuntimeError as it does, UnsupportedModelError where it would crash."""
    import openvino

    if path.suffix not in UNPACK:
        if path.suffix == ".onnx" and has_subgraphs(path) and (signal := _killer(path, path.stat().st_mtime_ns)):
            raise UnsupportedModelError(f"OpenVINO would end this process by signal {signal} when it reads {path.name}")
        return openvino.Core().read_model(str(path))
    weights = np.fromfile(path.with_suffix("").with_suffix(".bin"), np.uint8)
    return openvino.Core().read_model(UNPACK[path.suffix](path.read_bytes()), weights.tobytes())
