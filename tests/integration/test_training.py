"""`triscope medical train` end to end on made-up cases: it learns nothing in a second, but leaves a model that loads and runs."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import shared_runtime as rt
from tests.conftest import Commands


def make_cases(folder: Path, count: int = 4) -> Path:
    generator = np.random.default_rng(0)
    for number in range(count):
        labels = np.zeros((34, 48, 34), np.uint8)
        labels[12:22, 24:38, 12:22], labels[12:22, 10:24, 12:22] = 1, 2
        image = generator.normal(0, 1, labels.shape) + 3 * (labels > 0)
        for kind, array in (("images", image.astype(np.float32)), ("labels", labels)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / kind / f"case_{number}.nii.gz")
    return folder


def test_training_leaves_a_verified_model_with_its_cross_validation(commands: Commands, tmp_path: Path) -> None:
    pytest.importorskip("monai")
    data = make_cases(tmp_path / "data")
    arguments = ("--data", data, "--out", tmp_path / "out", "--folds", "2", "--steps", "2", "--device", "cpu")
    answer = commands.run("medical", "train", *arguments, timeout=500)
    assert answer.returncode == 0, answer.stderr[-2000:]
    model = rt.load(tmp_path / "out" / "hippocampus-t1")
    assert model.graph.stat().st_size < 6_000_000
    assert model.card["metrics"]["mean_dice"]["mean"] >= 0
    scores = json.loads((tmp_path / "out" / "hippocampus-t1" / "cross_validation.json").read_text())
    assert sorted(s["case"] for s in scores) == [f"case_{n}.nii.gz" for n in range(4)], "every case is held out once"
    with rt.Session(model) as session:
        assert session.run(model.signature.random())["logits"].shape == (1, 3, 48, 64, 48)


def test_a_folder_without_pairs_is_refused(commands: Commands, tmp_path: Path) -> None:
    answer = commands.run("medical", "train", "--data", tmp_path, "--out", tmp_path / "out")
    assert answer.returncode == 2
    assert "images/ and labels/" in answer.stderr
