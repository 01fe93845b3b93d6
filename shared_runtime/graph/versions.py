"""Which versions of the file format and of the standard operators the engine here knows, and newer graphs as the newest of those."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from shared_runtime.graph.check import IR, OLDEST, nodes_of, opset

STANDARD = ("", "ai.onnx")


@functools.cache
def newest() -> tuple[int, int]:
    """The newest file format (IR) and the newest standard operators that ONNX Runtime here loads."""
    format_ = next((ir for ir in range(onnx.IR_VERSION, IR, -1) if _loads(ir, OLDEST)), IR)
    return format_, next((v for v in range(onnx.defs.onnx_opset_version(), OLDEST, -1) if _loads(format_, v)), OLDEST)


def _loads(ir: int, operators: int) -> bool:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", operators)], ir_version=ir)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # what it raises differs by version
        return False
    return True


def too_new(proto: onnx.ModelProto) -> bool:
    """Whether a graph's file format or operators are newer than what the engine knows."""
    ir, operators = newest()
    return proto.ir_version > ir or opset(proto) > operators


def changed_since(proto: onnx.ModelProto, version: int) -> set[str]:
    """The standard operators of a graph whose definition is newer than that of opset `version`."""
    own = opset(proto)
    kinds = {node.op_type for node in _all_nodes(proto) if node.domain in STANDARD}
    return {kind for kind in kinds if onnx.defs.has(kind) and onnx.defs.get_schema(kind, own).since_version > version}


def relabelled(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph under the newest versions that the engine knows."""
    ir, operators = newest()
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    made.ir_version = min(made.ir_version, ir)
    for owner in (made, *made.functions):
        for item in owner.opset_import:
            if item.domain in STANDARD:
                item.version = min(item.version, operators)
    return made


def _all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from nodes_of(proto.graph)
    for function in proto.functions:
        yield from nodes_of(function)
