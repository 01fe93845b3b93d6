"""scikit-learn estimators and pipelines through skl2onnx."""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
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
        columns = _columns(source, example)
        if columns:
            try:
                proto, parts = _converted(source, _types(columns))
            except UnsupportedModelError:
                if any(value.dtype.kind == "O" for value in columns.values()):
                    raise
                example = {"features": np.concatenate([value.astype(np.float32) for value in columns.values()], axis=1)}
                columns = {}  # it is no pipeline that begins with columns
        name = "" if columns else input_name(example)
        if not columns:
            proto, parts = _converted(source, _matrix(source, name))
        _name_types(proto)
        name_batch(proto)
        names = [output.name for output in proto.graph.output]
        flat = {output.name: len(output.type.tensor_type.shape.dim) < 2 for output in proto.graph.output}

        titles = getattr(source, "feature_names_in_", None)

        def rows_of(inputs: Tensors) -> Any:
            if titles is None:
                return inputs[name]
            import pandas  # it learned from a table

            if not columns:
                return pandas.DataFrame(inputs[name], columns=titles)
            return pandas.DataFrame({column: inputs[column][:, 0] for column in columns})

        def origin(inputs: Tensors) -> Tensors:
            rows = rows_of(inputs)
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
                elif output in ("variable", "GPmean") and hasattr(source, "predict"):
                    found[output] = np.asarray(source.predict(rows), np.float32).reshape(len(rows), -1)
                elif hasattr(source, "transform"):
                    found[output] = np.asarray(source.transform(rows), np.float32)
                else:
                    raise TypeError(f"there is nothing to compare the output {output!r} with")
            return found

        def layers(inputs: Tensors) -> Tensors:
            """What each transformer makes of what the graph gives it."""
            there = {output for node in proto.graph.node for output in node.output} | set(inputs)
            chain = [part for part in parts if set(part[1:]) <= there]
            taken = tensors(proto, [taken for _, taken, _ in chain if taken not in inputs], inputs) | inputs
            values = {made: estimator.transform(taken[of]) for estimator, of, made in chain}
            return {made: np.asarray(v.toarray() if hasattr(v, "toarray") else v, np.float32) for made, v in values.items()}

        given = columns or (None if example is None else {name: np.asarray(next(iter(example.values())), np.float32)})
        return Imported(proto, origin, f"scikit-learn {type(source).__name__}", given, layers)


def _columns(source: Any, example: Mapping[str, Any] | None) -> Tensors:
    """The columns (N, 1) of `example` where the estimator learned from a table with names; each becomes an input of its own."""
    names = [str(name) for name in getattr(source, "feature_names_in_", ())]
    if not names or not example or not set(names) <= set(example):
        return {}
    columns = {name: np.asarray(example[name]).reshape(-1, 1) for name in names}
    return {name: value.astype(_COLUMN_KINDS.get(value.dtype.kind, np.float32)) for name, value in columns.items()}


_COLUMN_KINDS = {"i": np.int64, "u": np.int64, "b": np.int64, "O": np.object_, "U": np.object_}


def _types(columns: Tensors) -> list[tuple[str, Any]]:
    from skl2onnx.common.data_types import FloatTensorType, Int64TensorType, StringTensorType

    kinds = {"f": FloatTensorType, "i": Int64TensorType, "O": StringTensorType}
    return [(name, kinds[value.dtype.kind]([None, 1])) for name, value in columns.items()]


def _matrix(source: Any, name: str) -> list[tuple[str, Any]]:
    """One input of all features. Raises UnsupportedModelError for an estimator that is not fitted or takes no such rows."""
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    title, width = type(source).__name__, getattr(source, "n_features_in_", None)
    if width is not None:
        return [(name, FloatTensorType([None, width]))]
    try:
        check_is_fitted(source)
    except NotFittedError as error:
        raise UnsupportedModelError(f"this {title} is not fitted (it has no n_features_in_); fit it first") from error
    raise UnsupportedModelError(
        f"this {title} does not take rows of numbers (it has no n_features_in_), such as text; that is not supported"
    )


Part = tuple[Any, str, str]


def _converted(source: Any, inputs: list[tuple[str, Any]]) -> tuple[onnx.ModelProto, list[Part]]:
    """With probabilities as one array; of a classifier that has none, the values of its decision function. Also its
    transformers in order, each with the tensor that it takes and the one that it makes."""
    import skl2onnx
    from sklearn.preprocessing import StandardScaler

    _know_boosting()

    def convert(options: dict[Any, dict[str, Any]]) -> tuple[onnx.ModelProto, list[Part]]:
        # A scaler multiplies by the reciprocal as a rule: a value on the threshold of a tree behind it then falls to the other side.
        options = {StandardScaler: {"div": "div"}, **options}
        with _missing_as_integer():
            proto, found = skl2onnx.convert_sklearn(source, initial_types=inputs, options=options, target_opset=OPSETS, intermediate=True)
        operators = [o for o in found.unordered_operator_iterator() if hasattr(o.raw_operator, "transform") and len(o.inputs) == 1]
        return proto, [(o.raw_operator, o.inputs[0].onnx_name, o.outputs[0].onnx_name) for o in operators]

    last = source.steps[-1][1] if hasattr(source, "steps") else source
    if getattr(source, "flatten_transform", False):  # of a VotingClassifier: it concerns `transform` alone, and is not converted
        source = last = copy.copy(source)
        source.flatten_transform = False
    try:
        if hasattr(source, "predict_proba"):
            try:
                return convert({id(source): {"zipmap": False}})
            except NameError:  # a mixture has no such option
                return convert({})
        if not hasattr(source, "classes_") or not hasattr(source, "decision_function"):
            return convert({})
        try:
            return convert({id(last): {"raw_scores": True, "zipmap": False}})
        except NameError:  # a linear classifier has no such option as zipmap
            return convert({id(last): {"raw_scores": True}})
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        if "column name" in why:
            names = list(getattr(source, "feature_names_in_", ()))
            why = f"it selects columns by name; give an example of each, example={{{', '.join(f'{name!r}: array' for name in names)}}}"
        raise UnsupportedModelError(f"skl2onnx can't convert this {type(source).__name__}: {why}") from error


@cache
def _know_boosting() -> None:
    """Let skl2onnx convert XGBoost's and LightGBM's estimators as steps of a pipeline, where these and onnxmltools are installed."""
    from skl2onnx import update_registered_converter
    from skl2onnx.common import shape_calculator as shapes

    try:
        from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm
        from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost
    except ImportError:
        return
    options = {"nocl": [True, False], "zipmap": [True, False, "columns"]}
    for package, classifier, regressor, convert in (
        ("xgboost", "XGBClassifier", "XGBRegressor", convert_xgboost),
        ("lightgbm", "LGBMClassifier", "LGBMRegressor", convert_lightgbm),
    ):
        try:
            module = importlib.import_module(package)
        except ImportError:
            continue
        two = ((classifier, shapes.calculate_linear_classifier_output_shapes), (regressor, shapes.calculate_linear_regressor_output_shapes))
        for name, shape in two:
            known = {"options": options} if name == classifier else {}
            update_registered_converter(getattr(module, name), f"Triscope{name}", shape, convert, **known)


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
