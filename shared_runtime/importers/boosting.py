"""XGBoost and LightGBM: estimators, boosters and their own model files, through onnxmltools; the native booster travels along."""

from __future__ import annotations

import bisect
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.graph.passes.simplify import DeadCode
from shared_runtime.graph.passes.trees import TreeRegressor
from shared_runtime.importers.base import TOLERANCE, Imported, input_name, needs, tensors
from shared_runtime.importers.sklearn import name_batch
from shared_runtime.numeric import relative_difference
from shared_runtime.signature import Tensors

SAME = {"rank": "reg:squarederror", "reg:logistic": "binary:logistic"}
"""Objectives, or families of them, that onnxmltools does not know, and those that make the same of a sum of leaves."""

READ = """
import sys, numpy, {module}
booster = {module}.Booster(model_file=sys.argv[1])
booster.save_config() if hasattr(booster, "save_config") else booster.dump_model()
row = numpy.zeros((1, booster.{width}()), numpy.float32)
booster.inplace_predict(row) if hasattr(booster, "inplace_predict") else booster.predict(row)
"""


def _as_it_predicts(estimator: Any) -> Any:
    """The booster of an estimator up to the round that it predicts with: the best one, where it stopped early."""
    booster = estimator.get_booster().copy()
    try:
        best = int(estimator.best_iteration)
    except AttributeError:
        return booster
    return booster[: best + 1]


def _read_apart(engine: str, path: Path, width: str) -> None:
    """Read and run a booster's file in a process of its own: on some damaged ones these engines end the process. `width`: its method that
    counts features. Raises UnsupportedModelError."""
    command = [sys.executable, "-P", "-c", READ.format(module=engine.lower(), width=width), str(path)]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if process.returncode:
        why = f"its reader ended by signal {-process.returncode}"
        if process.returncode > 0:
            said = [line.partition("Error: ")[2] for line in process.stderr.splitlines() if "Error: " in line]
            why = (said[-1:] or [process.stderr])[0].strip()[:200]
        raise UnsupportedModelError(f"{engine} can't read {path.name}: {why}; the file is damaged or cut short: save it again")


class XgboostImporter:
    """`xgboost.XGBModel`, `xgboost.Booster`, `.ubj` and XGBoost's `.json`."""

    name, requires = "xgboost", "xgboost and onnxmltools"

    def takes(self, source: Any) -> bool:
        if isinstance(source, Path):
            return source.is_file() and (
                source.suffix == ".ubj" or (source.suffix == ".json" and b'"learner"' in source.read_bytes()[:4096])
            )
        return type(source).__module__.partition(".")[0] == "xgboost"

    def load(self, source: Any, example: Mapping[str, Any] | None) -> Imported:
        xgboost = needs("xgboost", "an XGBoost model")
        if isinstance(source, Path):
            _read_apart("XGBoost", source, "num_features")
            booster = xgboost.Booster(model_file=str(source))
        else:
            booster = _as_it_predicts(source) if hasattr(source, "get_booster") else source.copy()
        config = json.loads(booster.save_config())["learner"]
        objective = config["objective"]["name"]
        width = int(booster.num_features())
        booster.feature_names = None
        name = input_name(example)
        same = SAME.get(objective, SAME.get(objective.partition(":")[0], objective))
        known = booster.copy()
        known.set_param({"objective": same})
        proto = _convert("convert_xgboost", known, name, width, f"an XGBoost model of the booster {config['gradient_booster']['name']!r}")
        classes = same.startswith(("binary:", "multi:"))
        proto = _one_output(proto, "probability" if classes else "prediction", binary=same.startswith("binary:"))
        output = proto.graph.output[0].name
        flat = not objective.startswith("multi:")

        def origin(inputs: Tensors) -> Tensors:
            values = np.asarray(booster.inplace_predict(inputs[name]), np.float32)
            return {output: values.reshape(len(values), -1)}

        def part(inputs: Tensors) -> str:
            rounds = int(booster.num_boosted_rounds())
            return _first_round(proto, rounds, inputs, lambda count: booster.inplace_predict(inputs[name], iteration_range=(0, count)))

        content = bytes(booster.save_raw("ubj"))
        native = {"engine": "xgboost", "file": "booster.ubj", "sha256": hashlib.sha256(content).hexdigest()}
        card = {"native": native} if flat or objective == "multi:softprob" else {}
        return Imported(proto, origin, f"xgboost {objective}", _given(example), None, part, card, {"booster.ubj": content} if card else {})


class LightgbmImporter:
    """`lightgbm.LGBMModel`, `lightgbm.Booster` and LightGBM's `.txt`."""

    name, requires = "lightgbm", "lightgbm and onnxmltools"

    def takes(self, source: Any) -> bool:
        if isinstance(source, Path):
            return source.is_file() and source.suffix == ".txt" and source.read_bytes()[:5] == b"tree\n"
        return type(source).__module__.partition(".")[0] == "lightgbm"

    def load(self, source: Any, example: Mapping[str, Any] | None) -> Imported:
        lightgbm = needs("lightgbm", "a LightGBM model")
        if isinstance(source, Path):
            _read_apart("LightGBM", source, "num_feature")
            booster = lightgbm.Booster(model_file=str(source))
        else:
            booster = getattr(source, "booster_", source)
        objective = str(booster.dump_model().get("objective", "regression")).split()[0]
        name = input_name(example)
        proto = _convert("convert_lightgbm", booster, name, booster.num_feature(), "a LightGBM model")
        _whole_categories(proto, name, booster.num_feature())
        classes = objective.startswith(("binary", "multiclass"))
        proto = _one_output(proto, "probability" if classes else "prediction", binary=objective.startswith("binary"))
        output = proto.graph.output[0].name

        def origin(inputs: Tensors) -> Tensors:
            values = np.asarray(booster.predict(inputs[name]), np.float32)
            return {output: values.reshape(len(values), -1)}

        def part(inputs: Tensors) -> str:
            return _first_round(
                proto, booster.current_iteration(), inputs, lambda count: booster.predict(inputs[name], num_iteration=count)
            )

        return Imported(proto, origin, f"lightgbm {objective}", _given(example), part=part)


def _first_round(proto: onnx.ModelProto, rounds: int, inputs: Tensors, upto: Callable[[int], Any]) -> str:
    """The boosting round from which on the graph's trees predict something else than the booster's, or nothing where none is found."""
    (output,) = proto.graph.output

    def differs(count: int) -> bool:
        expected = np.asarray(upto(count), np.float32)
        got = tensors(_first_trees(proto, count / rounds), [output.name], inputs)[output.name]
        return not relative_difference(got, expected.reshape(got.shape)) <= TOLERANCE

    found = bisect.bisect_left(range(1, rounds + 1), True, key=differs)
    return f"boosting round {found + 1} of {rounds}" if found < rounds and differs(found + 1) else ""


def _first_trees(proto: onnx.ModelProto, share: float) -> onnx.ModelProto:
    """The graph with the first of its trees alone."""
    cut = onnx.ModelProto()
    cut.CopyFrom(proto)
    for node in cut.graph.node:
        lists = {item.name: item for item in node.attribute if item.name.startswith(("nodes_", "target_", "class_"))}
        for key, field in (("nodes_", "nodes_treeids"), ("target_", "target_treeids"), ("class_", "class_treeids")):
            if field not in lists:
                continue
            trees = np.array(lists[field].ints)
            kept = trees < round(share * (trees.max() + 1))
            for title, item in lists.items():
                values = onnx.helper.get_attribute_value(item)
                if title.startswith(key) and len(values) == len(kept):
                    item.CopyFrom(onnx.helper.make_attribute(title, [v for v, keep in zip(values, kept, strict=True) if keep]))
    return cut


def _given(example: Mapping[str, Any] | None) -> Tensors | None:
    return None if not example else {input_name(example): np.asarray(next(iter(example.values())), np.float32)}


def _convert(function: str, booster: Any, name: str, width: int, what: str) -> onnx.ModelProto:
    onnxmltools = needs("onnxmltools", what)
    from onnxmltools.convert.common.data_types import FloatTensorType

    options = {"zipmap": False} if function == "convert_lightgbm" else {}
    try:
        proto = getattr(onnxmltools, function)(booster, initial_types=[(name, FloatTensorType([None, width]))], target_opset=15, **options)
    except Exception as error:
        raise UnsupportedModelError(f"onnxmltools can't convert {what}: {' '.join(str(error).split())[:300]}") from error
    kept = [item for item in proto.opset_import if item.domain]
    del proto.opset_import[:]
    proto.opset_import.extend([*kept, onnx.helper.make_opsetid("", 15)])
    return proto


def _whole_categories(proto: onnx.ModelProto, name: str, width: int) -> None:
    """Cut the fractions off features that trees compare for equality, in place: LightGBM reads categories as whole numbers."""
    categories = np.zeros((1, width), bool)
    for node in proto.graph.node:
        values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        for feature, mode in zip(values.get("nodes_featureids", ()), values.get("nodes_modes", ()), strict=True):
            categories[0, feature] |= mode == b"BRANCH_EQ"
    if not categories.any():
        return
    for node in proto.graph.node:
        node.input[:] = ["whole" if given == name else given for given in node.input]
    proto.graph.initializer.append(onnx.numpy_helper.from_array(categories, "categories"))
    steps = [("Abs", [name], "size"), ("Floor", ["size"], "floor"), ("Sign", [name], "sign"), ("Mul", ["floor", "sign"], "cut")]
    nodes = [onnx.helper.make_node(kind, inputs, [out]) for kind, inputs, out in [*steps, ("Where", ["categories", "cut", name], "whole")]]
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])


def _one_output(proto: onnx.ModelProto, name: str, *, binary: bool) -> onnx.ModelProto:
    """Keep the scores alone, as (batch, classes) float32: of two classes the second one's probability, of one value (batch, 1)."""
    score = next((o.name for o in proto.graph.output if "prob" in o.name), proto.graph.output[-1].name)
    width: int | None = None
    if binary:
        for key, value in (("start", 1), ("end", 2), ("axis", 1)):
            proto.graph.initializer.append(onnx.helper.make_tensor(f"{name}_{key}", onnx.TensorProto.INT64, [1], [value]))
        proto.graph.node.append(onnx.helper.make_node("Slice", [score, f"{name}_start", f"{name}_end", f"{name}_axis"], [name]))
        width = 1
    else:
        proto.graph.node.append(onnx.helper.make_node("Identity", [score], [name]))
        known = next(o for o in proto.graph.output if o.name == score).type.tensor_type.shape.dim
        width = int(known[1].dim_value) or None if len(known) == 2 else None
    del proto.graph.output[:]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", width or "values"]))
    name_batch(proto)
    # Only what leads to the scores is kept; a class label would be computed for nothing.
    needed = {name}
    kept = []
    for node in reversed(proto.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(kept))
    TreeRegressor().apply(proto)
    DeadCode().apply(proto)
    onnx.checker.check_model(proto)
    return proto
