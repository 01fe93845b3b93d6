"""The eight models of `optimise`: how each comes in, and what it is calibrated and judged on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import shared_runtime as rt
from benchmarks.volume import SIDE, scan

Sample = dict[str, np.ndarray]


@dataclass
class Case:
    """One model: how it comes in, what it is calibrated and judged on, and the numbers of rows that are measured."""

    source: Any
    calibration: list[Sample]
    metric: Any = None
    rows: tuple[int, ...] = (1, 32)
    module: Any = None
    max_drop: float = 0.005
    budget: float = 60


def _data() -> Path | None:
    folder = os.environ.get("TRISCOPE_DATA_DIR")
    return None if folder is None else Path(folder)


class Recorder:
    """A session that keeps what it was asked."""

    def __init__(self, session: rt.Session) -> None:
        self._session, self.model, self.seen = session, session.model, []

    def run(self, inputs: Sample) -> Any:
        """As the session."""
        self.seen += [{name: value[i : i + 1].copy() for name, value in inputs.items()} for i in range(len(next(iter(inputs.values()))))]
        return self._session.run(inputs)


def _hippocampus() -> Case:
    """Windows that the app cuts from real crops (random ones without the data)."""
    model = rt.load("hippocampus-t1")
    folder = _data()
    if folder is None:
        return Case(model, [model.signature.random(1, i) for i in range(24)], rt.metrics.correlation, (1,))
    from apps.medical.evaluation.evaluate import case_files, evaluate_case

    files = case_files(folder / "msd_hippocampus" / "images", folder / "msd_hippocampus" / "labels")[:24]
    with rt.Session(model, variant="float32") as session:
        recorder = Recorder(session)
        for image, label in files:
            evaluate_case(image, label, recorder, None)
    return Case(model, recorder.seen[:48], rt.metrics.agreement, (1, 32))


def _sequence() -> Case:
    """Standardised histories of eight transactions, as the network sees them after its own scaling."""
    model = rt.load("fraud-sequence")
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(256):
        history = np.abs(generator.standard_normal((1, 8, 26)) * np.geomspace(1, 100, 26)).astype(np.float32)
        samples.append({"sequence": history, "mask": np.ones((1, 8), np.float32)})
    return Case(model, samples, rt.metrics.correlation)


def _boosting() -> Case:
    model = rt.load("fraud-boosting")
    return Case(model, [model.signature.random(1, i) for i in range(32)], rt.metrics.correlation)


def _texture() -> Case:
    """Parts of ten textures, every other one with a defect, as the station prepares them."""
    from apps.industrial.features import prepared
    from apps.industrial.synthesis.defects import DEFECTS, add_defect
    from apps.industrial.synthesis.textures import TEXTURES, good_part

    generator, kinds = np.random.default_rng(0), list(DEFECTS)
    parts = [good_part(name, generator) for _ in range(16) for name in TEXTURES]
    parts = [add_defect(part, kinds[place % len(kinds)], generator)[0] if place % 2 else part for place, part in enumerate(parts)]
    return Case(
        rt.load("texture-features"), [{"pixels": prepared(part)[None].astype(np.float32)} for part in parts], rt.metrics.correlation
    )


def _resnet50() -> Case:
    """ResNet-50 of MONAI with two-dimensional convolutions, weights as initialised."""
    import torch
    from monai.networks.nets import resnet50

    torch.manual_seed(0)
    module = resnet50(spatial_dims=2, n_input_channels=3, num_classes=1000).eval()
    return _module(module, _pictures(24), rt.metrics.correlation)


def _mobilenet() -> Case:
    """MobileNetV2 with ImageNet weights from the data directory (as initialised without)."""
    import torch
    from torch import nn

    from apps.industrial.training.network import MOBILENET_V2, Convolution, backbone_layers, inverted_residuals

    class MobileNetV2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers, skips, _ = inverted_residuals(MOBILENET_V2)
            layers += [Convolution(320, 1280, 1, 1, 1, True), Convolution(1280, 1001, 1, 1, 1, False)]
            self.layers, self.skips = nn.ModuleList(layers), frozenset(skips)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            outputs = {-1: image}
            x = image
            for index, layer in enumerate(self.layers):
                if index == len(self.layers) - 1:
                    x = x.mean((2, 3), keepdim=True)
                x = layer(x)
                if index in self.skips:
                    x = x + outputs[index - 3]
                outputs[index] = x
            return x.flatten(1)

    torch.manual_seed(0)
    module = MobileNetV2().eval()
    folder = _data()
    if folder is not None:
        path = folder / "backbones" / "mobilenet_v2_1.0_224_imagenet_u8.safetensors"
        for layer, (_, weight, bias, _, _) in zip(module.layers, backbone_layers(path, len(module.layers)), strict=True):
            layer.conv.weight.data.copy_(weight)
            layer.conv.bias.data.copy_(bias)
    return _module(module, _pictures(64), rt.metrics.correlation)


def _bert() -> Case:
    """Twelve encoder layers of BERT-base's size on 128 embedded tokens, weights as initialised."""
    import torch

    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True)
    module = torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).eval()
    for parameter in module.parameters():  # the encoder's layers are copies of one
        if parameter.dim() > 1:
            torch.nn.init.xavier_uniform_(parameter)
    generator = np.random.default_rng(0)
    return _module(
        module, [{"tokens": generator.standard_normal((1, 128, 768)).astype(np.float32)} for _ in range(16)], rt.metrics.correlation
    )


def _unet() -> Case:
    """A 3-D U-Net of nnU-Net's size (32 to 320 channels) on 128^3 voxels, weights as initialised."""
    import torch
    from monai.networks.nets import DynUNet

    torch.manual_seed(0)
    strides = [1, 2, 2, 2, 2, 2]
    filters = [32, 64, 128, 256, 320, 320]
    module = DynUNet(3, 1, 3, [3] * 6, strides, strides[1:], filters=filters, norm_name="instance").eval()
    windows = [{"image": scan((SIDE,) * 3, seed=i)[None].astype(np.float32)} for i in range(6)]
    return Case(module, windows, rt.metrics.correlation, (1,), module, budget=300)


def _module(module: Any, samples: list[Sample], metric: Any, rows: tuple[int, ...] = (1, 32)) -> Case:
    return Case(module, samples, metric, rows, module)


def _pictures(count: int) -> list[Sample]:
    """Coloured pictures of textures and edges, 224 pixels, -1..1."""
    from apps.industrial.synthesis.textures import TEXTURES, good_part

    generator, names = np.random.default_rng(1), list(TEXTURES)
    samples = []
    for place in range(count):
        planes = [good_part(names[(place + shift) % len(names)], generator, 224) for shift in range(3)]
        planes = [plane if plane.ndim == 2 else plane[..., 0] for plane in planes]
        image = np.stack(planes).astype(np.float32) / 127.5 - 1
        samples.append({"image": image[None]})
    return samples


CASES: dict[str, Callable[[], Case]] = {
    "fraud-boosting": _boosting,
    "fraud-sequence": _sequence,
    "hippocampus-t1": _hippocampus,
    "texture-features": _texture,
    "mobilenet_v2": _mobilenet,
    "resnet50": _resnet50,
    "bert-base": _bert,
    "unet": _unet,
}
