"""`triscope model` as a user runs it: import, optimise, verify, plan, profile, export; bad input ends with 2 and one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.networks import classifier, samples

pytest.importorskip("nncf")


class Command:
    """The installed command with a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("TRISCOPE_")}
        self.environment |= {"TRISCOPE_HOME": str(home), "TRISCOPE_THREADS": "1"}

    def __call__(self, *arguments: object, code: int = 0) -> str:
        tool = Path(sys.executable).parent / "triscope"
        done = subprocess.run([tool, *map(str, arguments)], env=self.environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == code, done.stderr[-2000:]
        return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def triscope(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    classifier(folder / "net.onnx", fragile=False)
    for name, count, seed in (("calibration", 32, 1), ("validation", 80, 2)):
        pairs = samples(count, seed)
        images = np.concatenate([inputs["image"] for inputs, _ in pairs])
        np.savez(folder / f"{name}.npz", image=images, target=np.concatenate([target for _, target in pairs]))
    return folder


def test_a_model_from_import_to_export(triscope: Command, files: Path, tmp_path: Path) -> None:
    imported = json.loads(triscope("model", "import", files / "net.onnx", "--name", "net", "--json", "-"))
    assert imported["difference"] < 1e-4
    data = ["--calibration", files / "calibration.npz", "--validation", files / "validation.npz", "--metric", "top1"]
    made = json.loads(triscope("model", "optimize", "net", *data, "--json", "-"))
    assert "int8-openvino" in made["variants"]
    verified = json.loads(triscope("model", "verify", "net", "--validation", files / "validation.npz", "--json", "-"))
    assert all(result["holds"] and result["same_validation_set"] for result in verified["variants"])
    assert {result["variant"] for result in verified["variants"]} == set(made["variants"])
    plan = json.loads(triscope("model", "plan", "net", "--json", "-"))
    assert {c["variant"] for c in plan["candidates"]} > set(made["variants"])
    profile = json.loads(triscope("model", "profile", "net", "--rows", 4, "--trace", tmp_path / "trace.json", "--json", "-"))
    assert profile["operators"]
    assert (tmp_path / "trace.json").is_file()
    listed = json.loads(triscope("model", "list", "--json", "-"))["models"]
    assert next(m for m in listed if m["name"] == "net")["variants"]
    triscope("model", "export", "net", "--out", tmp_path / "exported")
    elsewhere = Command(tmp_path / "elsewhere")
    shown = json.loads(elsewhere("model", "show", tmp_path / "exported", "--json", "-"))
    assert set(shown["certificates"]) == set(made["variants"])


def test_a_certificate_that_no_longer_holds_exits_with_1(triscope: Command, files: Path) -> None:
    triscope("model", "import", files / "net.onnx", "--name", "other")
    triscope("model", "optimize", "other", "--calibration", files / "calibration.npz", "--precision", "int8")
    folder = next((triscope.home / "variants").glob("*/int8-onnxruntime"))
    with (folder / "model.onnx").open("ab") as stream:
        stream.write(b"\x00")
    assert triscope("model", "verify", "other", "--variant", "int8-onnxruntime", code=1) is not None


def test_a_model_that_random_numbers_do_not_fit_is_imported_and_planned_with_an_example(triscope: Command, tmp_path: Path) -> None:
    """A table of one row: every index but 0 leaves it."""
    table = numpy_helper.from_array(np.ones((1, 4), np.float32), "table")
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 3])
    found = helper.make_tensor_value_info("found", TensorProto.FLOAT, ["batch", 3, 4])
    graph = helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["found"])], "lookup", [ids], [found], [table])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "lookup.onnx")
    np.savez(tmp_path / "rows.npz", ids=np.zeros((2, 3), np.int64))
    error = triscope("model", "import", tmp_path / "lookup.onnx", "--name", "lookup", code=2)
    assert "--example FILE.npz" in error
    example = ("--example", tmp_path / "rows.npz")
    assert json.loads(triscope("model", "import", tmp_path / "lookup.onnx", "--name", "lookup", *example, "--json", "-"))["difference"] == 0
    assert json.loads(triscope("model", "plan", "lookup", *example, "--json", "-"))["candidates"]
    assert json.loads(triscope("model", "profile", "lookup", "--rows", 3, *example, "--json", "-"))["operators"]


def test_a_model_of_a_fixed_number_of_rows_has_samples_of_as_many(triscope: Command, files: Path, tmp_path: Path) -> None:
    proto = onnx.load(files / "net.onnx")
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].CopyFrom(onnx.TensorShapeProto.Dimension(dim_value=4))
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "four.onnx")
    data = ["--calibration", files / "calibration.npz", "--validation", files / "validation.npz", "--metric", "top1", "--precision", "int8"]
    made = json.loads(triscope("model", "optimize", tmp_path / "four.onnx", *data, "--json", "-"))
    assert made["variants"]["int8-onnxruntime"]["validation"]["items"] == 20
    np.savez(tmp_path / "odd.npz", image=np.zeros((6, 3, 8, 8), np.float32))
    assert "4 rows in each" in triscope("model", "optimize", tmp_path / "four.onnx", "--calibration", tmp_path / "odd.npz", code=2)


def test_a_damaged_model_does_not_hide_the_others(files: Path, tmp_path: Path) -> None:
    own = Command(tmp_path)
    for name in ("sound", "damaged"):
        own("model", "import", files / "net.onnx", "--name", name)
    with (tmp_path / "models" / "damaged" / "model.onnx").open("ab") as stream:
        stream.write(b"\x00")
    listed = json.loads(own("model", "list", "--json", "-"))
    assert "sound" in [model["name"] for model in listed["models"]]
    assert "changed or damaged" in listed["damaged"]["damaged"]


def test_every_tool_is_listed(triscope: Command) -> None:
    assert len(json.loads(triscope("model", "passes", "--json", "-"))["tools"]) >= 20
    assert "prune-channels" in triscope("model", "passes"), "a table can be piped"


def test_bad_input_is_one_line_and_leaves_nothing(triscope: Command, files: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02")
    np.savez(tmp_path / "wrong.npz", picture=np.zeros((3, 2)))
    np.savez(tmp_path / "single.npz", image=np.float32(3))
    np.savez(tmp_path / "few.npz", image=np.zeros((4, 3, 8, 8), np.float32), target=np.zeros(3, int))
    (tmp_path / "not.npz").write_bytes(b"x")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((files / "calibration.npz").read_bytes()[:-200])
    for arguments, words in (
        (("import", tmp_path / "broken.onnx", "--name", "broken"), "not a readable ONNX model"),
        (("import", tmp_path / "weights.pt", "--name", "broken"), "may hold code"),
        (("import", tmp_path / "missing", "--name", "broken"), "nothing at"),
        (("import", files / "net.onnx", "--name", "../evil"), "can't be a model's name"),
        (("optimize", files / "net.onnx", "--calibration", tmp_path / "wrong.npz"), "has no array image"),
        (("optimize", files / "net.onnx", "--calibration", tmp_path / "not.npz"), "can't be read"),
        (("optimize", files / "net.onnx", "--calibration", tmp_path / "one.npy"), "array without a name"),
        (("optimize", files / "net.onnx", "--calibration", tmp_path / "single.npz"), "has shape []"),
        (("optimize", files / "net.onnx", "--calibration", files / "calibration.npz", "--validation", tmp_path / "few.npz"), "for 4 rows"),
        (("import", files / "net.onnx", "--name", "broken", "--example", tmp_path / "cut.npz"), "can't be read"),
        (("plan", files / "net.onnx", "--example", tmp_path / "wrong.npz"), "has no array image"),
        (("optimize", files / "net.onnx", "--calibration", files / "calibration.npz", "--precision", "int3"), "'int3'"),
        (("verify", files / "net.onnx", "--variant", "none"), "no variant 'none'"),
    ):
        error = triscope("model", *arguments, code=2)
        assert words in error
        assert [line[:9] for line in error.strip().splitlines() if "warning" not in line] == ["triscope:"]
    assert not (triscope.home / "models" / "broken").exists()
    assert not (triscope.home / "evil").exists()
