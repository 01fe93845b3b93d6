"""From trained weights to a model folder: ONNX, signature, card; and back to weights that can learn on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from apps.industrial.features import COARSE, COARSE_SIDE, EMBEDDING, FINE, FINE_SIDE, MAP, SIZE, WHOLE
from apps.industrial.training.network import TaughtNetwork, TextureNetwork
from shared_runtime.graph.export import to_onnx
from shared_runtime.signature import Signature, TensorSpec

VERSION = "1.2.0"
SMALLEST_IN_HALF = 256
OUTPUTS = ("map", "image", "fine", "coarse", "half", "whole", "embedding")
SIGNATURE = Signature(
    (TensorSpec("pixels", ("batch", 3, SIZE, SIZE), "float32", "RGB 0..1, exposure taken out"),),
    (
        TensorSpec("map", ("batch", MAP, MAP), "float32", "logit of a defect at a place"),
        TensorSpec("image", ("batch",), "float32", "logit of a defect in the image"),
        TensorSpec("fine", ("batch", FINE, FINE_SIDE, FINE_SIDE), "float32", "features of places, stride 8"),
        TensorSpec("coarse", ("batch", COARSE, COARSE_SIDE, COARSE_SIDE), "float32", "features of places, stride 16"),
        TensorSpec("half", ("batch", COARSE, COARSE_SIDE // 2, COARSE_SIDE // 2), "float32", "the same of the image at half its size"),
        TensorSpec("whole", ("batch", WHOLE), "float32", "mean and deviation of `half`"),
        TensorSpec("embedding", ("batch", EMBEDDING), "float32", "mean, deviation and peak of the deep features"),
    ),
)


class _Outputs(torch.nn.Module):  # type: ignore[misc]
    """The network with its outputs as a tuple, in the signature's order."""

    def __init__(self, network: TextureNetwork | TaughtNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See TextureNetwork and TaughtNetwork."""
        out = self.network(pixels) | self.network.at_half(pixels)
        return tuple(out[name] for name in OUTPUTS)


def export_network(network: TextureNetwork | TaughtNetwork, path: Path) -> None:
    """Write the network as ONNX; batch is its one dynamic dimension. The shipped network's weights keep their names.

    A taught network has nearly twice the weights: they are stored in half precision, and computed with in single.
    """
    module = _Outputs(network.cpu().to(memory_format=torch.contiguous_format))
    model = to_onnx(module, {"pixels": torch.zeros(2, 3, SIZE, SIZE)}, OUTPUTS)
    onnx.save(_stored_in_half(model) if isinstance(network, TaughtNetwork) else model, path)


def _stored_in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its float32 weights as float16 and a Cast before each use; engines undo it when they load the graph."""
    casts = []
    for item in model.graph.initializer:
        values = numpy_helper.to_array(item)
        if values.dtype == np.float32 and values.size >= SMALLEST_IN_HALF:
            name = item.name
            item.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
            casts.append(helper.make_node("Cast", [item.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


def network_from(graph: Path) -> TextureNetwork:
    """The network with the weights of an exported graph, ready to learn on. Raises KeyError where one is missing."""
    stored = {item.name: numpy_helper.to_array(item) for item in onnx.load(graph).graph.initializer}
    network = TextureNetwork()
    state = {name: torch.from_numpy(np.array(stored[f"network.{name}"])) for name in network.state_dict()}
    network.load_state_dict(state)
    return network.eval()


def write_model(network: TextureNetwork | TaughtNetwork, folder: Path, name: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Make a model folder: graph, signature, card with `sections`; the graph's SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    export_network(network, folder / "model.onnx")
    SIGNATURE.write(folder / "signature.json")
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    lines = [f'name = "{name}"', f'version = "{VERSION}"', 'task = "features and defects of textured parts"', 'licence = "Apache-2.0"']
    for title, values in {"artefact": {"sha256": digest}, **sections}.items():
        lines += ["", f"[{title}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (folder / "card.toml").write_text("\n".join(lines) + "\n")
    return digest
