"""What people have at hand as model, calibration, validation and metric of `rt.optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shared_runtime as rt
from shared_runtime.optimize import loaded_with, precision_of
from shared_runtime.quantization.metrics import metric_of
from shared_runtime.quantization.samples import read_validation
from tests.networks import classifier, samples

PAIRS = samples(6, seed=2)
IMAGES, LABELS = np.concatenate([x["image"] for x, _ in PAIRS]), np.concatenate([np.ravel(t) for _, t in PAIRS])


@pytest.fixture
def model(tmp_path: Path) -> rt.Model:
    return rt.load(classifier(tmp_path / "sound.onnx", fragile=False))


@pytest.mark.parametrize(
    "data",
    [(IMAGES, LABELS), [IMAGES, LABELS], ({"image": IMAGES}, LABELS.tolist()), list(zip(IMAGES, LABELS, strict=True))],
    ids=["arrays", "list of arrays", "by name", "rows"],
)
def test_validation_in_other_shapes_is_the_same_set(model: rt.Model, data: Any) -> None:
    usual, wanted = read_validation(PAIRS, model.signature, "m")
    store, targets = read_validation(data, model.signature, "m")
    assert store.digest == usual.digest
    assert np.ravel(targets).tolist() == np.ravel(wanted).tolist()


@pytest.mark.parametrize("data", [IMAGES, list(IMAGES), [IMAGES, IMAGES + 1], {"image": IMAGES}, iter(IMAGES)])
def test_without_labels_inputs_are_enough(model: rt.Model, data: Any) -> None:
    store, targets = read_validation(data, model.signature, "m", labelled=False)
    assert store.rows in (len(IMAGES), 2 * len(IMAGES))
    assert targets == [None] * store.items


def test_two_pairs_are_no_pair_of_arrays(model: rt.Model) -> None:
    store, targets = read_validation((PAIRS[0], PAIRS[1]), model.signature, "m")
    assert (store.items, len(targets)) == (2, 2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((IMAGES, LABELS[:-1]), f"inputs of {len(IMAGES)} rows and {len(IMAGES) - 1} targets; expected as many"),
        (IMAGES, "expected a pair"),
        ((IMAGES, 3), "expected a pair"),
    ],
)
def test_arrays_that_do_not_pair_are_refused(model: rt.Model, data: Any, words: str) -> None:
    with pytest.raises(rt.CalibrationError, match=words):
        read_validation(data, model.signature, "m")


def test_metrics_and_precisions_by_their_usual_names() -> None:
    assert metric_of("AP") is rt.metrics.average_precision
    assert metric_of("accuracy") is metric_of(rt.metrics.top1) is rt.metrics.top1
    assert metric_of(None) is rt.metrics.agreement
    assert [precision_of(name) for name in ("INT8", "fp16", "BF16", "int4")] == ["int8", "float16", "bfloat16", "int4"]
    with pytest.raises(rt.MetricError, match="'f1'; expected one of agreement"):
        metric_of("f1")
    with pytest.raises(rt.MetricError, match="metric is a float"):
        metric_of(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["array", "batches", "loader", "dict", "generator"])
def test_a_torch_module_sees_the_first_calibration_sample(kind: str) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)).eval()
    rows = torch.from_numpy(IMAGES)
    data: Any = {
        "array": IMAGES,
        "batches": list(rows.split(2)),
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows, torch.from_numpy(LABELS)), batch_size=2),
        "dict": {"input": IMAGES},
        "generator": (rows[i : i + 2] for i in range(0, 6, 2)),
    }[kind]
    model, calibration = loaded_with(module, data)
    assert model.signature.inputs[0].shape[1:] == IMAGES.shape[1:]
    whole = calibration["input"] if isinstance(calibration, dict) else list(calibration)
    assert sum(len(one[0] if isinstance(one, list) else one) for one in whole) in (len(IMAGES), len(IMAGES) * 3)


def test_a_module_is_optimised_with_labels_in_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("nncf")
    monkeypatch.setenv("TRISCOPE_HOME", str(tmp_path))
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)).eval()
    images = np.random.default_rng(0).standard_normal((60, 3, 8, 8)).astype(np.float32)
    labels = module(torch.from_numpy(images)).argmax(1).numpy()
    made = rt.optimize(
        module, calibration=images[:20], validation=(images[20:], labels[20:]), metric="accuracy", max_drop=0.1, threads=1, budget_s=20
    )
    certificate = made.certificate(next(name for name in made.variants if "int8" in name))
    assert (certificate.metric, certificate.before, certificate.validation.items) == ("top1", 1.0, 40)
