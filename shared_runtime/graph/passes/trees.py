"""Passes over ensembles of trees."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from shared_runtime.graph.passes.base import EXACT, GraphEditor, attribute

DOMAIN = "ai.onnx.ml"


class TreeRegressor:
    """A classifier of two classes whose label nobody reads becomes a regressor of the score and a sigmoid."""

    name, tolerance, engine = "tree-regressor", EXACT, ""
    summary = "two-class TreeEnsembleClassifier without its label: regressor and sigmoid"

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        changes = 0
        for node in list(model.graph.node):
            if node.op_type == "TreeEnsembleClassifier" and node.domain == DOMAIN:
                changes += _rewrite(GraphEditor(model), node)
        return changes


def _rewrite(graph: GraphEditor, node: onnx.NodeProto) -> bool:
    label, scores = node.output[0], node.output[1] if len(node.output) > 1 else ""
    classes = attribute(node, "classlabels_int64s") or attribute(node, "classlabels_strings") or []
    one_score = len(classes) == 2 and len(set(attribute(node, "class_ids", []))) == 1
    if not scores or label in graph.outputs or graph.readers.get(label) or not one_score:
        return False
    if attribute(node, "post_transform", b"NONE") != b"LOGISTIC" or len(attribute(node, "base_values", [])) > 1:
        return False
    while neutral := [r for r in graph.readers.get(scores, []) if hands_on(graph, r) and r.output[0] not in graph.outputs]:
        graph.bypass(neutral[0])
    kept = {item.name: helper.get_attribute_value(item) for item in node.attribute if item.name.startswith(("nodes_", "base_values"))}
    targets = {f"target_{part}": attribute(node, f"class_{part}") for part in ("nodeids", "treeids", "weights")}
    second = f"{scores}_second"
    made = [
        helper.make_node(
            "TreeEnsembleRegressor",
            [node.input[0]],
            [f"{scores}_raw"],
            name=node.name,
            domain=DOMAIN,
            n_targets=1,
            aggregate_function="SUM",
            post_transform="NONE",
            target_ids=[0] * len(targets["target_nodeids"]),
            **targets,
            **kept,
        ),
        helper.make_node("Sigmoid", [f"{scores}_raw"], [second]),
    ]
    for reader in list(graph.readers.get(scores, [])):
        if takes_second(graph, reader):
            made.append(helper.make_node("Identity", [second], [reader.output[0]]))
            graph.graph.node.remove(reader)
    graph.refresh()
    if graph.readers.get(scores) or scores in graph.outputs:
        graph.set_value(f"{scores}_one", np.ones(1, np.float32))
        made += [
            helper.make_node("Sub", [f"{scores}_one", second], [f"{scores}_first"]),
            helper.make_node("Concat", [f"{scores}_first", second], [scores], axis=1),
        ]
    place = list(graph.graph.node).index(node)
    graph.graph.node.remove(node)
    for offset, new in enumerate(made):
        graph.graph.node.insert(place + offset, new)
    graph.refresh()
    for name in [new.output[0] for new in made if new.op_type == "Identity"]:
        graph.bypass(graph.maker[name])
    return True


def hands_on(graph: GraphEditor, node: onnx.NodeProto) -> bool:
    """Whether a node gives its first input unchanged."""
    return node.op_type == "Identity" or _times_one(graph, node)


def _times_one(graph: GraphEditor, node: onnx.NodeProto) -> bool:
    """Whether a node multiplies its first input by 1."""
    factor = graph.value(node.input[1]) if node.op_type == "Mul" else None
    return factor is not None and factor.size == 1 and factor.ndim < 2 and bool(factor.ravel()[0] == 1)


def takes_second(graph: GraphEditor, reader: onnx.NodeProto) -> bool:
    """Whether a node is `scores[:, 1:2]`."""
    if reader.op_type != "Slice" or len(reader.input) < 4:
        return False
    start, end, axes = (graph.value(name) for name in reader.input[1:4])
    if start is None or end is None or axes is None or list(axes) not in ([1], [-1]):
        return False
    step = graph.value(reader.input[4]) if len(reader.input) > 4 else np.ones(1)
    return bool(list(start) in ([1], [-1]) and end[0] >= 2 and step is not None and step[0] == 1)
