"""nnU-Net v2 trained folders: plans.json, dataset.json and fold_*/checkpoint_final.pth become one ONNX graph.

The network is rebuilt from the plans (Isensee et al., nnU-Net, Nature Methods 2021; the residual encoder of
Isensee et al., nnU-Net Revisited, 2024); the preprocessing parameters go into the card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.importers.base import Imported, needs
from shared_runtime.importers.trained import described_in, load_weights, read_json, read_weights

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

        files = (source / "plans.json", source / "dataset.json")
        plans, dataset = (read_json(file) for file in files)
        checkpoint = _checkpoint(source)
        state = _weights(checkpoint)
        with described_in(*files):
            configuration = _configuration(source, plans)
            channels = _channels(dataset, configuration)
            network = build(configuration, channels, _classes(dataset))
            patch = [int(size) for size in configuration["patch_size"]]
            card = _card(plans, dataset, configuration)
        load_weights(network, _canonical(state), checkpoint.name)
        if example is None:
            example = {"image": np.random.default_rng(0).standard_normal((1, channels, *patch)).astype(np.float32)}
        imported = from_module(network, example, "nnU-Net v2", ("logits",))
        card["training"]["fold"] = checkpoint.parent.name
        imported.card |= card
        return imported


def _card(plans: dict[str, Any], dataset: dict[str, Any], configuration: dict[str, Any]) -> dict[str, Any]:
    return {
        "preprocessing": {
            "configuration": str(configuration["name"]),
            "spacing": [float(value) for value in configuration["spacing"]],
            "patch_size": [int(size) for size in configuration["patch_size"]],
            "normalization": [str(value) for value in configuration.get("normalization_schemes", [])],
            "use_mask_for_norm": [bool(value) for value in configuration.get("use_mask_for_norm", [])],
            "transpose_forward": [int(value) for value in plans.get("transpose_forward", [0, 1, 2])],
            "transpose_backward": [int(value) for value in plans.get("transpose_backward", [0, 1, 2])],
            "resampling": {key: configuration[key] for key in configuration if key.startswith("resampling_fn")},
            "intensity": plans.get("foreground_intensity_properties_per_channel", {}),
            "channel_names": dataset.get("channel_names", {}),
        },
        "labels": {str(key): value for key, value in dataset["labels"].items()},
        "training": {"dataset": str(plans.get("dataset_name", "")), "plans": str(plans.get("plans_name", ""))},
    }


def _checkpoint(source: Path) -> Path:
    for fold in sorted(source.glob("fold_*")):
        for name in CHECKPOINTS:
            if (fold / name).is_file():
                return fold / name
    raise UnsupportedModelError(f"{source} has no fold_*/{CHECKPOINTS[0]}; copy the trained fold there")


def _weights(checkpoint: Path) -> dict[str, Any]:
    state = read_weights(checkpoint).get("network_weights")
    if not isinstance(state, dict):
        raise UnsupportedModelError(f"{checkpoint.name} holds no network_weights; expected a checkpoint of nnU-Net v2")
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


def _channels(dataset: dict[str, Any], configuration: dict[str, Any]) -> int:
    """Images, and for the second stage of a cascade one mask for each label of the first."""
    images = len(dataset.get("channel_names", dataset.get("modality", {"0": ""})))
    return images + (len(_labels(dataset) - {0}) if configuration.get("previous_stage") else 0)


def _classes(dataset: dict[str, Any]) -> int:
    if dataset.get("regions_class_order"):
        return len(dataset["regions_class_order"])
    return len(_labels(dataset))


def _labels(dataset: dict[str, Any]) -> set[int]:
    labels = dataset["labels"]
    values = {int(v) for value in labels.values() for v in (value if isinstance(value, list) else [value])}
    return values - ({int(labels["ignore"])} if "ignore" in labels else set())
