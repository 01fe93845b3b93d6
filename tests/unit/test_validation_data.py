"""What people have at hand as model, calibration, validation and metric of `rt.optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

import shared_runtime as rt
from shared_runtime.optimize import loaded_with, precision_of
from shared_runtime.quantization.metrics import metric_of
from shared_runtime.quantization.samples import read_calibration, read_validation
from tests.networks import classifier, samples, save

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


@pytest.fixture
def two(tmp_path: Path) -> rt.Model:
    """A model of two inputs."""
    nodes = [helper.make_node("MatMul", ["a", "w"], ["aw"]), helper.make_node("Add", ["aw", "b"], ["y"])]
    weights = {"w": np.eye(3, 2, dtype=np.float32)}
    return rt.load(save(tmp_path / "two.onnx", nodes, weights, {"a": ["batch", 3], "b": ["batch", 2]}, {"y": ["batch", 2]}))


A, B, Y = np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1])


@pytest.mark.parametrize("item", [{"a": A, "b": B}, [A, B], (A, B), [A, B, Y], ((A, B), Y), ({"a": A, "b": B}, Y)])
def test_what_a_data_loader_gives_for_several_inputs(two: rt.Model, item: Any) -> None:
    store = read_calibration([item], two.signature, "m")
    np.testing.assert_array_equal(store[0]["a"], A)
    np.testing.assert_array_equal(store[0]["b"], B)


@pytest.mark.parametrize("item", [[A, B, Y], ((A, B), Y), ({"a": A, "b": B}, Y)])
def test_labels_behind_several_inputs(two: rt.Model, item: Any) -> None:
    store, targets = read_validation([item], two.signature, "m")
    np.testing.assert_array_equal(store[0]["b"], B)
    assert targets == [Y] or np.array_equal(targets[0], Y)
    with pytest.raises(rt.CalibrationError, match="expected a pair"):
        read_validation([[A, B]], two.signature, "m")
    assert read_validation([[A, B]], two.signature, "m", labelled=False)[1] == [None]


@pytest.mark.parametrize("kind", ["gradient", "half", "table", "chunks", "columns"])
def test_tensors_and_tables_are_calibration_sets(two: rt.Model, tmp_path: Path, kind: str) -> None:
    pandas = pytest.importorskip("pandas")
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    one = rt.load(save(tmp_path / "one.onnx", [node], {"w": np.eye(3, dtype=np.float32)}, {"x": ["n", 3]}, {"y": ["n", 3]}))
    if kind == "columns":
        node = helper.make_node("Add", ["left", "right"], ["y"])
        columns = rt.load(save(tmp_path / "c.onnx", [node], {}, {"left": ["n", 1], "right": ["n", 1]}, {"y": ["n", 1]}))
        store = read_calibration(pandas.DataFrame(values, columns=["right", "other", "left"]), columns.signature, "m")
        assert store.items == 4
        np.testing.assert_array_equal(np.concatenate([item["left"] for item in store]), values[:, 2:])
        return
    frame = pandas.DataFrame(values)
    data: Any = {"table": frame, "chunks": [frame[:2], frame[2:]]}.get(kind)
    if data is None:
        torch = pytest.importorskip("torch")
        tensor = torch.from_numpy(values).requires_grad_()
        data = tensor if kind == "gradient" else [tensor.bfloat16()]
    store = read_calibration(data, one.signature, "m")
    np.testing.assert_array_equal(np.concatenate([item["x"] for item in store]), values)


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


@pytest.mark.parametrize("kind", ["pairs", "labelled", "nested", "data set"])
def test_a_torch_module_of_two_inputs_sees_what_it_needs(kind: str) -> None:
    torch = pytest.importorskip("torch")

    class Two(torch.nn.Module):  # type: ignore[misc]
        def forward(self, a: Any, b: Any, scale: float = 2.0) -> Any:
            return a[:, :2] * scale + b

    class Items:
        """As torch's data sets: a length and places, and no leading dimension."""

        def __len__(self) -> int:
            return 4

        def __getitem__(self, place: int) -> Any:
            return A[0] + place, B[0], Y[0]

    tensors = [torch.from_numpy(value) for value in (A, B, Y)]
    data: Any = {"pairs": [tensors[:2]], "labelled": [tensors], "nested": [(tensors[:2], tensors[2])], "data set": Items()}[kind]
    model, calibration = loaded_with(Two(), data)
    assert [spec.shape for spec in model.signature.inputs] == [("batch", 3), ("batch", 2)]
    assert read_calibration(calibration, model.signature, "m").rows == 4


@pytest.mark.parametrize("data", [3, None])
def test_what_is_no_set_is_said(two: rt.Model, data: Any) -> None:
    for read in (read_calibration, read_validation):
        with pytest.raises(rt.CalibrationError, match="expected an iterable of samples"):
            read(data, two.signature, "m")


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
