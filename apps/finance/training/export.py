"""From trained models to model folders: ONNX, signature, card, trees for explanations, combination."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import torch
import xgboost as xgb
from onnx import helper

from apps.finance.features.schema import FEATURES, VERSION
from apps.finance.features.sequence import LENGTH
from apps.finance.scoring.combination import Combination
from apps.finance.scoring.reasons import BOOSTER_FILE
from apps.finance.scoring.scorer import BOOSTING, SEQUENCE
from apps.finance.training.boosting import predict_margin
from apps.finance.training.sequence import SequenceEnsemble
from apps.finance.training.train import Recipe, Trained
from shared_runtime.graph.export import to_onnx
from shared_runtime.signature import Signature, TensorSpec

MODEL_VERSION = "2.0.0"
TREE_OPSET = 15
UNIT = f"features version {VERSION}, in the schema's order"
BOOSTING_SIGNATURE = Signature(
    (TensorSpec("features", ("batch", len(FEATURES)), "float32", UNIT),),
    (TensorSpec("probability", ("batch", 1), "float32", "probability of fraud, before the combination"),),
)
SEQUENCE_SIGNATURE = Signature(
    (
        TensorSpec("sequence", ("batch", LENGTH, len(FEATURES)), "float32", f"{UNIT}; oldest transaction first"),
        TensorSpec("mask", ("batch", LENGTH), "float32", "1 where there is a transaction, 0 where there is none"),
    ),
    (
        TensorSpec("logit", ("batch",), "float32", "log-odds of fraud, before the combination"),
        TensorSpec("attention", ("batch", LENGTH), "float32", "share of each transaction; adds up to 1"),
    ),
)


def export_boosting(booster: xgb.Booster, path: Path) -> None:
    """Write the trees as ONNX: features (N, F) -> probability (N, 1). Raises ValueError where it answers otherwise."""
    from onnxmltools import convert_xgboost
    from onnxmltools.convert.common.data_types import FloatTensorType

    model = convert_xgboost(booster, initial_types=[("features", FloatTensorType([None, len(FEATURES)]))], target_opset=TREE_OPSET)
    pair = next(output.name for output in model.graph.output if "prob" in output.name)
    axes, start, end = ([name] for name in ("slice_axes", "slice_start", "slice_end"))
    for name, value in ((axes[0], 1), (start[0], 1), (end[0], 2)):
        model.graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.INT64, [1], [value]))
    model.graph.node.append(helper.make_node("Slice", [pair, *start, *end, *axes], ["probability"]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("probability", onnx.TensorProto.FLOAT, ["batch", 1]))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    model.opset_import.append(helper.make_opsetid("", TREE_OPSET))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    sample = np.random.default_rng(0).normal(5, 20, (256, len(FEATURES))).astype(np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    difference = np.abs(session.run(None, {"features": sample})[0][:, 0] - 1 / (1 + np.exp(-predict_margin(booster, sample)))).max()
    if difference > 1e-5:
        raise ValueError(f"the exported trees differ from XGBoost's by {difference:.2e}; expected at most 1e-5")


def export_sequence(network: SequenceEnsemble, path: Path) -> None:
    """Write the sequence model as ONNX; batch is its one dynamic dimension."""
    example = {"sequence": torch.zeros(2, LENGTH, len(FEATURES)), "mask": torch.ones(2, LENGTH)}
    onnx.save(to_onnx(network, example, ("logit", "attention")), path)


def write_models(trained: Trained, out: Path, recipe: Recipe, result: dict[str, Any], about: dict[str, str]) -> None:
    """Make both model folders in `out`. `result`: what `evaluate` returned; `about`: data, period, command, where."""
    boosting, sequence = out / BOOSTING, out / SEQUENCE
    for folder in (boosting, sequence):
        folder.mkdir(parents=True, exist_ok=True)
    export_boosting(trained.boosting, boosting / "model.onnx")
    BOOSTING_SIGNATURE.write(boosting / "signature.json")
    export_sequence(trained.sequence, sequence / "model.onnx")
    SEQUENCE_SIGNATURE.write(sequence / "signature.json")
    (boosting / BOOSTER_FILE).write_bytes(bytes(trained.boosting.save_raw("ubj")))
    digests = {folder.name: _sha256(folder / "model.onnx") for folder in (boosting, sequence)}
    combination: Combination = msgspec.structs.replace(trained.combination, feature_version=VERSION, members=digests)
    combination.write(boosting)
    native = {"engine": "xgboost", "file": BOOSTER_FILE, "sha256": _sha256(boosting / BOOSTER_FILE)}
    (boosting / "card.toml").write_text(
        _card(BOOSTING, digests[BOOSTING], native, asdict(recipe.boosting), result["table"]["boosting"], about)
    )
    (sequence / "card.toml").write_text(_card(SEQUENCE, digests[SEQUENCE], {}, asdict(recipe.sequence), result["table"]["sequence"], about))
    (boosting / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


TASKS = {
    BOOSTING: "probability that a card transaction is a fraud, from its features (gradient-boosted trees)",
    SEQUENCE: "log-odds that a card transaction is a fraud, from the card's last transactions (LSTM with attention)",
}


def _card(name: str, sha256: str, native: dict[str, str], recipe: dict[str, Any], metrics: dict[str, Any], about: dict[str, str]) -> str:
    def rounded(value: Any) -> Any:
        return round(value, 4) if isinstance(value, float) else value

    lines = [
        f'name = "{name}"',
        f'version = "{MODEL_VERSION}"',
        f'task = "{TASKS[name]}"',
        'licence = "Apache-2.0"',
        "",
        "[artefact]",
        f'sha256 = "{sha256}"',
        "",
        *(["[native]", *(f'{key} = "{value}"' for key, value in native.items()), ""] if native else []),
        "[use]",
        'for = "ranking transactions for an analyst, together with the other model through combination.json of fraud-boosting"',
        'not_for = "refusing customers without a person; data other than what it was trained on: train it again on yours"',
        "",
        "[features]",
        f'version = "{VERSION}"',
        f"names = {json.dumps(FEATURES)}",
        "",
        "[data]",
        *(f"{key} = {json.dumps(value)}" for key, value in about.items() if key not in ("command", "where")),
        "",
        "[training]",
        f"command = {json.dumps(about['command'])}",
        f"where = {json.dumps(about['where'])}",
        *(f"{key} = {json.dumps(value)}" for key, value in recipe.items()),
        "",
        "[metrics]",
        f"protocol = {json.dumps(about.get('protocol', ''))}",
        *(f"{key} = {rounded(value)}" for key, value in metrics.items() if isinstance(value, float)),
    ]
    return "\n".join(lines) + "\n"
