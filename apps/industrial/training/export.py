"""From trained weights to a model folder: ONNX, signature, card; and back to weights that can learn on.

A recipe's own model holds the shipped network and a copy that learned the part's defects, in one graph. What the statistics of good parts
are made of (`fine`, `half`, `whole`) stays as shipped: a network that is tuned to defects no longer describes good parts as well. The other
outputs are the copy's.
"""

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
from apps.industrial.training.network import TextureNetwork
from shared_runtime.graph.export import to_onnx
from shared_runtime.graph.passes.simplify import DeadCode
from shared_runtime.signature import Signature, TensorSpec

VERSION = "1.2.0"
SMALLEST_IN_HALF = 256
OUTPUTS = ("map", "image", "fine", "coarse", "half", "whole", "embedding")
LEARNED = ("map", "image", "coarse", "embedding")
"""Outputs of a recipe's own model that come from the copy which learned defects."""
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

    def __init__(self, network: TextureNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See TextureNetwork."""
        out = self.network(pixels) | self.network.at_half(pixels)
        return tuple(out[name] for name in OUTPUTS)


def exported(network: TextureNetwork) -> onnx.ModelProto:
    """The network's graph; batch is its one dynamic dimension. Weights keep their names."""
    module = _Outputs(network.cpu().to(memory_format=torch.contiguous_format))
    model: onnx.ModelProto = to_onnx(module, {"pixels": torch.zeros(2, 3, SIZE, SIZE)}, OUTPUTS)
    return model


def taught(shipped: onnx.ModelProto, learned: TextureNetwork) -> onnx.ModelProto:
    """The graph of the `shipped` network and, beside it, of a copy with the weights of `learned` for the outputs LEARNED.

    They share what lies before the first weight that differs. The weights are nearly twice as many: they are stored in half precision,
    and computed with in single.
    """
    model = onnx.ModelProto()
    model.CopyFrom(shipped)
    own = {f"network.{name}": values.numpy() for name, values in learned.state_dict().items()}
    copies: dict[str, str] = {}
    for item in list(model.graph.initializer):
        if item.name in own and not np.array_equal(numpy_helper.to_array(item), own[item.name]):
            copies[item.name] = f"{item.name}.learned"
            model.graph.initializer.append(numpy_helper.from_array(own[item.name], copies[item.name]))
    for node in shipped.graph.node:
        if any(name in copies for name in node.input):
            copies |= {name: f"{name}.learned" for name in node.output}
            copy = model.graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{node.name}.learned" if node.name else ""
            copy.input[:] = [copies.get(name, name) for name in node.input]
            copy.output[:] = [copies[name] for name in node.output]
    swapped = {name: f"{name}.shipped" for name in LEARNED} | {copies[name]: name for name in LEARNED if name in copies}
    for node in model.graph.node:
        node.input[:] = [swapped.get(name, name) for name in node.input]
        node.output[:] = [swapped.get(name, name) for name in node.output]
    DeadCode().apply(model)
    return _stored_in_half(model)


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


def network_from(graph: onnx.ModelProto) -> TextureNetwork:
    """The network with the weights of an exported graph, ready to learn on. Raises KeyError where one is missing."""
    stored = {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
    network = TextureNetwork()
    state = {name: torch.from_numpy(np.array(stored[f"network.{name}"])) for name in network.state_dict()}
    network.load_state_dict(state)
    return network.eval()


def write_model(graph: onnx.ModelProto, folder: Path, name: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Make a model folder: graph, signature, card with `sections`; the graph's SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(graph, folder / "model.onnx")
    SIGNATURE.write(folder / "signature.json")
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    lines = [f'name = "{name}"', f'version = "{VERSION}"', 'task = "features and defects of textured parts"', 'licence = "Apache-2.0"']
    for title, values in {"artefact": {"sha256": digest}, **sections}.items():
        lines += ["", f"[{title}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (folder / "card.toml").write_text("\n".join(lines) + "\n")
    return digest
