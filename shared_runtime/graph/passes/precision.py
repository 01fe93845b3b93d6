"""Half precision in the graph itself: FP16 and bfloat16, with a check for values that would overflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shared_runtime.graph.passes.base import GraphEditor, PassRefused

LARGEST_FLOAT16 = 65504.0
KEEP_FLOAT = frozenset({"Resize", "Range", "CumSum", "TopK", "NonMaxSuppression", "RoiAlign", "Loop", "If", "Scan"})
NO_FLOAT16_ROOM = 4.0
"""Values are kept this far below the largest half-precision number: other inputs than those seen will be larger."""


def to_float16(
    model: onnx.ModelProto, peaks: Mapping[str, float], kept: frozenset[str] = frozenset(), target: int = TensorProto.FLOAT16
) -> onnx.ModelProto:
    """A copy that computes in `target` between float32 inputs and outputs.

    Nodes in `kept`, nodes whose operator has no half-precision form, and nodes with a tensor whose largest magnitude in
    `peaks` leaves too little room stay in float32, between casts.
    """
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)}
    weights = {item.name: item for item in graph.initializer}
    kinds |= {name: item.data_type for name, item in weights.items()}
    limit = LARGEST_FLOAT16 / NO_FLOAT16_ROOM if target == TensorProto.FLOAT16 else float("inf")

    def narrow(node: onnx.NodeProto) -> bool:
        names = [name for name in (*node.input, *node.output) if name]
        hot = any(peaks.get(name, 0.0) > limit for name in names)
        return not hot and node.name not in kept and node.op_type not in KEEP_FLOAT and node.domain == ""

    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:], made.graph.initializer[:], made.graph.value_info[:]
    casts: dict[tuple[str, int], str] = {}
    state: dict[str, int] = {name: TensorProto.FLOAT for name, kind in kinds.items() if kind == TensorProto.FLOAT}

    def as_kind(name: str, want: int) -> str:
        if state.get(name) is None or state[name] == want:
            return name
        if (name, want) not in casts:
            casts[name, want] = f"{name}_{'half' if want == target else 'float'}"
            if name in weights:
                made.graph.initializer.append(_narrowed(weights[name], casts[name, want], want))
            else:
                made.graph.node.append(helper.make_node("Cast", [name], [casts[name, want]], to=want))
        return casts[name, want]

    outputs = {value.name for value in graph.output}
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        want = target if narrow(node) else TensorProto.FLOAT
        if node.op_type == "Cast" and any(a.name == "to" and a.i == TensorProto.FLOAT for a in node.attribute):
            want = TensorProto.FLOAT
        for place, name in enumerate(node.input):
            if name:
                copy.input[place] = as_kind(name, want)
        later = []
        for place, name in enumerate(node.output):
            if kinds.get(name) != TensorProto.FLOAT:
                continue
            if want == target and name in outputs:
                copy.output[place] = f"{name}_half"
                state[copy.output[place]] = target
                casts[name, target] = copy.output[place]
                later.append(helper.make_node("Cast", [copy.output[place]], [name], to=TensorProto.FLOAT))
            else:
                state[name] = want
        for item in copy.attribute:
            if (
                node.op_type in ("Constant", "ConstantOfShape")
                and item.name == "value"
                and item.t.data_type == TensorProto.FLOAT
                and want == target
            ):
                item.t.CopyFrom(_narrowed(item.t, item.t.name, target))
        made.graph.node.extend([copy, *later])
    used = {name for node in made.graph.node for name in node.input} | outputs
    made.graph.initializer.extend(item for name, item in weights.items() if name in used)
    return made


def _narrowed(item: TensorProto, name: str, want: int) -> TensorProto:
    values = numpy_helper.to_array(item).astype(np.float32)
    if want == TensorProto.FLOAT16:
        return numpy_helper.from_array(np.clip(values, -LARGEST_FLOAT16, LARGEST_FLOAT16).astype(np.float16), name)
    return helper.make_tensor(name, want, values.shape, values.ravel().tolist())


class _Half:
    """What FP16 and bfloat16 have in common. `peaks`: the largest magnitude of each tensor on real inputs, by name."""

    engine = ""
    target = TensorProto.FLOAT16

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        peaks: Mapping[str, float] = options.get("peaks") or {}
        weights = {
            i.name: float(np.abs(numpy_helper.to_array(i)).max(initial=0))
            for i in GraphEditor(model).constants.values()
            if i.data_type == 1
        }
        worst = max(weights, key=weights.__getitem__, default="")
        if self.target == TensorProto.FLOAT16 and worst and weights[worst] > LARGEST_FLOAT16:
            raise PassRefused(f"weight {worst!r} reaches {weights[worst]:.3g}; half precision ends at {LARGEST_FLOAT16:.0f}")
        made = to_float16(model, {**weights, **peaks}, frozenset(), self.target)
        changes = sum(item.data_type == self.target for item in made.graph.initializer)
        model.CopyFrom(made)
        return changes


class Float16(_Half):
    """FP16 with an overflow check."""

    name, summary, tolerance = "fp16", "half precision, with nodes that would overflow kept in float32", 2e-2


class BFloat16(_Half):
    """bfloat16: float32's range with 8 bits of mantissa."""

    name, summary, tolerance = "bf16", "bfloat16: float32's range, 8 bits of mantissa", 5e-2
    target = TensorProto.BFLOAT16
