"""From what others trained to a model folder: equality with the origin, refusals with the way out, nothing half-written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import shared_runtime as rt
from shared_runtime.importers import IMPORTERS
from shared_runtime.importers.base import Imported, write_folder
from shared_runtime.repository.store import ModelRepository
from shared_runtime.variants import VariantStore
from tests.networks import run

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")


def test_the_step_of_a_pipeline_that_differs_is_named(tmp_path: Path) -> None:
    pytest.importorskip("skl2onnx")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    x = np.random.default_rng(0).standard_normal((300, 4))
    pipeline = make_pipeline(StandardScaler(), PolynomialFeatures(2), StandardScaler(), LogisticRegression()).fit(x, x[:, 0] > 0)
    importer = next(one for one in IMPORTERS if one.name == "scikit-learn")
    imported = importer.load(pipeline, None)
    second = [node for node in imported.proto.graph.node if node.op_type == "Div"][1]
    scale = next(item for item in imported.proto.graph.initializer if item.name == second.input[1])
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 1.1, scale.name))
    with pytest.raises(rt.ImportMismatchError, match=rf"first layer to differ is Div '{second.name}"):
        write_folder(imported, tmp_path / "models" / "broken", "broken")


@pytest.mark.parametrize("library", ["xgboost", "lightgbm"])
def test_the_boosting_round_that_differs_is_named(library: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxmltools")
    package = pytest.importorskip(library)
    x = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    kind = package.XGBRegressor if library == "xgboost" else package.LGBMRegressor
    estimator = kind(n_estimators=9, max_depth=3, n_jobs=1).fit(x, x[:, 0] + np.abs(x[:, 1]))
    importer = next(one for one in IMPORTERS if one.name == library)
    imported = importer.load(estimator, None)
    trees = next(node for node in imported.proto.graph.node if node.op_type.startswith("TreeEnsemble"))
    lists = {item.name: item for item in trees.attribute}
    weights = lists["target_weights"]
    weights.floats[:] = [v * 3 if tree == 6 else v for v, tree in zip(weights.floats, lists["target_treeids"].ints, strict=True)]
    with pytest.raises(rt.ImportMismatchError, match=r"first layer to differ is boosting round 7 of 9"):
        write_folder(imported, tmp_path / "models" / "broken", "broken")


@pytest.mark.parametrize("kind", ["forest", "logistic", "regressor", "pipeline"])
def test_scikit_learn_estimators(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("skl2onnx")
    from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    generator = np.random.default_rng(0)
    x = generator.standard_normal((200, 5)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] > 0).astype(int)
    estimator: Any = {
        "forest": RandomForestClassifier(10, random_state=0),
        "logistic": LogisticRegression(),
        "regressor": GradientBoostingRegressor(n_estimators=10, random_state=0),
        "pipeline": make_pipeline(StandardScaler(), LogisticRegression()),
    }[kind].fit(x, y)
    outputs = run(rt.load(estimator, example={"rows": x[:4]}), {"rows": x[:50]}, tmp_path)
    if kind == "regressor":
        np.testing.assert_allclose(outputs["variable"][:, 0], estimator.predict(x[:50]), atol=1e-4)
    else:
        np.testing.assert_allclose(outputs["probabilities"], estimator.predict_proba(x[:50]), atol=1e-4)


@pytest.mark.parametrize("kind", ["histogram", "isolation", "scores", "two scores", "words", "components"])
def test_scikit_learn_estimators_of_other_outputs(kind: str, tmp_path: Path) -> None:
    """Labels in words, decision functions, histogram trees with missing values, projections."""
    pytest.importorskip("skl2onnx")
    from sklearn.decomposition import PCA
    from sklearn.ensemble import HistGradientBoostingClassifier, IsolationForest
    from sklearn.linear_model import LogisticRegression, SGDClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    generator = np.random.default_rng(0)
    x = generator.standard_normal((300, 5)).astype(np.float32)
    y = np.digitize(x[:, 0] + x[:, 1], (-0.5, 0.5))
    gaps = np.where(generator.random(x.shape) < 0.2, np.nan, x).astype(np.float32)
    words = np.array(["genuine", "fraud", "unknown"])
    source: Any = {
        "histogram": lambda: HistGradientBoostingClassifier(max_iter=5).fit(gaps, y),
        "isolation": lambda: IsolationForest(n_estimators=10, random_state=0).fit(x),
        "scores": lambda: LinearSVC().fit(x, y),
        "two scores": lambda: make_pipeline(StandardScaler(), SGDClassifier(random_state=0)).fit(x, y > 0),
        "words": lambda: LogisticRegression().fit(x, words[y]),
        "components": lambda: PCA(n_components=2).fit(x),
    }[kind]()
    rows = gaps if kind == "histogram" else x
    outputs = run(rt.load(source, example={"rows": x[:4]}), {"rows": rows}, tmp_path)
    if "label" in outputs:
        assert np.mean(outputs["label"].ravel() == source.predict(rows).ravel()) > 0.99
    if kind == "components":
        np.testing.assert_allclose(next(iter(outputs.values())), source.transform(rows), atol=1e-4)
    elif hasattr(source, "predict_proba"):
        np.testing.assert_allclose(outputs["probabilities"], source.predict_proba(rows), atol=1e-4)
    else:
        found = outputs["scores" if kind == "isolation" else "probabilities"]
        expected = source.decision_function(rows)
        np.testing.assert_allclose(found.reshape(len(x), -1)[:, -1], expected.reshape(len(x), -1)[:, -1], atol=1e-4)


def test_a_table_with_named_columns_and_words(tmp_path: Path) -> None:
    pytest.importorskip("skl2onnx")
    pandas = pytest.importorskip("pandas")
    from sklearn.compose import ColumnTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    generator = np.random.default_rng(0)
    table = pandas.DataFrame({"amount": generator.lognormal(3, 1, 200), "hour": np.arange(200) % 24, "channel": ["web", "shop"] * 100})
    encoded = ColumnTransformer([("number", StandardScaler(), ["amount", "hour"]), ("word", OneHotEncoder(), ["channel"])])
    pipeline = make_pipeline(encoded, LogisticRegression()).fit(table, table["amount"] > 20)
    with pytest.raises(rt.UnsupportedModelError, match=r"selects columns by name; give .*'channel': array"):
        rt.load(pipeline)
    model = rt.load(pipeline, example={name: table[name].to_numpy()[:6] for name in table})
    assert [spec.dtype for spec in model.signature.inputs] == ["float32", "int64", "object"]
    inputs = {spec.name: table[spec.name].to_numpy()[:, None].astype(spec.dtype) for spec in model.signature.inputs}
    with rt.Session(model, plans=tmp_path / "plans", probe=inputs) as session:
        outputs = session.run(inputs)
    np.testing.assert_allclose(outputs["probabilities"], pipeline.predict_proba(table), atol=1e-5)
    rows = [{name: value[place : place + 1] for name, value in inputs.items()} for place in range(24)]
    again = {name: value.copy() for name, value in rows[3].items()}
    other = {**again, "channel": np.array([["web"]], object)}
    judged = {"metric": lambda outputs, targets: 1.0, "budget_s": 5}
    with pytest.raises(rt.CalibrationError, match="share 1 rows"):
        rt.optimize(model, calibration=rows, validation=[(again, 0)], **judged)
    rt.optimize(model, calibration=rows, validation=[(other, 0)], store=VariantStore(tmp_path / "variants"), **judged)
    with rt.Session(model, plans=tmp_path / "other") as session:  # the encoder knows none of the random words
        np.testing.assert_array_equal(session.run(inputs)["probabilities"], outputs["probabilities"])


def test_an_estimator_of_a_table_with_names_takes_rows(tmp_path: Path) -> None:
    pytest.importorskip("skl2onnx")
    pandas = pytest.importorskip("pandas")
    from sklearn.ensemble import RandomForestClassifier

    generator = np.random.default_rng(0)
    table = pandas.DataFrame({"amount": generator.lognormal(3, 1, 200), "hour": np.arange(200) % 24})
    forest = RandomForestClassifier(5, random_state=0).fit(table, table["amount"] > 20)
    for example in (None, table[:6], table.to_numpy()[:6], {name: table[name].to_numpy()[:6] for name in table}):
        outputs = run(rt.load(forest, example=example), {"features": table.to_numpy(np.float32)}, tmp_path)
        np.testing.assert_allclose(outputs["probabilities"], forest.predict_proba(table.astype(np.float32)), atol=1e-5)


def test_a_classifier_with_labels_in_words_is_optimised(tmp_path: Path, repository: ModelRepository) -> None:
    pytest.importorskip("skl2onnx")
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.random.default_rng(0).standard_normal((200, 5)).astype(np.float32)
    y = (x[:, 0] > 0).astype(int)
    pipeline = make_pipeline(StandardScaler(), MLPClassifier((16,), max_iter=2000, random_state=0)).fit(
        x, np.array(["genuine", "fraud"])[y]
    )
    rt.import_model(pipeline, "words", example={"rows": x[:4]}, repository=repository)
    model = rt.load("words", repository=repository)
    rows = [{"rows": row[None]} for row in x]
    made = rt.optimize(
        model, calibration=rows, budget_s=30, precisions=["int8"], device="cpu", threads=1, store=VariantStore(tmp_path / "v")
    )
    assert "int8-onnxruntime" in made.variants
    targets = [np.array([1 - label]) for label in y]  # the classes in their order: fraud, genuine
    outputs = [run(made, row, tmp_path) for row in rows[:50]]
    assert rt.metrics.top1(outputs, targets[:50]) > 0.9, "scores are found behind the labels"


def test_xgboost_with_its_booster_for_bulk_rows(tmp_path: Path, repository: ModelRepository) -> None:
    pytest.importorskip("onnxmltools")
    import xgboost

    generator = np.random.default_rng(0)
    x = generator.standard_normal((500, 6)).astype(np.float32)
    for objective, y in (("binary:logistic", x[:, 0] > 0), ("reg:squarederror", x[:, 0] * 3), ("multi:softprob", np.arange(500) % 3)):
        kind = xgboost.XGBRegressor if objective.startswith("reg") else xgboost.XGBClassifier
        estimator = kind(n_estimators=12, max_depth=3, objective=objective, n_jobs=1).fit(x, y)
        rt.import_model(estimator, "trees", repository=repository)
        model = rt.load("trees", repository=repository)
        with rt.Session(model, threads=1, plans=tmp_path / objective, ladder=(1, 512)) as session:
            (output,) = session.run({"features": x}).values()
            assert any(c.backend == "xgboost" and c.median_ms for c in session.plan.candidates)
        expected = estimator.predict_proba(x) if "predict_proba" in dir(estimator) and "reg" not in objective else estimator.predict(x)
        np.testing.assert_allclose(output[:, -1], expected[:, -1] if expected.ndim == 2 else expected, atol=1e-4)
    estimator.get_booster().save_model(tmp_path / "trees.ubj")
    assert rt.load(tmp_path / "trees.ubj").signature.inputs[0].shape == ("batch", 6)


def test_xgboost_predicts_as_its_estimator_does(tmp_path: Path) -> None:
    """Up to the best round where it stopped early; ranks and logistic regression too; the estimator stays."""
    pytest.importorskip("onnxmltools")
    import xgboost

    x = np.random.default_rng(0).standard_normal((400, 4)).astype(np.float32)
    noisy = (x[:, 0] + np.random.default_rng(1).standard_normal(400) > 0).astype(int)
    settings: dict[str, Any] = {"max_depth": 4, "n_jobs": 1}
    stopped = xgboost.XGBClassifier(n_estimators=80, early_stopping_rounds=2, **settings)
    stopped.fit(x[:250], noisy[:250], eval_set=[(x[250:], noisy[250:])], verbose=False)
    assert stopped.best_iteration + 1 < stopped.get_booster().num_boosted_rounds()
    names = list(stopped.get_booster().feature_names or ())
    ranker = xgboost.XGBRanker(n_estimators=6, **settings).fit(x, noisy, group=[40] * 10)
    logistic = xgboost.XGBRegressor(n_estimators=6, objective="reg:logistic", **settings).fit(x, noisy)
    for estimator, expected in ((stopped, stopped.predict_proba(x)[:, 1]), (ranker, ranker.predict(x)), (logistic, logistic.predict(x))):
        (output,) = run(rt.load(estimator), {"features": x}, tmp_path).values()
        np.testing.assert_allclose(output[:, 0], expected, atol=1e-5)
    assert list(stopped.get_booster().feature_names or ()) == names


@pytest.mark.parametrize("library", ["xgboost", "lightgbm"])
def test_boosting_as_a_step_of_a_pipeline(library: str, tmp_path: Path) -> None:
    """Behind a scaler: the cuts of trees are values of the training data, so that these must come out to the last bit."""
    pytest.importorskip("onnxmltools")
    pytest.importorskip("skl2onnx")
    package = pytest.importorskip(library)
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.random.default_rng(0).standard_normal((500, 5)).astype(np.float32)
    settings = {"n_estimators": 10, "max_depth": 3, "n_jobs": 1, **({"verbose": -1} if library == "lightgbm" else {})}
    classifier, regressor = (
        (package.XGBClassifier, package.XGBRegressor) if library == "xgboost" else (package.LGBMClassifier, package.LGBMRegressor)
    )
    scores = make_pipeline(StandardScaler(), regressor(**settings)).fit(x, x[:, 0] * 3)
    (output,) = run(rt.load(scores), {"features": x}, tmp_path).values()
    np.testing.assert_allclose(output[:, 0], scores.predict(x), atol=1e-5)
    classes = make_pipeline(StandardScaler(), classifier(**settings)).fit(x, x[:, 0] > 0)
    outputs = run(rt.load(classes), {"features": x}, tmp_path)
    np.testing.assert_allclose(outputs["probabilities"], classes.predict_proba(x), atol=1e-5)


def test_lightgbm(tmp_path: Path) -> None:
    lightgbm = pytest.importorskip("lightgbm")
    pytest.importorskip("onnxmltools")
    x = np.random.default_rng(0).standard_normal((400, 5)).astype(np.float32)
    booster = lightgbm.train({"objective": "binary", "verbose": -1, "num_threads": 1}, lightgbm.Dataset(x, (x[:, 0] > 0).astype(int)), 10)
    booster.save_model(tmp_path / "trees.txt")
    for source in (booster, tmp_path / "trees.txt"):
        (output,) = run(rt.load(source), {"features": x[:64]}, tmp_path).values()
        np.testing.assert_allclose(output[:, 0], booster.predict(x[:64], num_threads=1), atol=1e-5)


@pytest.mark.parametrize("suffix", [".txt", ".ubj", ".json"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_damaged_booster_is_refused_and_ends_no_process(tmp_path: Path, suffix: str, share: float) -> None:
    """LightGBM ends the process on files that are cut short, XGBoost on some with other bytes in them."""
    engine = pytest.importorskip("lightgbm" if suffix == ".txt" else "xgboost")
    x = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    y = (x[:, 0] > 0).astype(int)
    path = tmp_path / f"whole{suffix}"
    if suffix == ".txt":
        engine.train({"objective": "binary", "verbose": -1, "num_threads": 1}, engine.Dataset(x, y), 10).save_model(path)
    else:
        engine.XGBClassifier(n_estimators=10, n_jobs=1).fit(x, y).save_model(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(rt.UnsupportedModelError, match=r"can't read whole.* is damaged or cut short"):
        rt.load(path)


def test_lightgbm_reads_categories_as_whole_numbers(tmp_path: Path) -> None:
    lightgbm = pytest.importorskip("lightgbm")
    pytest.importorskip("onnxmltools")
    generator = np.random.default_rng(0)
    x = generator.standard_normal((400, 4)).astype(np.float32)
    x[:, 2] = generator.integers(0, 6, 400)
    y = (x[:, 2] % 2 == 1) ^ (x[:, 0] > 1)
    classifier = lightgbm.LGBMClassifier(n_estimators=10, verbosity=-1, num_threads=1).fit(x, y, categorical_feature=[2])
    model = rt.load(classifier, example=x[:4])
    odd = np.array([0.7, -0.4, 3.99, -3.0, np.nan, 77.0], np.float32)
    given = x[:60].copy()
    given[:, 2] = np.resize(odd, 60)
    for rows in (x[:60], given):
        (output,) = run(model, {"features": rows}, tmp_path).values()
        np.testing.assert_allclose(output[:, 0], classifier.predict_proba(rows)[:, 1], atol=1e-5)


def test_a_name_that_is_a_path_is_refused(tmp_path: Path) -> None:
    imported = Imported(onnx.ModelProto(), lambda inputs: {}, "test")
    with pytest.raises(rt.ModelError, match="can't be a model's name"):
        write_folder(imported, tmp_path / "x", "../x")


@pytest.mark.parametrize("kind", ["saved model", "keras file", "object"])
def test_tensorflow(kind: str, tmp_path: Path) -> None:
    """Runs where TensorFlow and tf2onnx are installed; they are no dependency."""
    tensorflow = pytest.importorskip("tensorflow")
    pytest.importorskip("tf2onnx")
    layers = tensorflow.keras.layers
    network = tensorflow.keras.Sequential(
        [layers.Input((16, 16, 3)), layers.Conv2D(4, 3, activation="relu"), layers.GlobalAveragePooling2D(), layers.Dense(5)]
    )
    network.export(str(tmp_path / "saved"))
    network.save(tmp_path / "network.keras")
    source: Any = {"saved model": tmp_path / "saved", "keras file": tmp_path / "network.keras", "object": network}[kind]
    model = rt.load(source)
    x = np.random.default_rng(0).uniform(size=(3, 16, 16, 3)).astype(np.float32)
    (output,) = run(model, {model.signature.inputs[0].name: x}, tmp_path).values()
    np.testing.assert_allclose(output, network.predict(x, verbose=0), atol=1e-5)
    assert model.signature.inputs[0].shape[0] == "batch"


@pytest.mark.parametrize(("operator", "shape"), [("Conv", (5, 4, 3, 3)), ("MatMul", (240, 7))])
def test_the_layer_of_a_tensorflow_network_that_differs_is_named(operator: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensorflow = pytest.importorskip("tensorflow")
    pytest.importorskip("tf2onnx")
    layers = tensorflow.keras.layers
    convolutions = [layers.Conv2D(4, 3, activation="relu"), layers.Conv2D(5, 3), layers.Flatten()]
    network = tensorflow.keras.Sequential([layers.Input((12, 10, 3)), *convolutions, layers.Dense(7), layers.Dense(2)])
    imported = next(one for one in IMPORTERS if one.name == "tensorflow").load(network, None)
    weight = next(item for item in imported.proto.graph.initializer if tuple(item.dims) == shape)
    (node,) = [node for node in imported.proto.graph.node if weight.name in node.input]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.1, weight.name))
    with pytest.raises(rt.ImportMismatchError, match=rf"first layer to differ is {operator} '{re.escape(node.name)}'"):
        write_folder(imported, tmp_path / "models" / "broken", "broken")
