"""scikit-learn estimators and pipelines through skl2onnx."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.importers.base import Imported, needs
from shared_runtime.signature import Tensors


class SklearnImporter:
    """Fitted estimators; a classifier gives `label` and `probabilities`, a regressor `variable`."""

    name, requires = "scikit-learn", "scikit-learn and skl2onnx"

    def takes(self, source: Any) -> bool:
        return not isinstance(source, Path) and any(base.__module__.partition(".")[0] == "sklearn" for base in type(source).__mro__)

    def load(self, source: Any, example: Mapping[str, Any] | None) -> Imported:
        skl2onnx = needs("skl2onnx", "a scikit-learn estimator")
        from skl2onnx.common.data_types import FloatTensorType

        width = getattr(source, "n_features_in_", None)
        if width is None:
            raise UnsupportedModelError(f"this {type(source).__name__} is not fitted (it has no n_features_in_); fit it first")
        name = next(iter(example), "features") if example else "features"
        options = {id(source): {"zipmap": False}} if hasattr(source, "classes_") else {}
        try:
            proto = skl2onnx.convert_sklearn(
                source, initial_types=[(name, FloatTensorType([None, width]))], options=options, target_opset=18
            )
        except Exception as error:
            raise UnsupportedModelError(
                f"skl2onnx can't convert this {type(source).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error
        name_batch(proto)
        names = [output.name for output in proto.graph.output]

        def origin(inputs: Tensors) -> Tensors:
            rows = inputs[name]
            found: Tensors = {}
            for output in names:
                if "prob" in output:
                    found[output] = np.asarray(source.predict_proba(rows), np.float32)
                elif "label" in output and hasattr(source, "classes_") and np.asarray(source.classes_).dtype.kind in "iu":
                    found[output] = np.asarray(source.predict(rows), np.int64)
                elif output == "variable":
                    found[output] = np.asarray(source.predict(rows), np.float32).reshape(len(rows), -1)
                elif output == "variable1" or hasattr(source, "transform"):
                    found[output] = np.asarray(source.transform(rows), np.float32)
            return found

        given = None if example is None else {name: np.asarray(next(iter(example.values())), np.float32)}
        return Imported(proto, origin, f"scikit-learn {type(source).__name__}", given)


def name_batch(proto: Any) -> None:
    """Give the leading dimension of every input and output its name."""
    for value in (*proto.graph.input, *proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_param = "batch"
