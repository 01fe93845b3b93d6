"""From a torch module to an ONNX graph. Needs torch."""

from __future__ import annotations

import ast
import inspect
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FLOATS = (1, 10, 11)
"""onnx.TensorProto's FLOAT, FLOAT16 and DOUBLE."""


def to_onnx(
    module: Any,
    example: Mapping[str, Any],
    outputs: Sequence[str] = (),
    *,
    scopes: bool = False,
    row_axes: Mapping[str, int | None] | None = None,
    strict: bool = False,
) -> Any:
    """An `onnx.ModelProto` of `module` in evaluation mode; the leading dimension of every input is its one dynamic one.

    `example`: a tensor of two rows or more an input, by name, in the module's order. `outputs`: names, the
    exporter's own without. `row_axes`: where an input counts rows on another axis, or None where it counts none.
    `strict`: read the module's code instead of running it, slower, so that Python numbers of its batch (len) stay free.
    Notes of where each operator came from (folders of this machine) are left out; with `scopes` the result is a pair
    of the graph and, by path of each sub-module, the tensor in which it ends.
    """
    import onnx
    import torch

    for chatty in ("torch.onnx._internal.exporter", "onnxscript"):  # that torchvision is missing, that a constant could not be folded
        logging.getLogger(chatty).setLevel(logging.ERROR)
    module.eval()
    batch, axes = torch.export.Dim("batch"), [(row_axes or {}).get(name, 0) for name in example]
    options: dict[str, Any] = {
        "input_names": list(example),
        "output_names": list(outputs) or None,
        "dynamic_shapes": _as_taken(module, [{axis: batch} if axis is not None else {} for axis in axes]),
        "dynamo": True,
        "external_data": False,
        "verbose": False,
    }
    values: tuple[Any, ...] = tuple(example.values())
    if strict:
        module = torch.export.export(module, values, dynamic_shapes=options.pop("dynamic_shapes"), strict=True)
        values = ()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own use of what it deprecates, and notes on how it takes a recurrent network apart
        file = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(module, values, str(file), **options)
        except Exception:
            # Fused attention says how its result lies in memory, which is not how it lies once it is taken apart: views of it fail.
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                torch.onnx.export(module, values, str(file), **options)
        model = onnx.load(file)
    ends = {}
    for node in model.graph.node:
        notes = {item.key: item.value for item in node.metadata_props}
        names = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        if len(names) >= 2 and names[-2]:
            ends[names[-2]] = node.output[0]
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:], model.metadata_props[:], model.graph.value_info[:]
    _mask_whole_rows(model.graph)
    onnx.checker.check_model(model)
    return (model, ends) if scopes else model


def _mask_whole_rows(graph: Any) -> None:
    """Make masks of fused attention -inf, where the exporter writes float's lowest number: torch gives zeros for a query that may look
    at nothing (padding on the left under a causal mask), as the exporter's own test for NaN behind the softmax would, but of lowest
    numbers a softmax makes an average over all that is masked."""
    import numpy as np
    from onnx import numpy_helper

    makers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def guarded(mask: Any) -> bool:
        """Whether a mask is added to nothing but scores whose softmax is tested for NaN."""
        sums = readers.get(mask.output[0], [])
        behind = [node for add in sums for node in readers.get(add.output[0], [])]
        return (
            bool(behind)
            and all(node.op_type == "Add" for node in sums)
            and all(node.op_type == "Softmax" for node in behind)
            and all(any(test.op_type == "IsNaN" for test in readers.get(node.output[0], [])) for node in behind)
        )

    for mask in [node for node in makers.values() if node.op_type == "Where"]:
        lowest = constants.get(mask.input[2])
        if lowest is None or lowest.dims or lowest.data_type not in FLOATS:
            continue
        value = numpy_helper.to_array(lowest)
        if value == np.finfo(value.dtype).min and guarded(mask):
            name = f"{lowest.name}_masked"
            if name not in constants:
                constants[name] = numpy_helper.from_array(np.array(-np.inf, value.dtype), name)
                graph.initializer.append(constants[name])
            mask.input[2] = name


def _as_taken(module: Any, shapes: list[dict[int, Any]]) -> tuple[Any, ...]:
    """One entry a parameter of `forward`; what `*inputs` takes is a tuple within."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(shapes)
    own = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:own], tuple(shapes[own:]))
