"""Is a file an ONNX graph that can be trusted and run: readable, complete, nothing outside its folder, every operator known."""

from __future__ import annotations

import functools
import hashlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from shared_runtime.errors import ModelIntegrityError, UnsupportedModelError
from shared_runtime.host import host

OLDEST, IR, UNLISTED = 7, 8, 4
"""The oldest standard operators that ONNX Runtime knows; the file format of what is written anew, and the first one whose weights need not
be listed among the inputs (exporters left them out before, and engines never minded)."""
_FLOATS = {
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
}
MANY = 64
"""Floats in a constant from which on it is a weight, whoever reads it: its values do not matter to how long a graph takes."""
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "PRelu"}
WEIGHTED |= {f"{kind}Normalization" for kind in ("Batch", "Instance", "Layer", "Group")}
ARITHMETIC = {"Add", "Sub", "Mul", "Div"}
"""Their constants of several floats are weights; a single one may be part of what engines fuse, such as a GELU."""
DEQUANTIZE = "DequantizeLinear"
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ROUNDS_WEIGHTS = "WeightBiasQuantization"
"""ONNX Runtime's optimizer that rounds float weights of a layer between quantized tensors to INT8, with one scale for all: what was
left in float on purpose. In other graphs it rounds float biases to 32 bits, which does no harm and lets layers be fused."""
EXACT_BYTES = "session.x64quantprecision"
"""ONNX Runtime's option for processors that saturate (`Host.saturates`): S8 weights that would overflow become U8 ones, which its
kernels add in 32 bits. It rewrites operators on bytes, so it has no effect where optimisations are off."""
LARGEST = 2**31 - 2**20
"""Bytes that a graph may have in one piece."""
MOVING = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "MaxPool", "Clip", "Relu")
"""What engines move a quantizer past."""
KNOWN_DOMAINS = ("com.microsoft", "ai.onnx.ml", "triscope")


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph without its external weights. Raises UnsupportedModelError where the file is not one."""
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise UnsupportedModelError(f"{path} is not a readable ONNX model: {error}; export it again") from error
    if not proto.graph.node and not proto.graph.output:
        raise UnsupportedModelError(f"{path} is not a readable ONNX model: it holds no graph; export it again")
    return proto


def read_whole(path: Path) -> onnx.ModelProto:
    """The graph with its external weights, none of which is listed among its inputs: older exporters do that, and what takes
    a constant out would leave an input behind that nobody gives."""
    proto = onnx.load(str(path))
    constants = {item.name for item in proto.graph.initializer} | {item.values.name for item in proto.graph.sparse_initializer}
    kept = [value for value in proto.graph.input if value.name not in constants]
    if proto.ir_version < UNLISTED or len(kept) < len(proto.graph.input):
        proto.ir_version = max(proto.ir_version, IR)
        del proto.graph.input[:]
        proto.graph.input.extend(kept)
    return proto


def precision(path: Path) -> str:
    """What the graph itself computes in: "int8" where it quantizes, else the narrowest floats of the matrices that it computes with
    (not of those that are only stored so, and cast), "float32" as a rule."""
    proto = read_graph(path)
    if any("Quantize" in node.op_type for node in nodes_of(proto.graph)) or computes_on_bytes(proto):
        return "int8"
    read = {name for node in nodes_of(proto.graph) if node.op_type != "Cast" for name in node.input}
    kinds = {tensor.data_type for tensor in proto.graph.initializer if len(tensor.dims) > 1 and tensor.name in read}
    return next((name for kind, name in _FLOATS.items() if kind in kinds), "float32")


def computes_on_bytes(proto: onnx.ModelProto) -> bool:
    """Whether a graph has operators on integers (QLinearConv, MatMulInteger ...), not only quantizers around float ones."""
    return any(node.op_type.startswith("QLinear") or node.op_type.endswith("Integer") for node in nodes_of(proto.graph))


def session_source(model: Path | onnx.ModelProto) -> str | bytes:
    """What ONNX Runtime opens: the file, or the graph's bytes; on a processor that saturates, with zero points (`_with_zero_points`)."""
    completed = _with_zero_points(model) if host().saturates else None
    if completed is not None:
        return completed.SerializeToString()
    return str(model) if isinstance(model, Path) else model.SerializeToString()


def _with_zero_points(model: Path | onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy in which integers with a scale for each channel have the zero points that they may leave out, None where none is left out.

    EXACT_BYTES would add a single one to those of a Gemm, which its DequantizeLinear then refuses.
    """
    if isinstance(model, Path) and not _mentions_dequantize(model):
        return None
    proto = read_whole(model) if isinstance(model, Path) else model
    shapes = {item.name: tuple(item.dims) for item in proto.graph.initializer}
    signed = {item.name for item in proto.graph.initializer if item.data_type == onnx.TensorProto.INT8}
    bare = [
        place
        for place, node in enumerate(proto.graph.node)
        if node.op_type == DEQUANTIZE and len(node.input) == 2 and node.input[0] in signed and shapes.get(node.input[1])
    ]
    if not bare or proto.ByteSize() > LARGEST:
        return None
    completed = onnx.ModelProto()
    completed.CopyFrom(proto)
    for place in bare:
        node = completed.graph.node[place]
        zeros = numpy_helper.from_array(np.zeros(shapes[node.input[1]], np.int8), f"{node.output[0]}_zero_point")
        completed.graph.initializer.append(zeros)
        node.input.append(zeros.name)
    return completed


def _mentions_dequantize(path: Path) -> bool:
    """Whether a file has a quantizer; it is not parsed for it."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(DEQUANTIZE.encode()) >= 0


def has_subgraphs(path: Path) -> bool:
    """Whether a graph branches or loops (If, Loop, Scan)."""
    return any(attribute.type == onnx.AttributeProto.GRAPH for node in read_graph(path).graph.node for attribute in node.attribute)


def float_between_quantized(path: Path) -> bool:
    """Whether a layer with float weights reads a quantized tensor. A file without quantizers is not parsed for it."""
    state = path.stat()
    return _float_between_quantized(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=64)
def _float_between_quantized(path: Path, changed: int, size: int) -> bool:
    """A plan loads a file many times; it is looked through once."""
    if not _mentions_dequantize(path):
        return False
    makers = {output: node for node in nodes_of(read_graph(path).graph) for output in node.output}

    def dequantized(name: str) -> bool:
        node = makers.get(name)
        while node is not None and node.op_type in MOVING and node.input:
            node = makers.get(node.input[0])
        return node is not None and node.op_type == DEQUANTIZE

    layers = {id(node): node for node in makers.values() if node.op_type in LAYERS}.values()
    return any(dequantized(node.input[0]) and not dequantized(node.input[1]) for node in layers)


def opset(proto: onnx.ModelProto) -> int:
    """The version of the standard operators that a graph uses."""
    return next((int(item.version) for item in proto.opset_import if item.domain in ("", "ai.onnx")), OLDEST)


def external_files(proto: onnx.ModelProto, folder: Path) -> list[Path]:
    """The files beside the graph that hold its weights. Raises ModelIntegrityError where one is missing or leaves the folder."""
    found: dict[str, Path] = {}
    for tensor in _tensors(proto.graph):
        if not uses_external_data(tensor):
            continue
        location = next((item.value for item in tensor.external_data if item.key == "location"), "")
        path = (folder / location).resolve()
        if Path(location).is_absolute() or not path.is_relative_to(folder.resolve()):
            raise ModelIntegrityError(
                f"weight {tensor.name!r} points to {location!r}, outside of the model's folder; the file is not loaded"
            )
        if not path.is_file():
            raise ModelIntegrityError(f"weight {tensor.name!r} lies in {location!r}, which is not beside the graph; copy it there")
        found[location] = path
    return [found[name] for name in sorted(found)]


def graph_hash(path: Path) -> str:
    """SHA-256 of a graph file; with external weights, over the file and each of them in the order of their names."""
    with path.open("rb") as stream:
        own = hashlib.file_digest(stream, "sha256")
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception:  # what can't be read is refused, with its reason, where the graph is checked
        return own.hexdigest()
    files = external_files(proto, path.parent)
    if not files:
        return own.hexdigest()
    for file in files:
        with file.open("rb") as stream:
            own.update(hashlib.file_digest(stream, "sha256").digest())
    return own.hexdigest()


def structure_hash(path: Path) -> str:
    """SHA-256 of the graph without the values of its weights: equal for a network and what it becomes when it is trained on."""
    proto = read_graph(path)
    proto.graph.name = proto.graph.doc_string = proto.doc_string = ""
    del proto.metadata_props[:]
    readers: dict[str, set[str]] = {}
    for node in nodes_of(proto.graph):
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for item in proto.graph.initializer:
        size, kinds = np.prod(item.dims, dtype=np.int64), readers.get(item.name, set())
        weight = size >= MANY or kinds <= WEIGHTED or (size > 1 and kinds <= WEIGHTED | ARITHMETIC)
        if item.data_type in _FLOATS and weight:
            item.CopyFrom(onnx.TensorProto(name=item.name, data_type=item.data_type, dims=item.dims))
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def check_graph(path: Path) -> None:
    """Raise UnsupportedModelError for an operator that no engine can know, or a graph that is not well formed."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UnsupportedModelError(f"the path {str(path)!r} is no UTF-8, and no engine opens it; rename the file or its folder") from error
    proto = read_graph(path)
    if (broken := next(_broken_text(proto), None)) is not None:
        raise UnsupportedModelError(f"{path.name} holds {broken!r} where a name is expected; the file is damaged: export or copy it again")
    external_files(proto, path.parent)
    versions = {item.domain or "ai.onnx": item.version for item in proto.opset_import}
    local = {(function.domain, function.name) for function in proto.functions}
    for node in nodes_of(proto.graph):
        domain = node.domain if node.domain not in ("", "ai.onnx") else ""
        if (node.domain, node.op_type) in local or domain in KNOWN_DOMAINS:
            continue
        version = versions.get(domain or "ai.onnx")
        if domain or version is None or not onnx.defs.has(node.op_type, max_inclusive_version=version):
            where = f"{domain or 'ai.onnx'} {version}" if version else f"{domain or 'ai.onnx'}, which the graph does not import"
            raise UnsupportedModelError(
                f"{path.name}: node {node.name or node.output[0]!r} has the unknown operator {node.op_type!r} ({where}); "
                "export the model with standard ONNX operators"
            )
    try:
        onnx.checker.check_model(read_whole(path) if proto.ir_version < UNLISTED else str(path))
    except onnx.checker.ValidationError as error:
        raise UnsupportedModelError(f"{path.name} is not a valid ONNX graph: {' '.join(str(error).split())[:400]}") from error


def _broken_text(message: Any) -> Iterator[bytes]:
    """Strings of a message that are no UTF-8, which protobuf gives as bytes; of a tensor its name alone, so that no weight is copied."""
    if isinstance(message, onnx.TensorProto):
        yield from (text for text in (message.name, message.doc_string) if isinstance(text, bytes))
        return
    for field, value in message.ListFields():
        values = [value] if isinstance(value, (str, bytes)) or hasattr(value, "ListFields") else value
        if field.type == field.TYPE_STRING:
            yield from (one for one in values if isinstance(one, bytes))
        elif field.type == field.TYPE_MESSAGE:
            for one in values:
                yield from _broken_text(one)


def nodes_of(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """All nodes, also those of branches and loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in nodes_of(graph):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from attribute.g.initializer
