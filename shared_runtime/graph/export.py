"""From a torch module to an ONNX graph. Needs torch."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def to_onnx(module: Any, example: Mapping[str, Any], outputs: Sequence[str] = ()) -> Any:
    """An `onnx.ModelProto` of `module` in evaluation mode; the leading dimension of every input is its one dynamic one.

    `example`: a tensor of two rows or more an input, by name, in the module's order. `outputs`: names, the
    exporter's own without. Notes of where each operator came from (folders of this machine) are left out.
    """
    import onnx
    import torch

    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)  # it tells that torchvision is not installed
    batch = torch.export.Dim("batch")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of what it deprecates
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            module.eval(),
            tuple(example.values()),
            str(file),
            input_names=list(example),
            output_names=list(outputs) or None,
            dynamic_shapes=[{0: batch} for _ in example],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        model = onnx.load(file)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:], model.metadata_props[:], model.graph.value_info[:]
    onnx.checker.check_model(model)
    return model
