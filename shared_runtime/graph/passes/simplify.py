"""Passes that leave the arithmetic as it is and take away what is computed for nothing."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.graph.check import opset
from shared_runtime.graph.passes.base import EXACT, GraphEditor, PassRefused, attribute, plain_session

RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"})
LARGEST_FOLD = 16 << 20
"""A constant that folding would make larger than its sources is kept below this many bytes."""
POINTWISE = frozenset({"Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "Elu", "Gelu", "HardSwish", "Abs", "Neg", "Exp", "Erf", "Sqrt"})


class ConstantFolding:
    """What depends on constants alone is computed now."""

    name, summary, tolerance, engine = "constant-folding", "compute now what depends on constants alone", 0.0, ""

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        changes = 0
        while True:
            known = {item.name: item for item in model.graph.initializer}
            for node in model.graph.node:
                if node.op_type == "Constant" and (value := attribute(node, "value")) is not None:
                    item = onnx.TensorProto()
                    item.CopyFrom(value)
                    item.name = node.output[0]
                    known[item.name] = item
            outputs = {value.name for value in model.graph.output}
            ready = [
                node
                for node in model.graph.node
                if all(name in known for name in node.input if name)
                and node.op_type not in RANDOM
                and node.op_type not in ("QuantizeLinear", "DequantizeLinear")
                and not any(item.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for item in node.attribute)
                and not set(node.output) & outputs
            ]
            folded = _evaluate(model, ready, known) if ready else []
            if not folded:
                return changes
            for node, values in folded:
                model.graph.node.remove(node)
                model.graph.initializer.extend(values)
            changes += len(folded)


def _evaluate(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], known: dict[str, onnx.TensorProto]
) -> list[tuple[onnx.NodeProto, list[onnx.TensorProto]]]:
    part = onnx.ModelProto()
    part.ir_version = model.ir_version
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = "constants"
    part.graph.node.extend(nodes)
    needed = {name for node in nodes for name in node.input if name}
    made = {name for node in nodes for name in node.output}
    part.graph.initializer.extend(known[name] for name in sorted(needed - made))
    wanted = [name for node in nodes for name in node.output if name]
    part.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    try:
        values = dict(zip(wanted, plain_session(part).run(wanted, {}), strict=True))
    except (UnsupportedModelError, RuntimeError):
        if len(nodes) == 1:
            return []
        return [item for node in nodes for item in _evaluate(model, [node], known)]
    folded = []
    for node in nodes:
        found = [np.asarray(values[name]) for name in node.output if name]
        size = sum(value.nbytes for value in found)
        source = sum(numpy_helper.to_array(known[name]).nbytes for name in node.input if name in known)
        if size <= max(LARGEST_FOLD, 4 * source):
            names = [name for name in node.output if name]
            folded.append((node, [numpy_helper.from_array(value, name) for name, value in zip(names, found, strict=True)]))
    return folded


class DeadCode:
    """Nodes, constants and inputs' readers that lead to no output are taken out."""

    name, summary, tolerance, engine = "dead-code", "take out nodes and constants that lead to no output", 0.0, ""

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        needed = {value.name for value in model.graph.output}
        kept: list[onnx.NodeProto] = []
        for node in reversed(model.graph.node):
            if needed & set(node.output):
                needed |= set(node.input) | _captured(node)
                kept.append(node)
        constants = [item for item in model.graph.initializer if item.name in needed]
        changes = len(model.graph.node) - len(kept) + len(model.graph.initializer) - len(constants)
        if changes:
            del model.graph.node[:], model.graph.initializer[:]
            model.graph.node.extend(reversed(kept))
            model.graph.initializer.extend(constants)
        return changes


def _captured(node: onnx.NodeProto) -> set[str]:
    """Names that a node's sub-graphs read from outside."""
    found: set[str] = set()
    for item in node.attribute:
        if item.type == onnx.AttributeProto.GRAPH:
            for inner in item.g.node:
                found |= set(inner.input) | _captured(inner)
            found |= {value.name for value in item.g.output}
    return found


class CommonSubexpressions:
    """Nodes that compute the same from the same are one."""

    name, summary, tolerance, engine = "common-subexpressions", "compute once what is computed twice from the same inputs", 0.0, ""

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        editor = GraphEditor(model)
        changes = 0
        seen: dict[tuple[object, ...], onnx.NodeProto] = {}
        for node in list(model.graph.node):
            if node.op_type in RANDOM or any(item.type == onnx.AttributeProto.GRAPH for item in node.attribute):
                continue
            content = sorted(item.SerializeToString() for item in node.attribute)
            key = (node.domain, node.op_type, tuple(node.input), tuple(content), len(node.output))
            first = seen.setdefault(key, node)
            if first is node or set(node.output) & editor.outputs:
                continue
            for old, new in zip(node.output, first.output, strict=True):
                editor.redirect(old, new)
            model.graph.node.remove(node)
            changes += 1
        return changes


class WeightSharing:
    """Constants of the same bytes are stored once."""

    name, summary, tolerance, engine = "weight-sharing", "store equal constants once", 0.0, ""

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        editor = GraphEditor(model)
        seen: dict[tuple[Any, ...], str] = {}
        changes = 0
        for item in list(model.graph.initializer):
            value = numpy_helper.to_array(item)
            key = (item.data_type, tuple(item.dims), hashlib.sha256(value.tobytes()).digest())
            first = seen.setdefault(key, item.name)
            if first != item.name and item.name not in editor.outputs:
                editor.redirect(item.name, first)
                model.graph.initializer.remove(item)
                changes += 1
        return changes


class CancelTransposes:
    """Two transposes in a row become one, or none; a transpose moves past what acts on single values."""

    name, summary, tolerance, engine = "cancel-transposes", "join transposes, and take out those that undo each other", 0.0, ""

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        editor, changes = GraphEditor(model), 0
        changed = True
        while changed:
            changed = False
            for node in list(model.graph.node):
                if node.op_type != "Transpose":
                    continue
                second = editor.only_reader(node.output[0])
                perm = attribute(node, "perm")
                if second is None or perm is None:
                    continue
                if (
                    second.op_type in POINTWISE
                    and (third := editor.only_reader(second.output[0])) is not None
                    and third.op_type == "Transpose"
                ):
                    # transpose -> pointwise -> transpose: the pointwise one first, so that the transposes meet.
                    second.input[0], node.input[0], third.input[0] = node.input[0], second.output[0], node.output[0]
                    place = list(model.graph.node)
                    a, b = place.index(node), place.index(second)
                    first, other = onnx.NodeProto(), onnx.NodeProto()
                    first.CopyFrom(node)
                    other.CopyFrom(second)
                    model.graph.node[a].CopyFrom(other)
                    model.graph.node[b].CopyFrom(first)
                elif second.op_type == "Transpose" and (outer := attribute(second, "perm")) is not None:
                    joined = [perm[axis] for axis in outer]
                    second.input[0] = node.input[0]
                    model.graph.node.remove(node)
                    if joined == list(range(len(joined))):
                        editor.refresh()
                        editor.bypass(second)
                    else:
                        next(item for item in second.attribute if item.name == "perm").ints[:] = joined
                else:
                    continue
                changes, changed = changes + 1, True
                editor.refresh()
                break
        return changes


class CancelCasts:
    """Casts that change nothing, Identity and Dropout at inference are taken out; of two casts in a row the last one stays."""

    name, summary, tolerance, engine = "cancel-casts", "take out casts, Identity and Dropout that change nothing", 0.0, ""

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        inferred = onnx.shape_inference.infer_shapes(model)
        kinds = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)}
        kinds |= {item.name: item.data_type for item in model.graph.initializer}
        editor, changes = GraphEditor(model), 0
        for node in list(model.graph.node):
            same = node.op_type == "Cast" and kinds.get(node.input[0]) == attribute(node, "to")
            alone = node.op_type == "Dropout" and not any(name in editor.readers or name in editor.outputs for name in node.output[1:])
            if (same or alone or node.op_type == "Identity") and node.input[0] and editor.bypass(node):
                changes += 1
        return changes


class FoldPads:
    """Zero padding goes into the convolution that follows."""

    name, summary, tolerance, engine = "fold-pads", "put zero padding into the convolution that follows", EXACT, ""

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        editor, changes = GraphEditor(model), 0
        for node in [n for n in model.graph.node if n.op_type == "Pad"]:
            target = editor.only_reader(node.output[0])
            pads = editor.value(node.input[1]) if len(node.input) > 1 else None
            if target is None or target.op_type != "Conv" or pads is None or attribute(node, "mode", b"constant") != b"constant":
                continue
            fill = editor.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            rank = len(pads) // 2
            odd = (fill is not None and float(fill.reshape(-1)[0]) != 0) or (len(node.input) > 3 and node.input[3])
            if (
                odd
                or any(pads[:2])
                or any(pads[rank : rank + 2])
                or (pads < 0).any()
                or attribute(target, "auto_pad", b"NOTSET") != b"NOTSET"
            ):
                continue
            spatial = [*pads[2:rank].tolist(), *pads[rank + 2 :].tolist()]
            old = list(attribute(target, "pads", [0] * len(spatial)))
            kept = [item for item in target.attribute if item.name != "pads"]
            del target.attribute[:]
            target.attribute.extend([*kept, helper.make_attribute("pads", [a + b for a, b in zip(old, spatial, strict=True)])])
            target.input[0] = node.input[0]
            model.graph.node.remove(node)
            editor.refresh()
            changes += 1
        return changes


class OpsetUpgrade:
    """The graph in a newer operator set."""

    name, summary, tolerance, engine = "opset-upgrade", "convert to a newer operator set (20 without `version`)", EXACT, ""

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        version = int(options.get("version", 20))
        have = opset(model)
        if have >= version:
            raise PassRefused(f"the graph has operator set {have} already")
        if any(node.domain for node in model.graph.node):
            raise PassRefused("operators outside of the standard set can't be converted")
        try:
            converted = onnx.version_converter.convert_version(model, version)
        except Exception as error:
            raise PassRefused(f"onnx's converter can't: {' '.join(str(error).split())[:200]}") from error
        model.CopyFrom(converted)
        return 1


class EinsumToMatMul:
    """A sum of products over one index as a MatMul, which engines have fast code for; between a Transpose, an Unsqueeze and a Squeeze
    where its operands need them."""

    name, summary, tolerance, engine = "einsum-to-matmul", "write a sum of products over one index as MatMul", EXACT, ""

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        if opset(model) < 13:
            raise PassRefused(f"the graph has operator set {opset(model)}; 13 is needed")
        nodes: list[onnx.NodeProto] = []
        changes = 0
        for node in model.graph.node:
            made = self._product(model, node) if node.op_type == "Einsum" and len(node.input) == 2 else []
            nodes += made or [node]
            changes += bool(made)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        return changes

    def _product(self, model: onnx.ModelProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes in place of an Einsum; none where it is no product of two matrices, one pair for each index that all share."""
        equation = attribute(node, "equation", b"").decode().replace(" ", "")
        operands, arrow, result = equation.partition("->")
        first, _, second = operands.partition(",")
        if not arrow or not f"{first}{second}{result}".isalpha() or any(len(set(part)) < len(part) for part in (first, second, result)):
            return []
        shared = [label for label in result if label in first and label in second]
        summed = [label for label in first if label in second and label not in result]
        rows, columns = ([label for label in part if label not in shared + summed] for part in (first, second))
        if len(summed) != 1 or len(rows) > 1 or len(columns) > 1 or sorted(result) != sorted(shared + rows + columns):
            return []
        made: list[onnx.NodeProto] = []

        def then(kind: str, inputs: list[str], what: str, **attributes: Any) -> str:
            name = f"{node.output[0]}_{what}"
            made.append(onnx.helper.make_node(kind, inputs, [name], name, **attributes))
            return name

        def axis(at: int, what: str) -> str:
            item = onnx.numpy_helper.from_array(np.array([at], np.int64), f"{node.output[0]}_{what}_axis")
            model.graph.initializer.append(item)
            return item.name

        def operand(name: str, have: str, want: list[str], missing: int | None, what: str) -> str:
            order = [have.index(label) for label in want]
            if order != sorted(order):
                name = then("Transpose", [name], f"{what}_turned", perm=order)
            return name if missing is None else then("Unsqueeze", [name, axis(missing, what)], what)

        at = len(shared)
        a = operand(node.input[0], first, [*shared, *rows, *summed], None if rows else at, "rows")
        b = operand(node.input[1], second, [*shared, *summed, *columns], None if columns else at + 1, "columns")
        value, labels = then("MatMul", [a, b], "product"), [*shared, *rows, *columns]
        for kept, place, what in ((columns, at + 1, "column"), (rows, at, "row")):
            if not kept:
                value = then("Squeeze", [value, axis(place, what)], f"without_{what}")
        if labels != list(result):
            then("Transpose", [value], "ordered", perm=[labels.index(label) for label in result])
        made[-1].output[0] = node.output[0]
        return made
