"""nnU-Net's two networks, plain and residual, with the parameter names of its checkpoints. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared_runtime.errors import UnsupportedModelError

CONVOLUTIONS = {
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.AvgPool2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.AvgPool3d),
}
NORMS = ("InstanceNorm", "BatchNorm")
ACTIVATIONS = ("LeakyReLU", "ReLU", "ELU", "GELU", "SiLU", "Mish")
SHARED_OPTIONS = {
    *("input_channels", "num_classes", "n_stages", "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage_decoder"),
    *("conv_op", "conv_bias", "norm_op", "norm_op_kwargs", "dropout_op", "dropout_op_kwargs", "nonlin", "nonlin_kwargs"),
    "deep_supervision",
}
OPTIONS = {
    "PlainConvUNet": SHARED_OPTIONS | {"n_conv_per_stage", "nonlin_first"},
    "ResidualEncoderUNet": SHARED_OPTIONS | {"n_blocks_per_stage", "stem_channels"},
}
"""What plans may say of each network; anything else is refused, as a network without it would be another one."""


def _norm(options: Mapping[str, Any], width: int, rank: int) -> nn.Module | None:
    if options["norm_op"] is None:
        return None
    kind = next(kind for kind in NORMS if kind in options["norm_op"])
    return getattr(nn, f"{kind}{rank}d")(width, **options["norm_op_kwargs"])


def _activation(options: Mapping[str, Any]) -> nn.Module:
    if options["nonlin"] is None:
        return nn.Identity()
    return getattr(nn, str(options["nonlin"]).rpartition(".")[2])(**options["nonlin_kwargs"])


class Layer(nn.Module):  # type: ignore[misc]
    """Convolution, norm, and activation unless `plain`; the last two the other way round with `nonlin_first`. Dropout only trains."""

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
        convolution, _, _ = CONVOLUTIONS[len(kernel)]
        bias = bool(options["conv_bias"]) if bias is None else bias
        self.conv = convolution(ins, outs, tuple(kernel), tuple(stride), [(k - 1) // 2 for k in kernel], bias=bias)
        self.norm = _norm(options, outs, len(kernel))
        self.nonlin = nn.Identity() if plain else _activation(options)
        self.nonlin_first = bool(options["nonlin_first"])

    def forward(self, x: Tensor) -> Tensor:
        """(N, ins, ...) -> (N, outs, ...)."""
        x = self.conv(x)
        norm = nn.Identity() if self.norm is None else self.norm
        return norm(self.nonlin(x)) if self.nonlin_first else self.nonlin(norm(x))


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
        self.nonlin2 = _activation(options)
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
        stem = options["stem_channels"] or widths[0]
        self.stem = Stack(options, 1, channels, stem, kernels[0], [1] * len(kernels[0])) if residual else nn.Identity()
        ins = stem if residual else channels
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
        convolution, transposed, _ = CONVOLUTIONS[len(kernels[0])]
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
    if name not in OPTIONS:
        raise UnsupportedModelError(f"nnU-Net's network {name!r} can't be rebuilt; supported are {' and '.join(OPTIONS)}")
    options = _complete(options, OPTIONS[name], len(configuration["patch_size"]))
    network = UNet(options, channels, classes, name == "ResidualEncoderUNet")
    network.eval()
    return network


def _complete(given: Mapping[str, Any], known: set[str], rank: int) -> dict[str, Any]:
    """The options as one of each stage, with the library's defaults where plans are silent. Raises UnsupportedModelError."""
    if unknown := sorted(key for key, value in given.items() if key not in known and value not in (None, False)):
        raise UnsupportedModelError(f"the plans ask for {unknown[0]} {given[unknown[0]]!r}, which can't be rebuilt")
    options: dict[str, Any] = {"conv_bias": False, "norm_op": None, "nonlin": None, "nonlin_first": False, "stem_channels": None, **given}
    if options["norm_op"] is not None and not any(kind in str(options["norm_op"]) for kind in NORMS):
        raise UnsupportedModelError(f"the plans ask for norm_op {options['norm_op']!r}; expected one of {', '.join(NORMS)}")
    if options["nonlin"] is not None and str(options["nonlin"]).rpartition(".")[2] not in ACTIVATIONS:
        raise UnsupportedModelError(f"the plans ask for nonlin {options['nonlin']!r}; expected one of {', '.join(ACTIVATIONS)}")
    options["norm_op_kwargs"] = options.get("norm_op_kwargs") or {}
    options["nonlin_kwargs"] = {k: v for k, v in (options.get("nonlin_kwargs") or {}).items() if k != "inplace"}
    widths = options["features_per_stage"]
    stages = int(options.get("n_stages") or len(widths))
    counts = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder")
    for key in counts:
        if key in options:
            count = stages - (key == "n_conv_per_stage_decoder")
            value = [options[key]] * count if isinstance(options[key], int) else list(options[key])
            if len(value) != count:
                raise UnsupportedModelError(f"the plans state {key} {value}; expected {count}, one for each stage")
            options[key] = value
    for key in ("kernel_sizes", "strides"):
        options[key] = [[one] * rank if isinstance(one, int) else list(one) for one in options[key]]
    return options


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
        "n_blocks_per_stage" if name == "ResidualEncoderUNet" else "n_conv_per_stage": counts,
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": "InstanceNorm",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "LeakyReLU",
    }
