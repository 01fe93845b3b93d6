"""Passes that join neighbouring operators into one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from shared_runtime.graph.check import opset
from shared_runtime.graph.passes.base import EXACT, GraphEditor, PassRefused, attribute

DOMAIN = "triscope"


class ConvBatchNorm:
    """Batch normalisation after a convolution goes into its weights; the activation that follows then stands right behind it,
    where every engine fuses it."""

    name, summary, tolerance, engine = "conv-batchnorm", "fold batch normalisation into the convolution before it", 1e-4, ""

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        editor, changes = GraphEditor(model), 0
        for norm in [n for n in model.graph.node if n.op_type == "BatchNormalization"]:
            layer = editor.maker.get(norm.input[0])
            if layer is None or layer.op_type not in ("Conv", "ConvTranspose") or editor.only_reader(layer.output[0]) is not norm:
                continue
            values = [editor.value(name) for name in (layer.input[1], *norm.input[1:5])]
            shared = len(editor.readers.get(layer.input[1], [])) > 1
            if any(value is None for value in values) or shared or attribute(norm, "training_mode", 0):
                continue
            weight, scale, shift, mean, variance = (np.asarray(value, np.float64) for value in values)
            transposed = layer.op_type == "ConvTranspose"
            if transposed and attribute(layer, "group", 1) != 1:
                continue
            factor = scale / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
            shape = [1] * weight.ndim
            shape[1 if transposed else 0] = -1
            bias = np.zeros_like(mean)
            if len(layer.input) > 2 and layer.input[2]:
                known = editor.value(layer.input[2])
                if known is None or len(editor.readers[layer.input[2]]) > 1:
                    continue
                bias = known.astype(np.float64)
            name = layer.input[2] if len(layer.input) > 2 and layer.input[2] else f"{layer.output[0]}_bias"
            editor.set_value(layer.input[1], (weight * factor.reshape(shape)).astype(np.float32))
            editor.set_value(name, ((bias - mean) * factor + shift).astype(np.float32))
            del layer.input[2:]
            layer.input.append(name)
            editor.bypass(norm)
            changes += 1
        return changes


class LinearLayerNorm:
    """The scale and shift of a layer normalisation go into the matrix products that read it."""

    name, summary, tolerance, engine = (
        "linear-layernorm",
        "fold a layer normalisation's scale and shift into the products after it",
        1e-4,
        "",
    )

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        editor, changes = GraphEditor(model), 0
        for norm in [n for n in model.graph.node if n.op_type == "LayerNormalization"]:
            readers = editor.readers.get(norm.output[0], [])
            scale = editor.value(norm.input[1])
            shift = editor.value(norm.input[2]) if len(norm.input) > 2 and norm.input[2] else None
            if scale is None or scale.ndim != 1 or norm.output[0] in editor.outputs or not readers:
                continue
            if (scale == 1).all() and (shift is None or (shift == 0).all()):
                continue
            if attribute(norm, "axis", -1) != -1 or not all(self._takes(editor, node, norm.output[0]) for node in readers):
                continue
            for node in readers:
                self._fold(editor, node, scale.astype(np.float64), None if shift is None else shift.astype(np.float64))
            ones, zeros = f"{norm.output[0]}_one", f"{norm.output[0]}_zero"
            editor.set_value(ones, np.ones_like(scale))
            editor.set_value(zeros, np.zeros_like(scale))
            norm.input[1] = ones
            if len(norm.input) > 2:
                norm.input[2] = zeros
            changes += 1
            editor.refresh()
        return changes

    def _takes(self, editor: GraphEditor, node: onnx.NodeProto, source: str) -> bool:
        if node.op_type not in ("MatMul", "Gemm") or node.input[0] != source or list(node.input).count(source) != 1:
            return False
        weight = editor.value(node.input[1])
        bias_ok = node.op_type == "MatMul" or len(node.input) < 3 or editor.value(node.input[2]) is not None
        plain = node.op_type == "MatMul" or (attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0)
        return weight is not None and weight.ndim == 2 and bias_ok and plain and not attribute(node, "transA", 0)

    def _fold(self, editor: GraphEditor, node: onnx.NodeProto, scale: Any, shift: Any) -> None:
        stored = editor.value(node.input[1])
        assert stored is not None
        across = bool(attribute(node, "transB", 0))
        weight = (stored.T if across else stored).astype(np.float64)
        folded = weight * scale[:, None]
        name = f"{node.output[0]}_weight"
        editor.set_value(name, (folded.T if across else folded).astype(stored.dtype))
        node.input[1] = name
        if shift is None:
            return
        extra = (shift @ weight).astype(stored.dtype)
        if node.op_type == "Gemm":
            bias = editor.value(node.input[2]) if len(node.input) > 2 else np.zeros_like(extra)
            assert bias is not None
            editor.set_value(f"{node.output[0]}_bias", bias + extra)
            del node.input[2:]
            node.input.append(f"{node.output[0]}_bias")
            return
        inner, bias_name = f"{node.output[0]}_product", f"{node.output[0]}_bias"
        editor.set_value(bias_name, extra)
        out = node.output[0]
        node.output[0] = inner
        place = list(editor.graph.node).index(node)
        editor.graph.node.insert(place + 1, helper.make_node("Add", [inner, bias_name], [out], name=f"{out}_add"))


class GeluFusion:
    """x * (1 + erf(x / sqrt 2)) / 2 becomes the operator Gelu."""

    name, summary, tolerance, engine = "gelu", "join the five operators of GELU into one", EXACT, ""

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        if opset(model) < 20:
            raise PassRefused(f"Gelu needs operator set 20, the graph has {opset(model)}: apply opset-upgrade first")
        editor, changes = GraphEditor(model), 0
        for erf in [n for n in model.graph.node if n.op_type == "Erf"]:
            found = _gelu(editor, erf)
            if found is None:
                continue
            source, out, nodes = found
            place = list(model.graph.node).index(nodes[-1])
            model.graph.node.insert(place + 1, helper.make_node("Gelu", [source], [out], name=f"{out}_gelu"))
            for node in nodes:
                model.graph.node.remove(node)
            editor.refresh()
            changes += 1
        return changes


def _scalar(editor: GraphEditor, name: str) -> float | None:
    value = editor.value(name)
    return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


def _other(editor: GraphEditor, node: onnx.NodeProto, name: str) -> float | None:
    names = [other for other in node.input if other != name]
    return _scalar(editor, names[0]) if len(names) == 1 else None


def _gelu(editor: GraphEditor, erf: onnx.NodeProto) -> tuple[str, str, list[onnx.NodeProto]] | None:
    """The source, the result and the nodes of a GELU around `erf`, whichever way its three products are ordered."""
    inner = editor.maker.get(erf.input[0])
    if inner is None or inner.op_type not in ("Div", "Mul") or editor.only_reader(inner.output[0]) is not erf:
        return None
    source = next((name for name in inner.input if _scalar(editor, name) is None), None)
    factor = None if source is None else _other(editor, inner, source)
    if source is None or factor is None or abs((factor if inner.op_type == "Mul" else 1 / factor) - 0.5**0.5) > 1e-4:
        return None
    add = editor.only_reader(erf.output[0])
    if add is None or add.op_type != "Add" or _other(editor, add, erf.output[0]) != 1.0:
        return None
    nodes, value, half, whole = [inner, erf, add], add.output[0], False, False
    while not (half and whole):
        step = editor.only_reader(value)
        if step is None or step.op_type != "Mul":
            return None
        first, second = step.input
        other = second if first == value else first
        if _scalar(editor, other) == 0.5 and not half:
            half = True
        elif other == source and not whole:
            whole = True
        elif not whole and not half and (before := editor.maker.get(other)) is not None and _halved(editor, before, source):
            if editor.only_reader(other) is not step:
                return None
            nodes.append(before)
            half = whole = True
        else:
            return None
        nodes.append(step)
        value = step.output[0]
    return source, value, sorted(nodes, key=list(editor.graph.node).index)


def _halved(editor: GraphEditor, node: onnx.NodeProto, source: str) -> bool:
    return node.op_type == "Mul" and source in node.input and _other(editor, node, source) == 0.5


class _Region:
    """Two operators become one call of a function of the graph: engines without a kernel of that name compute its body."""

    tolerance, engine = EXACT, ""
    function = ""

    def body(self, model: onnx.ModelProto, attributes: list[str]) -> onnx.FunctionProto:
        """The function."""
        raise NotImplementedError

    def _replace(self, editor: GraphEditor, nodes: list[onnx.NodeProto], inputs: list[str], attributes: dict[str, Any]) -> None:
        model, out = editor.model, nodes[-1].output[0]
        place = list(model.graph.node).index(nodes[-1])
        model.graph.node.insert(place + 1, helper.make_node(self.function, inputs, [out], domain=DOMAIN, name=f"{out}_fused", **attributes))
        for node in nodes:
            model.graph.node.remove(node)
        if not any(item.domain == DOMAIN for item in model.opset_import):
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        if not any(item.name == self.function for item in model.functions):
            model.functions.append(self.body(model, list(attributes)))
        editor.refresh()


class SiluFusion(_Region):
    """x * sigmoid(x) is one region."""

    name, summary, function = "silu", "join x * sigmoid(x) into one region", "Silu"

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        editor, changes = GraphEditor(model), 0
        for gate in [n for n in model.graph.node if n.op_type == "Sigmoid"]:
            product = editor.only_reader(gate.output[0])
            if product is None or product.op_type != "Mul" or gate.input[0] not in product.input:
                continue
            self._replace(editor, [gate, product], [gate.input[0]], {})
            changes += 1
        return changes

    def body(self, model: onnx.ModelProto, attributes: list[str]) -> onnx.FunctionProto:
        nodes = [helper.make_node("Sigmoid", ["x"], ["gate"]), helper.make_node("Mul", ["x", "gate"], ["y"])]
        return helper.make_function(DOMAIN, self.function, ["x"], ["y"], nodes, [helper.make_opsetid("", opset(model))])


class InstanceNormLeakyRelu(_Region):
    """Instance normalisation and the LeakyReLU after it are one region: one pass over memory on a GPU."""

    name, summary, function = "instancenorm-leakyrelu", "join instance normalisation and LeakyReLU into one region", "InstanceNormLeakyRelu"

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        editor, changes = GraphEditor(model), 0
        for norm in [n for n in model.graph.node if n.op_type == "InstanceNormalization"]:
            act = editor.only_reader(norm.output[0])
            if act is None or act.op_type != "LeakyRelu":
                continue
            settings = {"epsilon": float(attribute(norm, "epsilon", 1e-5)), "alpha": float(attribute(act, "alpha", 0.01))}
            self._replace(editor, [norm, act], list(norm.input), settings)
            changes += 1
        return changes

    def body(self, model: onnx.ModelProto, attributes: list[str]) -> onnx.FunctionProto:
        norm = helper.make_node("InstanceNormalization", ["x", "scale", "bias"], ["n"])
        act = helper.make_node("LeakyRelu", ["n"], ["y"])
        for node, name in ((norm, "epsilon"), (act, "alpha")):
            item = onnx.AttributeProto(name=name, ref_attr_name=name, type=onnx.AttributeProto.FLOAT)
            node.attribute.append(item)
        ids = [helper.make_opsetid("", opset(model))]
        return helper.make_function(DOMAIN, self.function, ["x", "scale", "bias"], ["y"], [norm, act], ids, attributes)


class EngineFusion:
    """ONNX Runtime's own offline optimiser (attention, layer normalisation, GELU ...): fused operators that only it knows."""

    name, tolerance, engine = "attention", 1e-4, "onnxruntime"
    summary = "ONNX Runtime's offline fusions of transformers: attention, layer normalisation, GELU"

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        from onnxruntime.transformers import optimizer

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(model, path)
            try:
                fused = optimizer.optimize_model(str(path), model_type=str(options.get("model_type", "bert")), opt_level=0)
            except Exception as error:
                raise PassRefused(f"ONNX Runtime's optimiser can't: {' '.join(str(error).split())[:200]}") from error
        changes = sum(fused.get_fused_operator_statistics().values())
        if changes:
            names = [(value.name, value) for value in model.graph.output]
            model.CopyFrom(fused.model)
            del model.graph.output[:]
            model.graph.output.extend(value for _, value in names)
            if not any(item.domain == "com.microsoft" for item in model.opset_import):
                model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return int(changes)
