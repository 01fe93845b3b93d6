"""How far the outputs of a graph move by rounding alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from shared_runtime.graph.check import read_whole
from shared_runtime.graph.passes.base import plain_session
from shared_runtime.numeric import relative_difference
from shared_runtime.signature import Tensors

logger = logging.getLogger(__name__)


def movement(graph: onnx.ModelProto | Path, inputs: Tensors) -> dict[str, float]:
    """The relative difference that each output makes when every matrix and every float input moves by one step of its type: what
    sums in another order can't be held below. Empty where the graph does not run so."""
    proto, generator = read_whole(graph) if isinstance(graph, Path) else graph, np.random.default_rng(0)

    def moved(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.nextafter(values, generator.choice(np.array((-np.inf, np.inf), values.dtype), values.shape))

    shaken = onnx.ModelProto()
    shaken.CopyFrom(proto)
    for item in shaken.graph.initializer:
        if item.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE) and len(item.dims) > 1:  # fewer may be sizes
            item.CopyFrom(onnx.numpy_helper.from_array(moved(onnx.numpy_helper.to_array(item)), item.name))
    given = {name: moved(value) if value.dtype in (np.float32, np.float64) else value for name, value in inputs.items()}
    names = [output.name for output in proto.graph.output]
    try:
        plain = plain_session(proto, optimised=True).run(names, inputs)
        other = plain_session(shaken, optimised=True).run(names, given)
    except Exception as error:
        logger.info("how far rounding moves %s is not known: %s", proto.graph.name, " ".join(str(error).split())[:200])
        return {}
    return {name: relative_difference(np.asarray(b), np.asarray(a)) for name, a, b in zip(names, plain, other, strict=True)}
