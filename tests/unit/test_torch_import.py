"""torch modules: rows on other axes, inputs and outputs by name, masks, what is refused and why."""

from __future__ import annotations

import dataclasses
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

import shared_runtime as rt
from shared_runtime.backends.base import backends
from shared_runtime.importers import torch_module
from shared_runtime.importers.base import write_folder
from shared_runtime.repository.store import ModelRepository
from tests.networks import run

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")


def small_network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3)
    )


def test_a_torch_module_in_training_mode_is_imported_as_it_predicts(tmp_path: Path, repository: ModelRepository) -> None:
    module = small_network().train()
    x = np.random.default_rng(0).standard_normal((5, 2, 6, 6)).astype(np.float32)
    rt.import_model(module, "small", example={"image": x[:1]}, repository=repository)
    model = rt.load("small", repository=repository)
    assert model.signature.inputs[0].shape == ("batch", 2, 6, 6)
    assert module.training
    (output,) = run(model, {"image": x}, tmp_path).values()
    with torch.no_grad():
        np.testing.assert_allclose(output, module.eval()(torch.from_numpy(x)).numpy(), atol=1e-5)
    assert model.card["import"]["difference"] < 1e-5


class Scaled(torch.nn.Module):
    """Two inputs, so that their order counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)

    def forward(self, x: Any, scale: Any) -> Any:
        return self.last(torch.relu(self.norm(self.first(x)))) * scale


def test_an_exported_program_is_taken_with_its_own_example(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, given, batch = Scaled().eval(), (torch.randn(4, 5), torch.randn(4, 1)), {0: torch.export.Dim("rows")}
    program = torch.export.export(module, given, dynamic_shapes=(batch, batch))
    x, scale = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32), np.array([[2], [3]], np.float32)
    with torch.no_grad():
        wanted = module(torch.from_numpy(x), torch.from_numpy(scale)).numpy()
    for example in (None, {"scale": scale, "x": x}, (x, scale)):
        model = rt.load(program, example=example)
        assert [spec.shape for spec in model.signature.inputs] == [("batch", 5), ("batch", 1)]
        (output,) = run(model, {"x": x, "scale": scale}, tmp_path).values()
        np.testing.assert_allclose(output, wanted, atol=1e-5)
    with pytest.raises(rt.UnsupportedModelError, match="pass the exported program itself"):
        rt.load(program.module(), example=(x, scale))
    with pytest.raises(rt.UnsupportedModelError, match="for one number of rows; export it with a free first dimension"):
        rt.load(torch.export.export(module, given))
    torch.export.save(program, tmp_path / "scaled.pt2")
    with pytest.raises(rt.UnsupportedModelError, match=r"torch\.export\.load"):
        rt.load(tmp_path / "scaled.pt2")


class Recurrent(torch.nn.Module):
    """Hands its state in and out, as a stream would: (layers, rows, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = torch.nn.LSTM(5, 6, 2, batch_first=True), torch.nn.Linear(6, 2)

    def forward(self, x: Any, hidden: Any, cell: Any, scale: Any) -> Any:
        y, (hidden, cell) = self.lstm(x * scale, (hidden, cell))
        return self.head(y), hidden, cell, y.mean()


def test_states_count_rows_on_another_axis(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, generator = Recurrent().eval(), np.random.default_rng(0)

    def rows(n: int) -> dict[str, np.ndarray]:
        shapes = {"x": (n, 7, 5), "hidden": (2, n, 6), "cell": (2, n, 6), "scale": (5,)}
        return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    assert rt.load(module, example=tuple(map(torch.from_numpy, rows(1).values()))).signature == rt.load(module, example=rows(1)).signature
    model = rt.load(module, example=rows(1))
    assert [spec.shape for spec in model.signature.inputs] == [("batch", 7, 5), (2, "batch", 6), (2, "batch", 6), (5,)]
    assert {name: value.shape for name, value in model.random(4).items()} == {name: value.shape for name, value in rows(4).items()}
    with rt.Session(model, plans=tmp_path / "plans", ladder=(1, 8), budget_s=0.5) as session:
        for n in (1, 3, 8):
            inputs = rows(n)
            with torch.no_grad():
                expected = module(*map(torch.from_numpy, inputs.values()))
            for value, wanted in zip(session.run(inputs).values(), expected, strict=True):
                np.testing.assert_allclose(value, wanted.numpy(), atol=1e-5)
        empty = session.run(rows(0))
    assert next(iter(empty.values())).shape == (0, 7, 2)


class Spread(torch.nn.Module):
    """Fused attention of windows, whose heads are laid beside each other by reshape; inputs in any number, outputs by name."""

    def forward(self, *inputs: Any) -> Any:
        queries, keys = (value.reshape(-1, 4, 2, 8).transpose(1, 2) for value in inputs)
        heads = torch.nn.functional.scaled_dot_product_attention(queries, keys, keys)
        return {"keys": heads.transpose(1, 2).reshape(-1, 4, 16), "largest": keys.amax((1, 2, 3))}


class Swapped(torch.nn.Module):
    def forward(self, first: Any, unused: Any = None, second: Any = None) -> Any:
        return first - 2 * second


def test_inputs_in_any_number_and_outputs_by_name(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    inputs = {name: generator.standard_normal((3, 16, 4)).astype(np.float32) for name in ("queries", "keys")}
    outputs = run(rt.load(Spread(), example={name: value[:1] for name, value in inputs.items()}), inputs, tmp_path)
    expected = Spread()(*map(torch.from_numpy, inputs.values()))
    assert list(outputs) == ["keys_out", "largest"], "one is called as an input is"
    for value, wanted in zip(outputs.values(), expected.values(), strict=True):
        np.testing.assert_allclose(value, wanted.numpy(), atol=1e-5)


def test_inputs_are_taken_by_their_names(tmp_path: Path) -> None:
    inputs = {name: np.full((2, 3), value, np.float32) for name, value in (("second", 5), ("first", 1))}
    (output,) = run(rt.load(Swapped(), example=inputs), inputs, tmp_path).values()
    assert (output == -9).all()


class Counts(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.cat([torch.zeros(len(x), 1), x], dim=1)


class EachRow(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.stack([x[row] + row for row in range(x.shape[0])])


def test_the_length_of_a_batch_stays_free(tmp_path: Path) -> None:
    x = np.arange(15, dtype=np.float32).reshape(5, 3)
    (output,) = run(rt.load(Counts(), example={"x": x[:1]}), {"x": x}, tmp_path).values()
    np.testing.assert_array_equal(output, np.concatenate([np.zeros((5, 1)), x], axis=1))


def test_a_network_that_holds_for_one_number_of_rows_is_refused_with_the_reason() -> None:
    with pytest.raises(rt.UnsupportedModelError, match=r"makes a Python number of the size of its batch, as int\(x.shape\[0\]\)"):
        rt.load(EachRow(), example={"x": np.zeros((1, 3), np.float32)})


def test_a_mismatch_names_the_first_layer_that_differs(tmp_path: Path) -> None:
    module = small_network().eval()
    imported = torch_module.from_module(module, {"image": np.zeros((1, 2, 6, 6), np.float32)}, "torch")
    gemm = next(node for node in imported.proto.graph.node if node.op_type == "Gemm")
    weight = next(item for item in imported.proto.graph.initializer if item.name == gemm.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    with pytest.raises(rt.ImportMismatchError, match=r"first layer to differ is Gemm"):
        write_folder(imported, tmp_path / "models" / "broken", "broken")
    assert list((tmp_path / "models").iterdir()) == []


def test_scripted_and_pickled_files_are_refused_with_the_way_out(tmp_path: Path) -> None:
    module = small_network().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of TorchScript
        scripted = torch.jit.trace(module, torch.zeros(1, 2, 6, 6))
        torch.jit.save(scripted, str(tmp_path / "scripted.pt"))
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    for source, words in ((scripted, "TorchScript holds code"), (tmp_path / "scripted.pt", "TorchScript holds code")):
        with pytest.raises(rt.UnsupportedModelError, match=words):
            rt.load(source, example={"image": np.zeros((1, 2, 6, 6), np.float32)})
    with pytest.raises(rt.UnsupportedModelError, match="weights_only=True"):
        rt.load(tmp_path / "weights.pth")


class Heads(torch.nn.Module):
    """Attention under a causal mask and one of padding, as language models have it."""

    def forward(self, tokens: Any, attention_mask: Any) -> Any:
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen = causal & attention_mask.bool()[:, None, None, :]
        heads = tokens[:, None]
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, seen)[:, 0]


def test_a_query_that_may_look_at_nothing_gets_zeros(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], np.int64)  # padding on the left
    inputs = {"tokens": tokens, "attention_mask": mask}
    expected = Heads()(*map(torch.from_numpy, inputs.values())).numpy()
    assert not expected[0, :2].any()
    model = rt.load(Heads(), example=inputs)
    for backend in ("onnxruntime", "openvino", "torch"):
        opened = backends()[backend].compile(model, "cpu", 1)
        np.testing.assert_allclose(opened.run(inputs)[model.signature.outputs[0].name], expected, atol=1e-5, err_msg=backend)


@dataclasses.dataclass
class Answer:
    scores: Any
    words: str = "none"


Pair = namedtuple("Pair", "mean spread")


class Returns(torch.nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Any) -> Any:
        y = 2 * x
        forms = {
            "cache": {"scores": y, "cache": object(), "none": None},
            "nested": {"scores": y, "inner": {"first": y + 1, "others": (y + 2, y + 3)}},
            "data class": Answer(y),
            "named": Pair(y, y + 1),
            "number": (y, 3),
        }
        return forms[self.form]


@pytest.mark.parametrize(
    ("form", "names", "left_out"),
    [
        ("cache", ["scores"], "object"),
        ("nested", ["scores", "inner.first", "inner.others.0", "inner.others.1"], ""),
        ("data class", ["scores"], "str"),
        ("named", ["mean", "spread"], ""),
        ("number", None, "int"),
    ],
)
def test_what_is_no_tensor_is_left_out_and_parts_keep_their_names(
    form: str, names: list[str] | None, left_out: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = run(rt.load(Returns(form), example={"x": x}), {"x": x}, tmp_path)
    assert names is None or list(outputs) == names
    for place, value in enumerate(outputs.values()):
        np.testing.assert_array_equal(value, 2 * x + place)
    said = [record.getMessage() for record in caplog.records if "left out of what Returns returns" in record.getMessage()]
    assert [words.rsplit(": ", 1)[1] for words in said] == ([left_out] if left_out else [])


def test_a_module_without_tensors_or_with_random_numbers_is_refused() -> None:
    class Nothing(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return {"words": "none"}

    class Noise(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + torch.randn_like(x)

    example = {"x": np.zeros((1, 3), np.float32)}
    with pytest.raises(rt.UnsupportedModelError, match="it returns str; expected tensors"):
        rt.load(Nothing(), example=example)
    with pytest.raises(rt.ImportMismatchError, match="another one each time for the same inputs: random numbers are drawn within"):
        rt.load(Noise(), example=example)


@pytest.mark.parametrize("kind", ["gradient", "bfloat16", "ragged", "no weights"])
def test_examples_as_they_lie_about(kind: str) -> None:
    module = torch.nn.Linear(8, 2, device="meta" if kind == "no weights" else "cpu")
    x = torch.randn(3, 8, requires_grad=True)
    example: Any = {"bfloat16": x.bfloat16(), "ragged": [[1.0], [2.0, 3.0]]}.get(kind, x)
    if kind == "gradient":
        assert rt.load(module, example={"x": example}).signature.inputs[0].shape == ("batch", 8)
        return
    with pytest.raises(rt.UnsupportedModelError, match="no weights yet" if kind == "no weights" else "example 'x' is no array"):
        rt.load(module, example={"x": example})
