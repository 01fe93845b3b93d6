"""scikit-learn estimators and pipelines through skl2onnx."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.importers.base import Imported, input_name, needs, tensors
from shared_runtime.signature import Tensors

TYPES = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(double)": onnx.TensorProto.DOUBLE,
    "tensor(int64)": onnx.TensorProto.INT64,
    "tensor(string)": onnx.TensorProto.STRING,
}
OPSETS = {"": 18, "ai.onnx.ml": 3}
_CONVERTING = threading.Lock()


class SklearnImporter:
    """Fitted estimators; a classifier gives `label` and `probabilities`, a regressor `variable`."""

    name, requires = "scikit-learn", "scikit-learn and skl2onnx"

    def takes(self, source: Any) -> bool:
        return not isinstance(source, Path) and any(base.__module__.partition(".")[0] == "sklearn" for base in type(source).__mro__)

    def load(self, source: Any, example: Mapping[str, Any] | None) -> Imported:
        needs("skl2onnx", "a scikit-learn estimator")
        from skl2onnx.common.data_types import FloatTensorType

        width = getattr(source, "n_features_in_", None)
        if width is None:
            raise UnsupportedModelError(f"this {type(source).__name__} is not fitted (it has no n_features_in_); fit it first")
        name = input_name(example)
        proto, parts = _converted(source, [(name, FloatTensorType([None, width]))])
        _name_types(proto)
        name_batch(proto)
        names = [output.name for output in proto.graph.output]
        flat = {output.name: len(output.type.tensor_type.shape.dim) < 2 for output in proto.graph.output}

        def origin(inputs: Tensors) -> Tensors:
            rows = inputs[name]
            found: Tensors = {}
            for output in names:
                if "prob" in output and hasattr(source, "predict_proba"):
                    found[output] = np.asarray(source.predict_proba(rows), np.float32)
                elif "label" in output:
                    found[output] = np.asarray(source.predict(rows)).reshape((len(rows),) if flat[output] else (len(rows), -1))
                elif ("score" in output or "prob" in output) and hasattr(source, "decision_function"):
                    scores = np.asarray(source.decision_function(rows), np.float32)
                    if "prob" in output and scores.ndim == 1:
                        scores = np.stack([-scores, scores], axis=1)
                    found[output] = scores.reshape((len(rows),) if flat[output] else (len(rows), -1))
                elif output == "variable" and hasattr(source, "predict"):
                    found[output] = np.asarray(source.predict(rows), np.float32).reshape(len(rows), -1)
                elif hasattr(source, "transform"):
                    found[output] = np.asarray(source.transform(rows), np.float32)
            return found

        def layers(inputs: Tensors) -> Tensors:
            """What each transformer makes of what the graph gives it."""
            there = {output for node in proto.graph.node for output in node.output} | {name}
            chain = [part for part in parts if set(part[1:]) <= there]
            taken = tensors(proto, [taken for _, taken, _ in chain if taken != name], inputs) | inputs
            values = {made: estimator.transform(taken[of]) for estimator, of, made in chain}
            return {made: np.asarray(v.toarray() if hasattr(v, "toarray") else v, np.float32) for made, v in values.items()}

        given = None if example is None else {name: np.asarray(next(iter(example.values())), np.float32)}
        return Imported(proto, origin, f"scikit-learn {type(source).__name__}", given, layers)


Part = tuple[Any, str, str]


def _converted(source: Any, inputs: list[tuple[str, Any]]) -> tuple[onnx.ModelProto, list[Part]]:
    """With probabilities as one array; of a classifier that has none, the values of its decision function. Also its
    transformers in order, each with the tensor that it takes and the one that it makes."""
    import skl2onnx

    def convert(options: dict[int, dict[str, bool]]) -> tuple[onnx.ModelProto, list[Part]]:
        with _missing_as_integer():
            proto, found = skl2onnx.convert_sklearn(source, initial_types=inputs, options=options, target_opset=OPSETS, intermediate=True)
        operators = [o for o in found.unordered_operator_iterator() if hasattr(o.raw_operator, "transform") and len(o.inputs) == 1]
        return proto, [(o.raw_operator, o.inputs[0].onnx_name, o.outputs[0].onnx_name) for o in operators]

    last = source.steps[-1][1] if hasattr(source, "steps") else source
    try:
        if hasattr(source, "predict_proba"):
            return convert({id(source): {"zipmap": False}})
        if not hasattr(source, "classes_") or not hasattr(source, "decision_function"):
            return convert({})
        try:
            return convert({id(last): {"raw_scores": True, "zipmap": False}})
        except NameError:  # a linear classifier has no such option as zipmap
            return convert({id(last): {"raw_scores": True}})
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"skl2onnx can't convert this {type(source).__name__}: {why}") from error


@contextmanager
def _missing_as_integer() -> Iterator[None]:
    """skl2onnx (1.20) writes where a missing value goes in a histogram tree as a bool, which protobuf refuses among integers."""
    from skl2onnx.common import tree_ensemble

    with _CONVERTING:
        plain = tree_ensemble.add_node

        def add_node(*where: Any, nodes_missing_value_tracks_true: Any = False, **what: Any) -> None:
            plain(*where, nodes_missing_value_tracks_true=int(nodes_missing_value_tracks_true), **what)

        tree_ensemble.add_node = add_node
        try:
            yield
        finally:
            tree_ensemble.add_node = plain


def _name_types(proto: onnx.ModelProto) -> None:
    """Outputs whose type skl2onnx leaves open get the one that ONNX Runtime finds."""
    if all(output.type.tensor_type.elem_type for output in proto.graph.output):
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for output, found in zip(proto.graph.output, session.get_outputs(), strict=True):
        if found.type not in TYPES:
            raise UnsupportedModelError(f"output {output.name!r} of this estimator is {found.type}; expected an array")
        output.CopyFrom(onnx.helper.make_tensor_value_info(output.name, TYPES[found.type], ["batch", *found.shape[1:]]))


def name_batch(proto: Any) -> None:
    """Give the leading dimension of every input and output its name."""
    for value in (*proto.graph.input, *proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_param = "batch"
