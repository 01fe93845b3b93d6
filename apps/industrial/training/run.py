"""Draws surfaces, trains `texture-features` and writes its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import torch

from apps.industrial.errors import InputError
from apps.industrial.features import MODEL
from apps.industrial.images import grey, image_files, read_image
from apps.industrial.training.distil import V1_FILE, V2_FILE, Recipe, draw_pool, train
from apps.industrial.training.export import exported, write_model


def train_and_write(backbones: Path, textures: Path | None, out: Path, seconds: float, pool: int, device: str) -> Path:
    """The folder of the trained model. Raises InputError where a backbone is missing or the device is not here."""
    for name in (V1_FILE, V2_FILE):
        if not (backbones / name).is_file():
            raise InputError(f"{backbones} has no {name}; expected the two MobileNets as safetensors")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for and torch sees no GPU; use --device cpu")
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    recipe = Recipe(seconds, pool=pool)
    reals = [grey(read_image(path)) for path in image_files(textures)] if textures else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    images, masks = draw_pool(pool, recipe.seed, reals, cores)
    folder = out / MODEL
    folder.mkdir(parents=True, exist_ok=True)
    network = train(images, masks, backbones, recipe, place, folder / "training.jsonl")
    where = torch.cuda.get_device_name(0) if place.type == "cuda" else "CPU"
    sections: dict[str, dict[str, Any]] = {
        "use": {"for": "features for recipes of the industrial app", "not_for": "judging parts without a recipe"},
        "data": {"teachers": f"{V2_FILE}, {V1_FILE}", "surfaces": "procedural", "real_images": len(reals)},
        "training": {"command": "triscope industrial train", "where": where, "seconds": seconds, "pool": pool, "seed": recipe.seed},
    }
    write_model(exported(network), folder, MODEL, sections)
    cv2.setNumThreads(-1)
    return folder
