"""Networks made small in torch: trained with their INT8 rounding, pruned, distilled; what is exported is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import shared_runtime as rt
from tests.networks import run, samples

torch = pytest.importorskip("torch")
nn = torch.nn
from shared_runtime.quantization import qat  # noqa: E402
from shared_runtime.quantization.recipe import Compression, compress, prune_channels  # noqa: E402

VALIDATION = samples(80, seed=2)


def batches() -> list[Any]:
    """Six batches of 32 to train on."""
    made = []
    for seed in range(6):
        pairs = samples(32, seed)
        images, labels = np.concatenate([x["image"] for x, _ in pairs]), np.concatenate([t for _, t in pairs])
        made.append(({"image": images}, torch.from_numpy(labels)))
    return made


def test_training_in_int8_exports_what_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 4))
    prepared = qat.prepare(network)
    data = batches()
    history = qat.fit(prepared, data, torch.nn.functional.cross_entropy, learning_rate=1e-3, epochs=6)
    assert history[-1] < history[0] / 2
    folder = qat.export(prepared, {"image": data[0][0]["image"][:1]}, tmp_path / "models" / "trained", "trained")
    graph = onnx.load(folder / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 2
    assert sum(item.data_type == onnx.TensorProto.INT8 for item in graph.initializer) >= 2
    model = rt.load(folder)
    x = VALIDATION[0][0]["image"]
    with rt.Session(model, plans=tmp_path / "plans", threads=1) as session, torch.no_grad():
        (output,) = session.run({"image": x}).values()
        np.testing.assert_allclose(output, prepared(torch.from_numpy(x)).numpy(), atol=1e-4)


def test_transformers_are_trained_in_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
    encoder = torch.nn.TransformerEncoder(layer, 1)
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), encoder, torch.nn.Flatten(), torch.nn.Linear(16 * 5, 4))
    prepared = qat.prepare(network)
    x = torch.randn(6, 5, 8)
    qat.fit(prepared, [({"input": x}, torch.arange(6) % 4)], torch.nn.functional.cross_entropy, epochs=2)
    prepared.eval()
    rounded: list[Any] = []
    prepared[1].layers[0].linear1.register_forward_hook(lambda *given: rounded.append(given))
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[:, 4] = True
    with torch.no_grad():  # where torch would take a fused path of its own, with padding and without, in float
        prepared[1](prepared[0](x), src_key_padding_mask=mask)
        prepared(x)
    assert len(rounded) == 2
    folder = qat.export(prepared, {"input": x[:2].numpy()}, tmp_path / "m", "m")
    kinds = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    assert kinds.count("QuantizeLinear") == 4  # two linear layers in the encoder, one before it, one after


@pytest.mark.parametrize("kind", ["inverted residual", "dense"])
def test_channels_go_through_depthwise_convolutions_and_dense_layers(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "dense":
        network, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.SiLU(), nn.Dropout(), nn.Linear(8, 3)), torch.randn(4, 6)
    else:
        wide = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        parts = [nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), wide, nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 3, 1)]
        network, x = nn.Sequential(*parts), torch.randn(2, 3, 6, 6)
    network.eval()
    with torch.no_grad():
        network[0].weight[4:] = 0.0  # dead channels: nothing may change where they go (a LayerNorm sees fewer)
        before = network(x)
        assert prune_channels(network, 0.5) == 4
        after = network(x)
    assert network[0].weight.shape[0] == 4
    assert network[-1].weight.shape[1] == 4
    if kind != "dense":
        assert (network[3].groups, network[3].weight.shape[0]) == (4, 4)
        torch.testing.assert_close(after, before)


def test_pooling_behind_a_dense_layer_is_over_its_channels() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.MaxPool1d(2), nn.Linear(4, 3))
    assert prune_channels(network, 0.5) == 0
    assert prune_channels(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(5), nn.Linear(8, 3)), 0.5) == 0


def test_one_recipe_trains_prunes_distils_and_quantizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 4),
    )
    data = batches()
    qat.fit(network, data, nn.functional.cross_entropy, learning_rate=1e-3, epochs=4)
    folder, steps = compress(
        network,
        data,
        nn.functional.cross_entropy,
        {"image": data[0][0]["image"][:1]},
        tmp_path / "m" / "small",
        "small",
        Compression(share=0.5),
    )
    assert [step.name for step in steps] == ["train with L1", "prune channels", "distil", "quantize"]
    assert steps[1].parameters < steps[0].parameters
    model = rt.load(folder)
    assert rt.metrics.top1([run(model, inputs, tmp_path) for inputs, _ in VALIDATION], [target for _, target in VALIDATION]) > 0.9
    assert network[0].out_channels == 8


@pytest.mark.parametrize(
    ("pairs", "loss", "words"),
    [
        ([], None, "no batches"),
        ([({"x": np.full((2, 8), np.nan, np.float32)}, None)], lambda o, _: o.mean(), "the loss is tensor.nan.* in batch 1 of epoch 1"),
        ([({"x": np.ones((2, 8), np.float32)}, None)], lambda *_: 3.0, "the loss is 3.0 in batch 1"),
        ([({"x": np.ones((2, 8), np.float32)}, None)], lambda o, _: o, "expected one finite number"),
    ],
)
def test_training_that_can_not_go_well_says_so(pairs: Any, loss: Any, words: str) -> None:
    with pytest.raises(rt.OptimizationError, match=words):
        qat.fit(qat.prepare(nn.Linear(8, 2)), pairs, loss)


class TwoInputs(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, a: Any, b: Any) -> Any:
        return self.left(a) - torch.relu(self.right(b))


def test_training_gives_inputs_by_the_names_that_an_export_gives_them_by(tmp_path: Path) -> None:
    prepared = qat.prepare(TwoInputs())
    given = {"b": np.full((4, 8), 3, np.float32), "a": np.ones((4, 8), np.float32)}
    seen: list[Any] = []
    prepared.left.register_forward_pre_hook(lambda _, values: seen.append(float(values[0].max())))
    qat.fit(prepared, [(given, np.zeros((4, 4), np.float32))], nn.functional.mse_loss)
    assert seen == [1.0]
    model = rt.load(qat.export(prepared, given, tmp_path / "m", "m"))
    with torch.no_grad():
        expected = prepared(torch.from_numpy(given["a"]), torch.from_numpy(given["b"])).numpy()
    np.testing.assert_allclose(next(iter(run(model, given, tmp_path).values())), expected, atol=1e-4)


def test_only_single_precision_is_trained_in_int8() -> None:
    with pytest.raises(rt.UnsupportedModelError, match=r"layers in torch.float64; expected float32"):
        qat.prepare(nn.Linear(8, 2).double())


def test_a_network_of_one_number_learns_its_teachers_number(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
    nothing = [({"x": x}, np.zeros(64, np.float32))]
    recipe = Compression(share=0.25, epochs=0, distil_epochs=400, quantized_epochs=20, blend=1.0)
    folder, steps = compress(network, nothing, nn.functional.mse_loss, {"x": x[:2]}, tmp_path / "m", "m", recipe)
    assert steps[1].parameters < sum(p.numel() for p in network.parameters())
    answer, teacher = next(iter(run(rt.load(folder), {"x": x}, tmp_path).values())), network(torch.from_numpy(x)).detach().numpy()
    assert np.corrcoef(answer, teacher)[0, 1] > 0.97
    for wrong in ({"share": 1.0}, {"share": 0.0}, {"blend": 2.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="expected a share above 0"):
            Compression(**wrong)
