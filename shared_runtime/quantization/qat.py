"""Quantization-aware training in torch: the network learns with its INT8 rounding, and the export computes the same numbers.

Weights: symmetric, a scale a channel; activations: 8 bits with a zero point, ranges by an exponential mean (Jacob et al.,
Quantization and Training of Neural Networks, CVPR 2018); gradients pass straight through the rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from shared_runtime.errors import OptimizationError, UnsupportedModelError
from shared_runtime.graph.passes.base import GraphEditor
from shared_runtime.importers.base import Imported, write_folder
from shared_runtime.importers.torch_module import by_name, from_module

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
MOMENTUM = 0.05
ONE_LEVEL = 5e-3
"""A sum that lies between two levels may be rounded to either by another order of adding: the comparison allows for a few."""


class ActivationQuantizer(nn.Module):  # type: ignore[misc]
    """Rounds to 256 levels between a running minimum and maximum; learns the range in training mode."""

    def __init__(self, like: Tensor) -> None:
        """`like`: of the type and the device of the numbers that come."""
        super().__init__()
        self.register_buffer("low", torch.zeros((), dtype=like.dtype, device=like.device))
        self.register_buffer("high", torch.zeros((), dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        if self.training:
            with torch.no_grad():
                low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
                first = bool(self.high == self.low)
                self.low.copy_(low if first else torch.lerp(self.low, low, MOMENTUM))
                self.high.copy_(high if first else torch.lerp(self.high, high, MOMENTUM))
        scale = ((self.high - self.low) / 255.0).clamp(min=1e-8)
        zero = torch.round(-self.low / scale).clamp(0, 255)
        rounded = (torch.clamp(torch.round(x / scale) + zero, 0.0, 255.0) - zero) * scale
        return x + (rounded - x).detach() if self.training else rounded


class QuantizedLayer(nn.Module):  # type: ignore[misc]
    """A convolution or linear layer whose input and weights are rounded."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.input = layer, ActivationQuantizer(layer.weight)

    def __getattr__(self, name: str) -> Any:
        """What its parent asks of the layer itself (`weight`, `out_features`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        weight = self.layer.weight
        shape = [-1, *([1] * (weight.dim() - 1))]
        scale = (weight.detach().abs().flatten(1).amax(1) / 127.0).clamp(min=1e-8).reshape(shape)
        rounded = torch.clamp(torch.round(weight / scale), -127.0, 127.0) * scale
        used = weight + (rounded - weight).detach() if self.training else rounded
        given = self.input(x)
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(given, used, self.layer.bias)
        return self.layer._conv_forward(given, used, self.layer.bias)


def prepare(module: Any) -> Any:
    """A copy of `module` in which every convolution and linear layer rounds as INT8 does. Raises UnsupportedModelError
    without any, and for other floats than of 32 bits."""
    made = copy.deepcopy(module)
    if others := {str(part.weight.dtype) for part in made.modules() if isinstance(part, KINDS)} - {"torch.float32"}:
        raise UnsupportedModelError(f"{type(module).__name__} has layers in {', '.join(sorted(others))}; expected float32: use .float()")
    if isinstance(made, KINDS):
        return QuantizedLayer(made)
    count = 0
    for parent in list(made.modules()):
        if isinstance(parent, (QuantizedLayer, nn.MultiheadAttention)):  # attention reads the weights of its layers itself
            continue
        # torch's fused path of transformers would read the weights as they are, without their rounding
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False
        for name, child in list(parent.named_children()):
            if isinstance(child, KINDS) and getattr(child, "padding_mode", "zeros") == "zeros":
                setattr(parent, name, QuantizedLayer(child))
                count += 1
    if not count:
        raise UnsupportedModelError(f"{type(module).__name__} has no convolution or linear layer to train in INT8")
    return made


def fit(
    module: Any,
    batches: Iterable[tuple[Mapping[str, Any], Any]],
    loss: Callable[[Any, Any], Tensor],
    *,
    learning_rate: float = 1e-4,
    epochs: int = 1,
    penalty: Callable[[Any], Tensor] | None = None,
) -> list[float]:
    """Train in place, where the module lies, on (inputs, target) pairs with Adam; the mean loss of each epoch. Inputs go by the names of
    the module's parameters, or else in order. `penalty(module)` is added to the loss.

    Raises OptimizationError without batches, and where the loss is no finite number.
    """
    pairs = list(batches)
    if not pairs:
        raise OptimizationError("training got no batches; expected pairs of inputs by name and a target")
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    history = []
    module.train()
    for epoch in range(epochs):
        total = 0.0
        for number, (inputs, target) in enumerate(pairs):
            value = loss(call(module, inputs), placed(target, module))
            if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value)):
                raise OptimizationError(
                    f"the loss is {str(value)[:80]} in batch {number + 1} of epoch {epoch + 1}; expected one finite number: look at the "
                    f"data and the learning rate ({learning_rate:g})"
                )
            if penalty is not None:
                value = value + penalty(module)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += float(value.detach())
        history.append(total / len(pairs))
    module.eval()
    return history


def call(module: Any, inputs: Mapping[str, Any]) -> Any:
    """The module's outputs for inputs by name, which an export has the same way."""
    given = {name: placed(value, module) for name, value in inputs.items()}
    return by_name(module, given)(*given.values())


def placed(value: Any, module: Any) -> Any:
    """Arrays and tensors as tensors where the module lies; anything else as it is."""
    if not isinstance(value, (Tensor, np.ndarray)):
        return value
    return torch.as_tensor(value).to(next(module.parameters()).device)


def export(module: Any, example: Mapping[str, Any], folder: Path, name: str) -> Path:
    """Write a trained network from `prepare` as a model folder in QDQ form. The import's comparison proves that it computes
    what the fake-quantized network computes. Raises ImportMismatchError, UnsupportedModelError."""
    imported = from_module(module, example, "torch, trained in INT8")
    changed = to_qdq(imported.proto)
    if not changed:
        raise UnsupportedModelError(f"{type(module).__name__} was not prepared for INT8: call qat.prepare first")
    plain = Imported(imported.proto, imported.origin, imported.source, imported.given, tolerance=ONE_LEVEL)
    plain.card = {"quantization": {"scheme": "INT8 trained", "layers": changed}}
    return write_folder(plain, folder, name)


def to_qdq(proto: onnx.ModelProto) -> int:
    """Put QuantizeLinear and DequantizeLinear in place of the exported rounding, in place; how many roundings of activations."""
    from shared_runtime.graph.passes.simplify import ConstantFolding, DeadCode

    ConstantFolding().apply(proto)
    DeadCode().apply(proto)
    editor, changed = GraphEditor(proto), 0
    for rounding in [node for node in proto.graph.node if node.op_type == "Round"]:
        chain, zero = _rounding_chain(editor, rounding)
        scale = editor.value(chain[0].input[1]) if chain else None
        if not chain or scale is None or zero is None:
            continue
        source, out = chain[0].input[0], chain[-1].output[0]
        editor.set_value(f"{out}_scale", np.asarray(scale, np.float32).reshape(()))
        editor.set_value(f"{out}_zero", np.asarray(zero, np.uint8).reshape(()))
        at = list(proto.graph.node).index(chain[-1])
        names = [f"{out}_scale", f"{out}_zero"]
        proto.graph.node.insert(at + 1, helper.make_node("QuantizeLinear", [source, *names], [f"{out}_byte"], name=f"{out}_quantize"))
        proto.graph.node.insert(at + 2, helper.make_node("DequantizeLinear", [f"{out}_byte", *names], [out], name=f"{out}_dequantize"))
        for node in chain:
            proto.graph.node.remove(node)
        editor.refresh()
        changed += 1
    _weights_to_int8(editor)
    DeadCode().apply(proto)
    return changed


def _rounding_chain(editor: GraphEditor, rounding: onnx.NodeProto) -> tuple[list[onnx.NodeProto], Any]:
    """The nodes of one exported ActivationQuantizer and its zero point; the exporter leaves out adding a zero of 0."""
    chain = [editor.maker[rounding.input[0]], rounding]
    zero: Any = np.zeros(())
    for kind in ("Add", "Clip", "Sub", "Mul"):
        following = editor.only_reader(chain[-1].output[0])
        if following is None:
            return [], None
        if following.op_type == kind:
            chain.append(following)
            if kind == "Add":
                zero = editor.value(following.input[1])
        elif kind in ("Clip", "Mul"):
            return [], None
    return (chain, zero) if chain[0].op_type == "Div" else ([], None)


def _weights_to_int8(editor: GraphEditor) -> None:
    """Weights that were rounded to a channel's 255 levels are stored as such."""
    for node in list(editor.graph.node):
        if node.op_type not in ("Conv", "Gemm", "MatMul") or (weight := editor.value(node.input[1])) is None or weight.dtype != np.float32:
            continue
        axis = 0 if node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute) else weight.ndim - 1
        shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
        others = tuple(a for a in range(weight.ndim) if a != axis)
        scale = np.maximum(np.abs(weight).max(axis=others) / 127.0, 1e-12).astype(np.float32)
        levels = weight / scale.reshape(shape)
        if np.abs(levels - np.round(levels)).max() > 1e-2:
            continue
        name = f"{node.output[0]}_w"
        editor.set_value(f"{name}_int8", np.round(levels).astype(np.int8))
        editor.set_value(f"{name}_scale", scale)
        at = list(editor.graph.node).index(node)
        editor.graph.node.insert(
            at, helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [name], axis=axis, name=f"{name}_back")
        )
        node.input[1] = name
