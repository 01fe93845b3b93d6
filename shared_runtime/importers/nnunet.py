"""nnU-Net v2 trained folders: plans.json, dataset.json and fold_*/checkpoint_final.pth become one ONNX graph.

The network is rebuilt from the plans (Isensee et al., nnU-Net, Nature Methods 2021; the residual encoder of
Isensee et al., nnU-Net Revisited, 2024); the preprocessing parameters go into the card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.importers.base import Imported, needs

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth")


class NnunetImporter:
    """Result folders such as `nnUNetTrainer__nnUNetPlans__3d_fullres`; the first fold that has a checkpoint is taken."""

    name, requires = "nnunet", "torch and onnxscript"

    def takes(self, source: Any) -> bool:
        return isinstance(source, Path) and source.is_dir() and (source / "plans.json").is_file() and (source / "dataset.json").is_file()

    def load(self, source: Any, example: Mapping[str, Any] | None) -> Imported:
        needs("torch", "an nnU-Net folder")
        from shared_runtime.importers.nnunet_network import build
        from shared_runtime.importers.torch_module import from_module

        plans, dataset = (json.loads((source / name).read_text()) for name in ("plans.json", "dataset.json"))
        checkpoint = _checkpoint(source)
        state = _weights(checkpoint)
        configuration = _configuration(source, plans)
        channels = len(dataset.get("channel_names", dataset.get("modality", {"0": ""})))
        classes = _classes(dataset)
        network = build(configuration, channels, classes)
        missing, unknown = network.load_state_dict(_canonical(state), strict=False)
        if missing or unknown:
            raise UnsupportedModelError(
                f"the weights of {checkpoint.name} do not fit the network of its plans: "
                f"missing {list(missing)[:2]}, unknown {list(unknown)[:2]}"
            )
        patch = [int(size) for size in configuration["patch_size"]]
        if example is None:
            example = {"image": np.random.default_rng(0).standard_normal((1, channels, *patch)).astype(np.float32)}
        imported = from_module(network, example, "nnU-Net v2", ("logits",))
        intensity = plans.get("foreground_intensity_properties_per_channel", {})
        imported.card |= {
            "preprocessing": {
                "configuration": str(configuration["name"]),
                "spacing": [float(value) for value in configuration["spacing"]],
                "patch_size": patch,
                "normalization": [str(value) for value in configuration.get("normalization_schemes", [])],
                "use_mask_for_norm": [bool(value) for value in configuration.get("use_mask_for_norm", [])],
                "transpose_forward": [int(value) for value in plans.get("transpose_forward", [0, 1, 2])],
                "transpose_backward": [int(value) for value in plans.get("transpose_backward", [0, 1, 2])],
                "resampling": {key: configuration[key] for key in configuration if key.startswith("resampling_fn")},
                "intensity": intensity,
                "channel_names": dataset.get("channel_names", {}),
            },
            "labels": {str(key): value for key, value in dataset.get("labels", {}).items()},
            "training": {
                "dataset": str(plans.get("dataset_name", "")),
                "plans": str(plans.get("plans_name", "")),
                "fold": checkpoint.parent.name,
            },
        }
        return imported


def _checkpoint(source: Path) -> Path:
    for fold in sorted(source.glob("fold_*")):
        for name in CHECKPOINTS:
            if (fold / name).is_file():
                return fold / name
    raise UnsupportedModelError(f"{source} has no fold_*/{CHECKPOINTS[0]}; copy the trained fold there")


def _weights(path: Path) -> dict[str, Any]:
    import torch

    core = np._core.multiarray  # type: ignore[attr-defined]
    plain = [core.scalar, np.dtype, *(type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64"))]
    # nnU-Net keeps its best score as a numpy number, under the name that numpy had before version 2 as well.
    allowed = [*plain, (core.scalar, "numpy.core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"{path.name} can't be read as plain weights, and no code in it is run: {reason}") from error
    state = content.get("network_weights") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise UnsupportedModelError(f"{path.name} holds no network_weights; expected a checkpoint of nnU-Net v2")
    return state


def _canonical(state: Mapping[str, Any]) -> dict[str, Any]:
    """Each weight once: nnU-Net registers its layers under several names."""
    clean = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}
    return {key: value for key, value in clean.items() if ".all_modules." not in key and not key.startswith("decoder.encoder.")}


def _configuration(source: Path, plans: dict[str, Any]) -> dict[str, Any]:
    """The configuration that the folder's name ends with, with what it inherits."""
    known = plans["configurations"]
    name = source.name.rpartition("__")[2]
    if name not in known:
        name = "3d_fullres" if "3d_fullres" in known else next(iter(known))
    found: dict[str, Any] = {}
    chain, at = [], name
    while at and at not in chain:
        chain.append(at)
        at = known[at].get("inherits_from", "")
    for part in reversed(chain):
        found |= known[part]
    return {**found, "name": name}


def _classes(dataset: dict[str, Any]) -> int:
    labels = dataset["labels"]
    if dataset.get("regions_class_order"):
        return len(dataset["regions_class_order"])
    values = {int(v) for value in labels.values() for v in (value if isinstance(value, list) else [value])}
    return len(values - ({int(labels["ignore"])} if "ignore" in labels else set()))
