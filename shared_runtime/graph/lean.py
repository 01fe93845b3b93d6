"""A graph as small as it can be written: without what no engine reads."""

from __future__ import annotations

import hashlib

import onnx


def lean(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` itself without inferred shapes and notes, with one of constants that are equal, and with short names of the tensors
    inside (nodes keep theirs).

    A graph with branches or loops keeps its names: their bodies refer to them.
    """
    graph = proto.graph
    del graph.value_info[:], proto.metadata_props[:]
    for part in (proto, graph, *graph.node, *graph.initializer):
        part.ClearField("doc_string")
    for node in graph.node:
        del node.metadata_props[:]
    bodies = any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute)
    names = {"": ""} | {value.name: value.name for value in (*graph.input, *graph.output)}
    if bodies or any(name.startswith("t_") for name in names):
        return proto
    _merge_constants(graph, set(names))
    for node in graph.node:
        node.input[:] = [names.setdefault(name, f"t_{len(names)}") for name in node.input]
        node.output[:] = [names.setdefault(name, f"t_{len(names)}") for name in node.output]
    for item in graph.initializer:
        item.name = names.setdefault(item.name, f"t_{len(names)}")
    for note in graph.quantization_annotation:
        note.tensor_name = names.get(note.tensor_name, note.tensor_name)
    return proto


def _merge_constants(graph: onnx.GraphProto, kept: set[str]) -> None:
    """Keep one of the constants that are equal in all but their names."""
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    for item in graph.initializer:
        if item.name not in kept:
            nameless = onnx.TensorProto()
            nameless.CopyFrom(item)
            nameless.ClearField("name")
            digest = hashlib.sha256(nameless.SerializeToString(deterministic=True)).digest()
            same[item.name] = first.setdefault(digest, item.name)
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
    left = [item for item in graph.initializer if same.get(item.name, item.name) == item.name]
    del graph.initializer[:]
    graph.initializer.extend(left)
