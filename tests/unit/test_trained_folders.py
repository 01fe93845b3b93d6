"""Folders of trained networks, MONAI bundles and nnU-Net: rebuilt from what describes them, refused where that is another network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shared_runtime as rt
from tests.networks import run

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")


def bundle(folder: Path, network: dict[str, Any], channels: int = 1) -> Any:
    from monai.networks.nets import BasicUNet

    torch.manual_seed(0)
    module = BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(4, 4, 4, 4, 4, 4)).eval()
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    data = {"inputs": {"image": {"num_channels": channels, "spatial_shape": ["16*n", 64]}}, "outputs": {"pred": {}}}
    (folder / "configs" / "metadata.json").write_text(json.dumps({"version": "0.1", "network_data_format": data}))
    preprocessing = {"_target_": "Compose", "transforms": [{"_target_": "ScaleIntensityd", "keys": "image"}]}
    config = {"width": 4, "sizes": [8, 4], "network_def": network, "preprocessing": preprocessing}
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    torch.save(module.state_dict(), folder / "models" / "model.pt")
    return module


def test_a_monai_bundle_is_rebuilt_and_keeps_its_preprocessing(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    network = {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": ["@width", *["@sizes::1"] * 5]}
    module = bundle(tmp_path / "bundle", network)
    x = np.random.default_rng(0).standard_normal((2, 1, 32, 64)).astype(np.float32)
    model = rt.load(tmp_path / "bundle", example={"image": x})
    with torch.no_grad():
        np.testing.assert_allclose(run(model, {"image": x}, tmp_path)["pred"], module(torch.from_numpy(x)).numpy(), atol=1e-4)
    assert "ScaleIntensityd" in str(model.card["preprocessing"]["transforms"])
    alone = rt.load(tmp_path / "bundle")
    assert alone.card["import"]["difference"] < 1e-4, "without an example it is compared on numbers that differ"
    assert alone.signature.inputs[0].shape[1] == 1


def test_an_example_of_zeros_says_little_of_a_network_that_normalises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Zeros are a picture without contrast: what a normalisation makes of it is rounding."""
    pytest.importorskip("monai")
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    module = UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8, 8), strides=(2, 2)).eval()
    model = rt.load(module, example=torch.zeros(1, 1, 32, 32))
    assert model.card["import"]["difference"] < 1e-4
    assert "all of whose numbers are equal" in caplog.text
    x = np.random.default_rng(0).standard_normal((2, 1, 32, 32)).astype(np.float32)
    with torch.no_grad():
        (output,) = run(model, {model.signature.inputs[0].name: x}, tmp_path).values()
        np.testing.assert_allclose(output, module(torch.from_numpy(x)).numpy(), atol=1e-4)


def test_a_bundle_of_transformers_is_rebuilt(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    from monai.networks.nets import SwinUNETR

    arguments = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "feature_size": 12}
    bundle(tmp_path / "bundle", {"_target_": "SwinUNETR", **arguments})
    torch.manual_seed(0)
    module = SwinUNETR(**arguments).eval()
    torch.save(module.state_dict(), tmp_path / "bundle" / "models" / "model.pt")
    x = np.random.default_rng(0).standard_normal((1, 1, 64, 64)).astype(np.float32)
    model = rt.load(tmp_path / "bundle", example={"image": x})
    with torch.no_grad():
        np.testing.assert_allclose(run(model, {"image": x}, tmp_path)["pred"], module(torch.from_numpy(x)).numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"_target_": "os.system", "command": "true"}, "not one of monai.networks.nets"),
        ({"_target_": "BasicUNet", "features": "$__import__('os').getcwd()"}, "expressions are not run"),
        ({"_target_": "BasicUNet", "features": "@missing"}, "does not hold"),
        ({"_target_": "BasicUNet", "features": ["@sizes::3"]}, "does not hold"),
        ({"_target_": "basic_unet"}, "not one of monai.networks.nets"),
        ({"_target_": "BasicUNet", "width": 3}, "MONAI .* can't build the bundle's BasicUNet: TypeError: .*'width'"),
    ],
)
def test_a_bundle_runs_no_code(tmp_path: Path, network: dict[str, Any], words: str) -> None:
    pytest.importorskip("monai")
    bundle(tmp_path / "bundle", network)
    with pytest.raises(rt.UnsupportedModelError, match=words):
        rt.load(tmp_path / "bundle")


def nnunet_folder(folder: Path, residual: bool, cascade: bool = False, **changed: Any) -> Any:
    """A trained folder as nnU-Net v2 writes it: weights under every name that its modules have, numpy numbers beside them.

    `changed`: what the plans say of the network in place of the usual.
    """
    from shared_runtime.importers.nnunet_network import build

    arguments: dict[str, Any] = {
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [1, 2, 2],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        **changed,
    }
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    full = {
        "patch_size": [4, 16, 16],
        "spacing": [3.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "architecture": {"network_class_name": f"dynamic_network_architectures.architectures.unet.{name}", "arch_kwargs": arguments},
    }
    plans = {
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "configurations": {
            "3d_fullres": full,
            "3d_big": {"inherits_from": "3d_fullres", **({"previous_stage": "3d_lowres"} if cascade else {})},
        },
    }
    dataset = {"channel_names": {"0": "MRI", "1": "CT"}, "labels": {"background": 0, "a": 1, "b": 2}}
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    torch.manual_seed(1)
    module = build(full, 4 if cascade else 2, 3)
    state = module.state_dict()
    twice = {**state, **{f"decoder.encoder.{k.removeprefix('encoder.')}": v for k, v in state.items() if k.startswith("encoder.")}}
    content = {"network_weights": twice, "_best_ema": np.float64(0.7), "current_epoch": 3, "trainer_name": "nnUNetTrainer"}
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    return module


@pytest.mark.parametrize("residual", [False, True])
def test_an_nnunet_folder_is_rebuilt_from_its_plans(tmp_path: Path, residual: bool) -> None:
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_big"
    module = nnunet_folder(folder, residual)
    model = rt.load(folder)
    x = np.random.default_rng(0).standard_normal((2, 2, 4, 16, 16)).astype(np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(run(model, {"image": x}, tmp_path)["logits"], module(torch.from_numpy(x)).numpy(), atol=1e-4)
    assert model.card["preprocessing"]["spacing"] == [3.0, 1.0, 1.0]
    assert model.card["labels"]["b"] == 2


def test_nnunet_plans_without_norm_and_activation_are_a_linear_network(tmp_path: Path) -> None:
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_big"
    nnunet_folder(folder, False, norm_op=None, norm_op_kwargs=None, nonlin=None, nonlin_kwargs=None)
    model = rt.load(folder)
    a, b = np.random.default_rng(0).standard_normal((2, 1, 2, 4, 16, 16)).astype(np.float32)
    of_a, of_b, of_both, of_none = (run(model, {"image": x}, tmp_path)["logits"] for x in (a, b, a + b, 0 * a))
    np.testing.assert_allclose(of_both - of_none, of_a + of_b - 2 * of_none, atol=1e-4)


@pytest.mark.parametrize(
    "changed",
    [
        {"norm_op": "torch.nn.BatchNorm3d", "nonlin": "torch.nn.SiLU"},
        {"kernel_sizes": 3, "strides": [1, 2, 2], "n_conv_per_stage": 2, "n_conv_per_stage_decoder": 1, "nonlin_first": True},
    ],
)
def test_nnunet_plans_of_other_layers(tmp_path: Path, changed: dict[str, Any]) -> None:
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_big"
    module = nnunet_folder(folder, False, **changed)
    kinds = [type(layer).__name__ for layer in module.encoder.modules()]
    assert ("BatchNorm3d" in kinds, "SiLU" in kinds, "LeakyReLU" in kinds) == (
        "norm_op" in changed,
        "nonlin" in changed,
        "nonlin" not in changed,
    )
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 16, 16)).astype(np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(run(rt.load(folder), {"image": x}, tmp_path)["logits"], module(torch.from_numpy(x)).numpy(), atol=1e-4)


def test_the_second_stage_of_an_nnunet_cascade_takes_the_labels_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_big"
    nnunet_folder(folder, False, cascade=True)
    assert rt.load(folder).signature.inputs[0].shape[1] == 2 + 2  # images, and a mask for each label


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"block": "BottleneckD"}, "ask for block 'BottleneckD'"),
        ({"norm_op": "torch.nn.GroupNorm"}, "norm_op 'torch.nn.GroupNorm'; expected one of InstanceNorm"),
        ({"nonlin": "torch.nn.Tanhshrink"}, "expected one of LeakyReLU"),
        ({"strides": [1, 2]}, r"strides \[1, 2\]; expected 3"),
        ({"features_per_stage": [4, 8, 16]}, "size mismatch for encoder.stages.2"),
        ({"kernel_sizes": None}, "do not describe a network"),
    ],
)
def test_nnunet_plans_of_another_network_are_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_big"
    nnunet_folder(folder, False)
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= changed
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(rt.UnsupportedModelError, match=words):
        rt.load(folder)


@pytest.mark.parametrize(("name", "content"), [("plans.json", "{"), ("dataset.json", "[]"), ("fold_0/checkpoint_final.pth", "x")])
def test_broken_files_of_an_nnunet_folder_are_named(tmp_path: Path, name: str, content: str) -> None:
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    nnunet_folder(folder, False)
    (folder / name).write_text(content)
    with pytest.raises(rt.UnsupportedModelError, match=Path(name).name):
        rt.load(folder)


def test_an_nnunet_checkpoint_with_code_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    nnunet_folder(folder, False)
    torch.save({"network_weights": {}, "trap": Path("x")}, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(rt.UnsupportedModelError, match="no code in it is run"):
        rt.load(folder)
