"""Guarded quantization: what passes is certified, what would lose the metric is caught, layer by layer, and bad data is refused."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from msgspec.structs import replace

import shared_runtime as rt
from shared_runtime.backends.onnxruntime import compile_file
from shared_runtime.graph.lean import lean
from shared_runtime.host import host
from shared_runtime.numeric import relative_difference
from shared_runtime.optimize import simplified
from shared_runtime.quantization import judge as judging
from shared_runtime.quantization import saturation
from shared_runtime.quantization.catalogue import PRECISIONS, forms_for
from shared_runtime.quantization.onnxruntime_int8 import StaticInt8, WeightOnlyInt8
from shared_runtime.quantization.openvino_int8 import OpenVinoInt8
from shared_runtime.quantization.rounding import balanced_rounding
from shared_runtime.quantization.samples import read_calibration, refuse_overlap
from shared_runtime.tools import tools
from shared_runtime.variants import VariantStore
from tests.networks import classifier, samples, save

pytest.importorskip("nncf")
CALIBRATION = [inputs for inputs, _ in samples(32, seed=1)]
VALIDATION = samples(80, seed=2)
HALF = 2.0**-11
"""Largest relative error of a number in half precision, in which float weights are stored."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRISCOPE_HOME", str(tmp_path / "home"))


@pytest.fixture
def sound(tmp_path: Path) -> rt.Model:
    return rt.load(classifier(tmp_path / "sound.onnx", fragile=False))


@pytest.fixture
def fragile(tmp_path: Path) -> rt.Model:
    return rt.load(classifier(tmp_path / "fragile.onnx", fragile=True))


def accuracy(model: rt.Model, variant: str, tmp_path: Path, data: list[Any] = VALIDATION) -> float:
    with rt.Session(model, variant=variant, plans=tmp_path / "plans", threads=1) as session:
        assert session.plan.variant == variant
        return rt.metrics.top1([session.run(inputs) for inputs, _ in data], [target for _, target in data])


def guarded(model: rt.Model, **options: Any) -> rt.Model:
    return rt.optimize(model, calibration=CALIBRATION, validation=VALIDATION, metric=rt.metrics.top1, threads=1, budget_s=60, **options)


def test_a_sound_network_is_certified_smaller_and_as_good(sound: rt.Model, tmp_path: Path) -> None:
    made = rt.optimize(sound, calibration=iter(CALIBRATION), validation=iter(VALIDATION), metric=rt.metrics.top1, threads=1, budget_s=60)
    assert {"int8-openvino", "int8-onnxruntime"} <= set(made.variants)
    unseen = samples(200, seed=9)
    for name in made.variants:
        certificate = made.certificate(name)
        assert certificate.drop <= 0.005
        assert certificate.drop_interval[0] <= certificate.drop <= certificate.drop_interval[1]
        assert certificate.validation.items == 80
        assert accuracy(made, name, tmp_path, unseen) >= accuracy(made, "float32", tmp_path, unseen) - 0.03
    again = rt.load(sound.graph)
    assert set(again.variants) == set(made.variants)
    assert sound.variants == ()


def test_the_guard_catches_what_naive_int8_destroys(fragile: rt.Model, tmp_path: Path) -> None:
    naive = StaticInt8(simplified(fragile, tmp_path, print), read_calibration(CALIBRATION, fragile.signature, "fragile"))
    executable = naive.compile(frozenset(), 1)
    broken = rt.metrics.top1([executable.run(inputs) for inputs, _ in VALIDATION], [target for _, target in VALIDATION])
    assert broken < 0.6
    assert accuracy(fragile, "float32", tmp_path) > 0.95
    made = rt.optimize(
        fragile, calibration=CALIBRATION, validation=VALIDATION, metric=rt.metrics.top1, max_drop=0.02, threads=1, budget_s=60
    )
    for name in made.variants:
        assert accuracy(made, name, tmp_path) >= accuracy(made, "float32", tmp_path) - 0.02
    passed = [made.certificate(name) for name in made.variants if name.startswith(("int8-openvino", "int8-onnxruntime"))]
    assert all(certificate.reverted for certificate in passed)
    for name in set(made.refused) & {"int8-openvino", "int8-onnxruntime"}:
        assert "top1" in made.refused[name] or "every layer" in made.refused[name] or "other" in made.refused[name]
    assert passed or made.refused


def test_without_labels_agreement_with_the_float_model_guards(fragile: rt.Model, tmp_path: Path) -> None:
    made = rt.optimize(fragile, calibration=CALIBRATION, threads=1, budget_s=60)
    with rt.Session(fragile, variant="float32", plans=tmp_path / "plans", threads=1) as session:
        expected = [session.run(inputs)["logits"].argmax(1) for inputs, _ in VALIDATION]
    for name in made.variants:
        with rt.Session(made, variant=name, plans=tmp_path / "plans", threads=1) as session:
            same = [
                (session.run(inputs)["logits"].argmax(1) == label).all() for (inputs, _), label in zip(VALIDATION, expected, strict=True)
            ]
        assert np.mean(same) > 0.95
        assert made.certificate(name).metric == "agreement"


def test_every_layer_back_in_float_is_the_float_model(sound: rt.Model, tmp_path: Path) -> None:
    store = read_calibration(CALIBRATION, sound.signature, "sound")
    base = simplified(sound, tmp_path, print)
    form = StaticInt8(base, store)
    x = VALIDATION[0][0]
    with rt.Session(sound, variant="float32", plans=tmp_path / "plans", threads=1) as session:
        expected = session.run(x)["logits"]
    assert relative_difference(form.compile(frozenset(form.layers), 1).run(x)["logits"], expected) < 2 * HALF
    assert relative_difference(form.compile(frozenset(), 1).run(x)["logits"], expected) > 3 * HALF


def test_every_layer_back_in_float_is_the_float_model_in_openvino_too(tmp_path: Path) -> None:
    """Weights that NNCF stored in INT8 and biases that it corrected included."""
    model = rt.load(convolutional(tmp_path / "net.onnx", "n", 32, 17))
    generator = np.random.default_rng(1)
    data = [{"image": generator.standard_normal((1, 3, 32, 32)).astype(np.float32)} for _ in range(8)]
    form = OpenVinoInt8(simplified(model, tmp_path, print), read_calibration(data, model.signature, "net"))
    with rt.Session(model, variant="float32", plans=tmp_path / "plans", threads=1) as session:
        expected = session.run(data[0])["logits"]
    assert relative_difference(form.compile(frozenset(form.layers), 1).run(data[0])["logits"], expected) < 2 * HALF
    assert relative_difference(form.compile(frozenset(), 1).run(data[0])["logits"], expected) > 3 * HALF


def test_a_slice_that_suffers_refuses_the_whole() -> None:
    outputs = [{"y": np.array([[1.0, 0.0]])} for _ in range(200)]
    worse = [{"y": np.array([[0.0, 1.0]])} if place < 10 else outputs[place] for place in range(200)]
    slices = ["rare" if place < 10 else "common" for place in range(200)]

    class Samples(list):
        pass

    judge = judging.Judge(outputs, Samples(), [np.array([0])] * 200, rt.metrics.top1, 0.1, slices)
    verdict = judge.judge(worse)
    assert verdict.drop == pytest.approx(0.05)
    assert "slice 'rare'" in verdict.why
    assert not judging.Judge(outputs, Samples(), [np.array([0])] * 200, rt.metrics.top1, 0.1).judge(worse).why
    assert verdict.slices["rare"].after == 0.0


def test_a_slice_whose_metric_is_lost_refuses_the_whole_and_one_that_never_had_one_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def spread(outputs: Any, targets: Any) -> float:
        """No number for what is all the same."""
        values = np.concatenate([output["y"].ravel() for output in outputs])
        return float("nan") if np.ptp(values) == 0 else 1.0

    outputs = [{"y": np.array([[float(place)]])} for place in range(40)]
    worse = [{"y": np.array([[0.0]])} if place < 10 else outputs[place] for place in range(40)]
    slices = ["rare"] * 10 + ["common"] * 29 + ["single"]
    verdict = judging.Judge(outputs, [], [None] * 40, spread, 0.1, slices).judge(worse)
    assert "slice 'rare'" in verdict.why
    assert "slice 'single' is not guarded" in caplog.text
    assert set(verdict.slices) == {"rare", "common"}


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"max_drop": "much"}, rt.CalibrationError, "max_drop is 'much'; expected a number"),
        ({"device": "tpu"}, rt.BackendUnavailableError, "unknown device 'tpu'; expected one of auto, cpu, cuda"),
        ({"threads": 0}, ValueError, "threads is 0"),
        ({"slices": lambda inputs, target: target["none"]}, rt.CalibrationError, "the function of slices failed"),
    ],
)
def test_what_is_asked_wrongly_is_said(sound: rt.Model, asked: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        rt.optimize(sound, **{"calibration": CALIBRATION, "validation": VALIDATION, "metric": rt.metrics.top1, **asked})


def test_a_changed_variant_is_not_served(sound: rt.Model, tmp_path: Path) -> None:
    made = guarded(sound)
    folder = made.variant("int8-onnxruntime").folder
    with (folder / "model.onnx").open("r+b") as stream:
        stream.seek(200)
        stream.write(b"\x00\x01")
    again = rt.load(sound.graph)
    assert "int8-onnxruntime" not in again.variants
    with pytest.raises(rt.ModelIntegrityError, match="not the one that was certified"):
        again.variant("int8-onnxruntime")
    with rt.Session(again, threads=1, plans=tmp_path / "plans") as session:
        assert any(c.variant == "int8-onnxruntime" and "not the one" in c.lost for c in session.plan.candidates)
    (made.variant("int8-openvino").folder / "certificate.json").unlink()
    assert "int8-openvino" not in rt.load(sound.graph).variants


def test_a_certificate_of_another_processor_is_void(sound: rt.Model) -> None:
    made = guarded(sound, precisions=["int8"])
    folder = made.variant("int8-onnxruntime").folder
    other = msgspec.structs.replace(made.certificate("int8-onnxruntime"), numerics=("onnxruntime 0", "amx_int8"))
    other.write(folder)
    with pytest.raises(rt.ModelIntegrityError, match="certify it on this host"):
        rt.load(sound.graph).variant("int8-onnxruntime")


def test_verify_computes_a_certificate_again(sound: rt.Model) -> None:
    made = guarded(sound, precisions=["int8"])
    found = rt.verify(made, "int8-openvino", validation=VALIDATION, metric=rt.metrics.top1, threads=1)
    assert found["holds"]
    assert found["same_validation_set"]
    assert found["after"] == made.certificate("int8-openvino").after
    wrong = [(inputs, (target + 1) % 4) for inputs, target in VALIDATION]
    assert rt.verify(made, "int8-openvino", validation=wrong, metric=rt.metrics.top1, threads=1)["after"] < 0.5
    folder = made.variant("int8-openvino").folder
    msgspec.structs.replace(made.certificate("int8-openvino"), probe_error=0.9).write(folder)
    assert not rt.verify(rt.load(sound.graph), "int8-openvino", threads=1)["holds"]


def test_a_faster_float_graph_is_a_variant(tmp_path: Path) -> None:
    model = rt.load("fraud-boosting")
    made = rt.optimize(model, calibration=[model.signature.random(1, i) for i in range(8)], threads=1, budget_s=20)
    certificate = made.certificate("rewritten-onnxruntime")
    assert (certificate.precision, certificate.passes) == ("float32", ("tree-regressor",))
    assert certificate.speedup is not None
    assert certificate.speedup > 1.02
    assert certificate.probe_error < 1e-5
    x = model.signature.random(5)
    asked: dict[str, Any] = {"plans": tmp_path / "plans", "budget_s": 1, "ladder": (1,)}
    with rt.Session(made, threads=1, **asked) as session:
        assert "rewritten-onnxruntime" in {candidate.variant for candidate in session.plan.candidates if candidate.timings}
    with rt.Session(made, threads=1, variant="rewritten-onnxruntime", **asked) as session:
        assert (session.plan.variant, session.plan.precision) == ("rewritten-onnxruntime", "float32")
        found = session.run(x)["probability"]
    with rt.Session(model, threads=1, **asked) as session:
        np.testing.assert_allclose(found, session.run(x)["probability"], atol=1e-6)


def test_no_long_search_for_a_form_that_is_slow(fragile: rt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared_runtime.quantization.guard.LONG_SECONDS", 0.0)
    monkeypatch.setattr("shared_runtime.quantization.guard.Guard._speedup", lambda guard, reverted: 0.4)
    made = guarded(fragile, precisions=("int8",))
    refused = [why for why in made.refused.values() if "0.40 of float's speed here no layers were put back" in why]
    assert refused
    assert all("top1 drops by" in why for why in refused)


def test_quantizer_in_the_usual_form(sound: rt.Model, fragile: rt.Model) -> None:
    made = rt.Quantizer(sound, precision="int8", calibration_data=CALIBRATION, threads=1, budget_s=60).run()
    assert all("int8" in made.certificate(name).precision for name in made.variants)
    impossible: Any = lambda outputs, targets: float(targets[0] is outputs[0])  # noqa: E731 - only the float model's own outputs score
    with pytest.raises(rt.VariantRefusedError, match="float model is unchanged"):
        rt.Quantizer(fragile, "int8", CALIBRATION, metric=impossible, max_drop=0.5, threads=1, budget_s=20).run()


@pytest.mark.parametrize(
    ("calibration", "validation", "words"),
    [
        ([], VALIDATION, "no calibration samples"),
        ([{"image": np.full((1, 3, 8, 8), np.nan, np.float32)}], VALIDATION, "not finite"),
        ([{"image": np.zeros((1, 3, 9, 8), np.float32)}], VALIDATION, "does not fit"),
        ([{"picture": np.zeros((1, 3, 8, 8), np.float32)}], VALIDATION, "'picture'"),
        ([np.zeros((8, 8), np.float32)], VALIDATION, "expected a dict"),
        (CALIBRATION, [], "no validation pairs"),
        (CALIBRATION, CALIBRATION, "expected a pair"),
        (CALIBRATION, [(CALIBRATION[3], np.array([0])), *VALIDATION], "share 1 rows of 81"),
        (CALIBRATION[:1], None, "leaves none to validate on"),
        (CALIBRATION[:1] * 4, None, "repeat"),
    ],
)
def test_bad_data_is_refused_and_leaves_nothing(sound: rt.Model, calibration: Any, validation: Any, words: str) -> None:
    with pytest.raises(rt.CalibrationError, match=words):
        rt.optimize(sound, calibration=calibration, validation=validation, metric=rt.metrics.top1 if validation else None, threads=1)
    assert not VariantStore().folder(sound.sha256).exists()


@pytest.mark.parametrize(("metric", "words"), [(lambda o, t: float("nan"), "gave nan"), (lambda o, t: 1 / 0, "ZeroDivisionError")])
def test_a_metric_that_fails_is_named(sound: rt.Model, metric: Any, words: str) -> None:
    with pytest.raises(rt.MetricError, match=words):
        rt.optimize(sound, calibration=CALIBRATION, validation=VALIDATION, metric=metric, threads=1)


def test_calibration_reads_no_more_than_it_needs_and_keeps_it_on_disk(sound: rt.Model) -> None:
    endless = ({"image": np.full((1, 3, 8, 8), place, np.float32)} for place in itertools.count())
    store = read_calibration(endless, sound.signature, "sound", most=20)
    assert (store.digest.items, store.digest.rows) == (20, 20)
    assert store[7]["image"][0, 0, 0, 0] == 7
    assert next(endless)["image"][0, 0, 0, 0] == 21


def test_saturation_is_emulated_and_counted() -> None:
    rows = np.array([[255, 255, 1, 1]], np.uint8)
    columns = np.array([[127], [127], [1], [1]], np.int8)
    found = saturation.emulate("layer", rows, columns)
    assert (found.sums, found.saturated) == (2, 1)
    assert found.worst_error == pytest.approx((255 * 127 * 2 - 32767) / (255 * 127 * 2 + 2))
    assert saturation.emulate("layer", rows, columns // 2).saturated == 0


def test_half_range_weights_do_not_saturate(sound: rt.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = read_calibration(CALIBRATION, sound.signature, "sound")
    base = simplified(sound, tmp_path, print)
    counts = {}
    for half in (False, True):
        here = replace(host(), vector=("avx2",) if half else ("avx2", "avx_vnni"))
        monkeypatch.setattr("shared_runtime.quantization.onnxruntime_int8.host", lambda here=here: here)
        layers = saturation.count_saturation(StaticInt8(base, store).proto(frozenset()), store[0])
        assert {layer.layer for layer in layers} == {"spread", "even", "filter"}
        counts[half] = sum(layer.saturated for layer in layers)
    assert counts[True] == 0 < counts[False]


def test_weights_alone_are_stored_in_a_quarter(tmp_path: Path) -> None:
    model = rt.load("fraud-sequence")
    form = WeightOnlyInt8(simplified(model, tmp_path, print))
    form.save(frozenset(), tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size <= 0.3 * model.graph.stat().st_size
    onnx.checker.check_model(tmp_path / "model.onnx")
    x = model.signature.random(4)
    reduced = compile_file("saved", tmp_path / "model.onnx", "cpu", 1, "int8 weights").run(x)
    with rt.Session(model, variant="float32", plans=tmp_path / "plans", threads=1) as session:
        assert np.abs(reduced["logit"] - session.run(x)["logit"]).max() < 0.1


def test_balanced_rounding_leaves_no_error_in_the_sum_of_a_channel() -> None:
    steps = np.random.default_rng(0).uniform(-100, 100, (40, 27))
    steps[0] = np.arange(27) + 0.4  # every error is the same way
    rounded = balanced_rounding(steps, 127)
    assert np.abs((rounded - steps).sum(axis=1)).max() <= 0.5 + 1e-9 < np.abs((np.round(steps) - steps).sum(axis=1)).max()
    assert np.abs(rounded - steps).max() < 1
    np.testing.assert_array_equal(rounded, np.round(rounded))
    assert np.abs(balanced_rounding(np.full((1, 9), 127.0), 127)).max() == 127


def test_a_lean_graph_computes_the_same(sound: rt.Model, tmp_path: Path) -> None:
    proto = onnx.shape_inference.infer_shapes(onnx.load(sound.graph))
    proto.graph.node[0].doc_string = "a note"
    before = len(proto.SerializeToString())
    nodes = [node.name for node in proto.graph.node]
    small = lean(proto)
    assert len(small.SerializeToString()) < before
    assert [node.name for node in small.graph.node] == nodes
    onnx.checker.check_model(small, full_check=True)
    onnx.save(small, tmp_path / "small.onnx")
    x = sound.signature.random(3)
    expected = compile_file("sound", sound.graph, "cpu", 1, "float32").run(x)
    for name, value in compile_file("small", tmp_path / "small.onnx", "cpu", 1, "float32").run(x).items():
        np.testing.assert_array_equal(value, expected[name])


def test_auto_optimize_says_what_each_step_gained(sound: rt.Model, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    found = rt.auto_optimize(sound, calibration=CALIBRATION, threads=1, budget_s=40, plans=tmp_path / "plans")
    assert [gain.step for gain in found.gains] == ["passes", "variants", "plan"]
    assert all(gain.interval[0] <= gain.ratio <= gain.interval[1] for gain in found.gains)
    assert found.plan.model == "sound"
    assert [line.split()[0] for line in str(found).splitlines()] == ["passes", "variants", "plan"]


def convolutional(path: Path, batch: object, side: object, opset: int) -> Path:
    """A classifier of pictures with pooling over all places, so that any size goes in."""
    generator = np.random.default_rng(0)
    weights = {
        "w": generator.standard_normal((8, 3, 7, 7)).astype(np.float32),
        "b": generator.standard_normal(8).astype(np.float32),
        "v": generator.standard_normal((8, 4)).astype(np.float32),
    }
    nodes = [
        onnx.helper.make_node("Conv", ["image", "w", "b"], ["c"], name="conv", strides=[4, 4]),
        onnx.helper.make_node("Relu", ["c"], ["r"], name="relu"),
        onnx.helper.make_node("GlobalAveragePool", ["r"], ["g"], name="pool"),
        onnx.helper.make_node("Flatten", ["g"], ["f"], name="flat"),
        onnx.helper.make_node("Gemm", ["f", "v"], ["logits"], name="gemm"),
    ]
    return save(path, nodes, weights, {"image": [batch, 3, side, side]}, {"logits": [batch, 4]}, opset)


@pytest.mark.parametrize(("batch", "side", "opset"), [(1, 32, 17), (2, 32, 17), ("n", "side", 17), ("n", 32, 11)])
def test_fixed_batches_open_sizes_and_old_operator_sets(tmp_path: Path, batch: Any, side: Any, opset: int) -> None:
    model = rt.load(convolutional(tmp_path / "net.onnx", batch, side, opset))
    generator = np.random.default_rng(1)
    rows = batch if isinstance(batch, int) else 1
    data = [{"image": generator.standard_normal((rows, 3, 32, 32)).astype(np.float32)} for _ in range(24)]
    made = rt.optimize(model, calibration=data, metric=rt.metrics.correlation, threads=1, budget_s=40)
    assert {"int8-openvino", "int8-onnxruntime"} <= set(made.variants), made.refused
    for name in made.variants:
        assert rt.verify(made, name, threads=1)["holds"]
    with rt.Session(rt.load(model.graph), threads=1, plans=tmp_path / "plans", budget_s=1.0) as session:
        assert session.plan.ladder[0].rows == rows
        assert session.run(data[0])["logits"].shape == (rows, 4)
        if side == "side":
            assert session.run({"image": np.zeros((3, 3, 40, 40), np.float32)})["logits"].shape == (3, 4)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
@pytest.mark.parametrize("operators", [False, True])
def test_calibrations_and_both_forms_for_onnxruntime(sound: rt.Model, tmp_path: Path, method: str, operators: bool) -> None:
    form = StaticInt8(simplified(sound, tmp_path, print), read_calibration(CALIBRATION, sound.signature, "sound"), method, operators)
    kinds = {node.op_type for node in form.proto(frozenset()).graph.node}
    assert ("QLinearConv" in kinds) == operators
    executable = form.compile(frozenset(), 1)
    outputs = [executable.run(inputs) for inputs, _ in VALIDATION]
    assert rt.metrics.top1(outputs, [target for _, target in VALIDATION]) > 0.95


def test_every_form_that_is_tried_is_a_listed_tool(sound: rt.Model) -> None:
    listed = {tool.name for tool in tools()}
    assert {maker.name for maker in forms_for(sound, "auto", PRECISIONS)} <= listed
    assert {maker.name for maker in forms_for(rt.load("fraud-sequence"), "auto", PRECISIONS)} <= listed


def test_a_missing_quantizer_is_named_and_the_others_go_on(sound: rt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared_runtime.quantization.openvino_int8.lacks", lambda: "the package nncf (pip install 'triscope[optimize]')")
    made = guarded(sound, precisions=["int8"])
    assert "nncf" in made.refused["int8-openvino"]
    assert "int8-onnxruntime" in made.variants


def test_constants_that_are_listed_as_inputs(tmp_path: Path) -> None:
    """As exporters wrote them until 2019: what folds a constant away must not leave an input behind."""
    generator = np.random.default_rng(0)
    values = {
        "flat": generator.standard_normal(16 * 3 * 9).astype(np.float32),
        "shape": np.array([16, 3, 3, 3]),
        "scale": np.linspace(0.5, 2, 16, dtype=np.float32),
        "zero": np.zeros(16, np.float32),
        "one": np.ones(16, np.float32),
        "last": generator.standard_normal((16, 4)).astype(np.float32),
    }
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    make = onnx.helper.make_node
    nodes = [
        make("Reshape", ["flat", "shape"], ["kernel"]),
        make("Conv", ["x", "kernel"], ["a"]),
        make("BatchNormalization", ["a", "scale", "zero", "zero", "one"], ["b"]),
        make("Relu", ["b"], ["c"]),
        make("GlobalAveragePool", ["c"], ["d"]),
        make("Flatten", ["d"], ["e"]),
        make("MatMul", ["e", "last"], ["y"]),
    ]
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3, 16, 16])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4])
    listed = [onnx.helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)) for item in weights]
    graph = onnx.helper.make_graph(nodes, "old", [x, *listed], [y], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 8)], ir_version=3), tmp_path / "old.onnx")
    model = rt.load(tmp_path / "old.onnx")
    data = [model.random(1, seed) for seed in range(16)]
    made = rt.optimize(
        model, calibration=data, metric=rt.metrics.correlation, max_drop=0.02, budget_s=20, store=VariantStore(tmp_path / "v")
    )
    assert {"int8-onnxruntime", "int8-weights"} <= set(made.variants)
    with rt.Session(made, variant="int8-onnxruntime", plans=tmp_path / "plans") as session, rt.Session(model, variant="float32") as plain:
        np.testing.assert_allclose(session.run(data[0])["y"], plain.run(data[0])["y"], atol=0.2)


def test_a_plan_names_the_precision_that_a_graph_came_in(tmp_path: Path) -> None:
    make = onnx.helper.make_node
    weight = np.random.default_rng(0).standard_normal((4, 3))
    for kind, tensor in (("float32", onnx.TensorProto.FLOAT), ("float16", onnx.TensorProto.FLOAT16), ("float64", onnx.TensorProto.DOUBLE)):
        ends = [onnx.helper.make_tensor_value_info(name, tensor, ["batch", size]) for name, size in (("x", 4), ("y", 3))]
        weights = [onnx.numpy_helper.from_array(weight.astype(kind), "w")]
        graph = onnx.helper.make_graph([make("MatMul", ["x", "w"], ["y"])], kind, ends[:1], ends[1:], weights)
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), tmp_path / f"{kind}.onnx")
        with rt.Session(rt.load(tmp_path / f"{kind}.onnx"), plans=tmp_path / "plans", budget_s=0.2) as session:
            assert session.plan.precision == kind


def test_samples_of_one_input_may_be_arrays(sound: rt.Model) -> None:
    """A stack of images, batches, and what a data loader gives: (input, target)."""
    torch = pytest.importorskip("torch")
    (spec,) = sound.signature.inputs
    rows = np.concatenate([inputs[spec.name] for inputs in CALIBRATION])
    expected = read_calibration(CALIBRATION, sound.signature, "m")
    for data in (rows, [rows[:5], rows[5:]], [(torch.from_numpy(rows[i : i + 8]), 0) for i in range(0, len(rows), 8)]):
        assert read_calibration(data, sound.signature, "m").row_hashes == expected.row_hashes


def test_rows_of_a_fixed_batch_are_told_apart() -> None:
    """The same row beside other ones is the same row, also where a model takes four at a time."""
    signature = rt.Signature((rt.TensorSpec("x", (4, 2), "float32"),), (rt.TensorSpec("y", (4, 2), "float32"),))
    first, second = (np.arange(8, dtype=np.float32).reshape(4, 2) + 100 * place for place in range(2))
    second[3] = first[0]
    calibration, validation = (read_calibration([{"x": x}], signature, "four") for x in (first, second))
    assert calibration.rows == 4
    with pytest.raises(rt.CalibrationError, match="share 1 rows of 4"):
        refuse_overlap(calibration, validation, "four")
