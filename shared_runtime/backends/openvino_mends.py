"""What OpenVINO fuses wrongly, or not at all: changes of a network, and properties, before it is compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from shared_runtime.host import host

FUSING = "SNIPPETS_MODE"
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
REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "ReduceL1", "ReduceL2")
CONSTANTS = ("Constant", "Convert")
"""What gives a scale or a bias, stored in half precision or not."""
MOST_COPIED = 1 << 18
"""A constant of more bytes stays shared by its layers."""
HALF_BYTE = 64


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
