"""From trained weights to a model folder: ONNX with half-precision storage, signature, card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from apps.medical.evaluation.metrics import bootstrap_interval
from apps.medical.segmentation.network import hippocampus_network
from apps.medical.segmentation.window import WINDOW
from apps.medical.training.hippocampus import Recipe
from shared_runtime.graph.export import to_onnx
from shared_runtime.signature import Signature, TensorSpec

SIGNATURE = Signature(
    (TensorSpec("image", ("batch", 1, *WINDOW), "float32", "normalised MR intensity, 1 mm voxels, RAS"),),
    (TensorSpec("logits", ("batch", 3, *WINDOW), "float32", "logit of background, anterior, posterior"),),
)


def store_half(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Keep float32 weights of 256 values and more as float16, cast back when the model is loaded.

    The arithmetic stays float32: the weights were rounded to float16 before their metrics were measured.
    """
    nodes, weights = [], []
    for item in graph.graph.initializer:
        array = numpy_helper.to_array(item)
        if array.dtype == np.float32 and array.size >= 256:
            weights.append(numpy_helper.from_array(array.astype(np.float16), f"{item.name}_half"))
            nodes.append(onnx.helper.make_node("Cast", [f"{item.name}_half"], [item.name], to=onnx.TensorProto.FLOAT))
        else:
            weights.append(item)
    nodes += list(graph.graph.node)
    del graph.graph.initializer[:], graph.graph.node[:]
    graph.graph.initializer.extend(weights)
    graph.graph.node.extend(nodes)
    onnx.checker.check_model(graph)
    return graph


def export_graph(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write the network with `state` as ONNX; batch is its one dynamic dimension."""
    network = hippocampus_network()
    network.load_state_dict({key: value.float() for key, value in state.items()})
    onnx.save(store_half(to_onnx(network, {"image": torch.zeros(2, 1, *WINDOW)}, ("logits",))), path)


def summary(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals over cases, and the worst case, of a cross-validation."""
    result: dict[str, Any] = {"cases": len(scores)}
    for part in ("anterior", "posterior", "whole"):
        result[part] = {}
        for metric in ("dice", "hd95_mm", "volume_error_percent"):
            values = [abs(s[part][metric]) for s in scores]
            low, high = bootstrap_interval(values)
            result[part][metric] = {"mean": round(float(np.mean(values)), 4), "interval": [round(low, 4), round(high, 4)]}
    means = [(s["anterior"]["dice"] + s["posterior"]["dice"]) / 2 for s in scores]
    low, high = bootstrap_interval(means)
    worst = int(np.argmin(means))
    result["mean_dice"] = {"mean": round(float(np.mean(means)), 4), "interval": [round(low, 4), round(high, 4)]}
    result["worst"] = {"case": scores[worst]["case"], "mean_dice": round(means[worst], 4)}
    return result


def write_model(runs: Path, folder: Path, recipe: Recipe, where: str) -> None:
    """Make the model folder from `runs` (what `train_all` left): graph, signature, card."""
    folder.mkdir(parents=True, exist_ok=True)
    export_graph(torch.load(runs / "all.pt", weights_only=True, map_location="cpu"), folder / "model.onnx")
    SIGNATURE.write(folder / "signature.json")
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    scores_file = runs / "cross_validation.json"
    scores = json.loads(scores_file.read_text()) if scores_file.exists() else []
    (folder / "card.toml").write_text(_card(digest, summary(scores) if scores else None, recipe, where))
    if scores:
        (folder / "cross_validation.json").write_text(json.dumps(scores) + "\n")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def _card(digest: str, metrics: dict[str, Any] | None, recipe: Recipe, where: str) -> str:
    lines = [
        'name = "hippocampus-t1"',
        'version = "1.1.0"',
        'task = "segmentation of the anterior and posterior hippocampus in T1-weighted MR"',
        'licence = "CC-BY-SA-4.0"',
        "",
        "[artefact]",
        f'sha256 = "{digest}"',
        'precision = "float32 arithmetic; weights stored as float16"',
        "",
        "[use]",
        'for = "volumetry of both hippocampi in adults, reviewed by a clinician"',
        'not_for = "diagnosis without review; children; contrasts other than T1; strong distortion by tumours or surgery"',
        'input = "48 x 64 x 48 voxels of 1 mm, RAS, clipped to percentiles 0.5-99.5 and standardised; margins zero"',
        "",
        "[data]",
        'name = "Medical Segmentation Decathlon, Task04 Hippocampus (training part, 208 cases)"',
        'source = "Vanderbilt University Medical Center; Antonelli et al., Nature Communications 13:4128 (2022)"',
        'licence = "CC BY-SA 4.0"',
        'limits = "one centre, adults, crops around one hippocampus; no whole heads, no other vendors stated"',
        "",
        "[training]",
        'command = "triscope medical train --data DIR --out DIR --folds 5 --steps ' + f'{recipe.steps}"',
        f'where = "{where}"',
        f"batch = {recipe.batch}",
        f"learning_rate = {recipe.learning_rate}",
        f"weight_decay = {recipe.weight_decay}",
        f"steps_per_run = {recipe.steps}",
    ]
    if metrics is not None:
        lines += [
            "",
            "[metrics]",
            f'protocol = "5-fold cross-validation, {metrics["cases"]} cases, case averages, 95 % bootstrap intervals"',
        ]
        lines += [f"mean_dice = {_toml(metrics['mean_dice'])}", f"worst = {_toml(metrics['worst'])}"]
        for part in ("anterior", "posterior", "whole"):
            lines += [f"{part} = {_toml(metrics[part])}"]
    return "\n".join(lines) + "\n"
