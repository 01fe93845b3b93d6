"""nnU-Net's two networks, plain and residual, with the parameter names of its checkpoints. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared_runtime.errors import UnsupportedModelError

CONVOLUTIONS = {
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.AvgPool2d, nn.InstanceNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.AvgPool3d, nn.InstanceNorm3d),
}


class Layer(nn.Module):  # type: ignore[misc]
    """Convolution, instance norm, and LeakyReLU unless `plain`."""

    def __init__(
        self,
        options: Mapping[str, Any],
        ins: int,
        outs: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        plain: bool = False,
        bias: bool | None = None,
    ) -> None:
        super().__init__()
        convolution, _, _, norm = CONVOLUTIONS[len(kernel)]
        bias = bool(options["conv_bias"]) if bias is None else bias
        self.conv = convolution(ins, outs, tuple(kernel), tuple(stride), [(k - 1) // 2 for k in kernel], bias=bias)
        self.norm = norm(outs, **options["norm_op_kwargs"])
        self.nonlin = nn.Identity() if plain else nn.LeakyReLU(**options["nonlin_kwargs"])

    def forward(self, x: Tensor) -> Tensor:
        """(N, ins, ...) -> (N, outs, ...)."""
        return self.nonlin(self.norm(self.conv(x)))


class Stack(nn.Module):  # type: ignore[misc]
    """Layers in a row; the first one has the stride."""

    def __init__(self, options: Mapping[str, Any], count: int, ins: int, outs: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        one = [1] * len(kernel)
        self.convs = nn.Sequential(
            *(Layer(options, ins if i == 0 else outs, outs, kernel, stride if i == 0 else one) for i in range(count))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, ins, ...) -> (N, outs, ...)."""
        return self.convs(x)


class ResidualBlock(nn.Module):  # type: ignore[misc]
    """Two layers and a shortcut (average pool, then 1x1 where the width changes: He et al., Bag of Tricks, ResNet-D)."""

    def __init__(self, options: Mapping[str, Any], ins: int, outs: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        one = [1] * len(kernel)
        self.conv1 = Layer(options, ins, outs, kernel, stride)
        self.conv2 = Layer(options, outs, outs, kernel, one, plain=True)
        self.nonlin2 = nn.LeakyReLU(**options["nonlin_kwargs"])
        shortcut: list[nn.Module] = []
        if any(s != 1 for s in stride):
            shortcut.append(CONVOLUTIONS[len(kernel)][2](tuple(stride), tuple(stride)))
        if ins != outs:
            shortcut.append(Layer(options, ins, outs, one, one, plain=True, bias=False))
        self.skip = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ins, ...) -> (N, outs, ...)."""
        return self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x))


class Blocks(nn.Module):  # type: ignore[misc]
    """Residual blocks in a row; the first one has the stride."""

    def __init__(self, options: Mapping[str, Any], count: int, ins: int, outs: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        one = [1] * len(kernel)
        self.blocks = nn.Sequential(
            *(ResidualBlock(options, ins if i == 0 else outs, outs, kernel, stride if i == 0 else one) for i in range(count))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, ins, ...) -> (N, outs, ...)."""
        return self.blocks(x)


class Encoder(nn.Module):  # type: ignore[misc]
    """The stages downwards; gives the features of each."""

    def __init__(self, options: Mapping[str, Any], channels: int, residual: bool) -> None:
        super().__init__()
        widths, kernels, strides = options["features_per_stage"], options["kernel_sizes"], options["strides"]
        counts = options["n_blocks_per_stage" if residual else "n_conv_per_stage"]
        stages: list[nn.Module] = []
        ins = channels
        self.stem = Stack(options, 1, channels, widths[0], kernels[0], [1] * len(kernels[0])) if residual else nn.Identity()
        ins = widths[0] if residual else channels
        for width, kernel, stride, count in zip(widths, kernels, strides, counts, strict=True):
            part = (Blocks if residual else Stack)(options, count, ins, width, kernel, stride)
            stages.append(part if residual else nn.Sequential(part))
            ins = width
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, channels, ...) -> features from fine to coarse."""
        x, found = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class Decoder(nn.Module):  # type: ignore[misc]
    """The stages upwards; deep supervision heads are loaded, the finest one is used."""

    def __init__(self, options: Mapping[str, Any], classes: int) -> None:
        super().__init__()
        widths, kernels, strides = options["features_per_stage"], options["kernel_sizes"], options["strides"]
        counts = options["n_conv_per_stage_decoder"]
        convolution, transposed, _, _ = CONVOLUTIONS[len(kernels[0])]
        self.transpconvs, self.stages, self.seg_layers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for s in range(1, len(widths)):
            below, skip, stride = widths[-s], widths[-s - 1], tuple(strides[-s])
            self.transpconvs.append(transposed(below, skip, stride, stride, bias=bool(options["conv_bias"])))
            self.stages.append(Stack(options, counts[s - 1], 2 * skip, skip, kernels[-s - 1], [1] * len(kernels[0])))
            self.seg_layers.append(convolution(skip, classes, 1, bias=True))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features -> logits (N, classes, ...)."""
        x = features[-1]
        for place, (up, stage) in enumerate(zip(self.transpconvs, self.stages, strict=True)):
            x = stage(torch.cat((up(x), features[-place - 2]), 1))
        return self.seg_layers[-1](x)


class UNet(nn.Module):  # type: ignore[misc]
    """(N, channels, ...) -> logits (N, classes, ...)."""

    def __init__(self, options: Mapping[str, Any], channels: int, classes: int, residual: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(options, channels, residual), Decoder(options, classes)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        return self.decoder(self.encoder(image))


def build(configuration: Mapping[str, Any], channels: int, classes: int) -> UNet:
    """The network of a configuration, in the form of nnU-Net 2.3 and later (`architecture`) or before. Raises UnsupportedModelError."""
    if "architecture" in configuration:
        name = str(configuration["architecture"]["network_class_name"]).rpartition(".")[2]
        options = dict(configuration["architecture"]["arch_kwargs"])
    else:
        name, options = _older(configuration)
    if name not in ("PlainConvUNet", "ResidualEncoderUNet"):
        raise UnsupportedModelError(f"nnU-Net's network {name!r} can't be rebuilt; supported are PlainConvUNet and ResidualEncoderUNet")
    for key, allowed in (("norm_op", "InstanceNorm"), ("nonlin", "LeakyReLU")):
        if options.get(key) and allowed not in str(options[key]):
            raise UnsupportedModelError(f"the plans ask for {key} {options[key]!r}; expected {allowed}")
    if options.get("nonlin_first"):
        raise UnsupportedModelError("the plans ask for nonlin_first, which is not supported")
    stages = len(options["features_per_stage"])
    rank = len(configuration["patch_size"])
    options["kernel_sizes"] = [[k] * rank if isinstance(k, int) else list(k) for k in options["kernel_sizes"]]
    options["strides"] = [[s] * rank if isinstance(s, int) else list(s) for s in options["strides"]]
    for key, count in (("n_conv_per_stage", stages), ("n_blocks_per_stage", stages), ("n_conv_per_stage_decoder", stages - 1)):
        if isinstance(options.get(key), int):
            options[key] = [options[key]] * count
    options.setdefault("conv_bias", False)
    options["norm_op_kwargs"] = options.get("norm_op_kwargs") or {}
    options["nonlin_kwargs"] = {k: v for k, v in (options.get("nonlin_kwargs") or {}).items() if k != "inplace"}
    network = UNet(options, channels, classes, name == "ResidualEncoderUNet")
    network.eval()
    return network


def _older(configuration: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Plans before 2.3 state widths by their first and largest one."""
    name = str(configuration.get("UNet_class_name", "PlainConvUNet"))
    kernels, strides = configuration["conv_kernel_sizes"], configuration["pool_op_kernel_sizes"]
    base, most = int(configuration["UNet_base_num_features"]), int(configuration["unet_max_num_features"])
    counts = configuration["n_conv_per_stage_encoder"]
    return name, {
        "features_per_stage": [min(base * 2**i, most) for i in range(len(kernels))],
        "kernel_sizes": kernels,
        "strides": strides,
        "n_conv_per_stage": counts,
        "n_blocks_per_stage": counts,
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin_kwargs": {},
    }
