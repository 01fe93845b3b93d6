"""The hippocampus network: a DynUNet (MONAI's nnU-Net) small enough to ship. Needs the `train` extra."""

from __future__ import annotations

import torch
from monai.networks.nets import DynUNet

CLASSES = 3
"""Background, anterior, posterior."""


def hippocampus_network(*, deep_supervision: bool = False) -> torch.nn.Module:
    """U-Net of 2.7 M parameters: (N, 1, 48, 64, 48) float32 normalised -> (N, 3, 48, 64, 48) logits.

    Isensee et al., "nnU-Net", Nature Methods 18 (2021); instance normalisation, leaky ReLU.
    """
    return DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=CLASSES,
        kernel_size=[3, 3, 3, 3],
        strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2],
        filters=[32, 64, 96, 128],
        norm_name=("INSTANCE", {"affine": True}),
        deep_supervision=deep_supervision,
        deep_supr_num=2,
        res_block=False,
    )
