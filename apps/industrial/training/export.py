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

from apps.industrial.features import COARSE, COARSE_SIDE, EMBEDDING, FINE, FINE_SIDE, MAP, PEAK, SIZE, WHOLE
from apps.industrial.training.adapt import WINDOW
from apps.industrial.training.network import TextureNetwork
from shared_runtime.graph.export import to_onnx
from shared_runtime.graph.passes.simplify import DeadCode
from shared_runtime.signature import Signature, TensorSpec

VERSION = "1.2.0"
SMALLEST_IN_HALF = 256
OUTPUTS = ("map", "image", "fine", "coarse", "half", "whole", "embedding")
LEARNED, LEFT_OUT = ("map", "image", "embedding"), "coarse"
"""Outputs of a recipe's own model that come from the copy which learned defects, and the one that it does not have: nothing that is learned
beside defects looks at it, and without it the shipped network's layers behind `fine` need not run at full size."""
VIEWS = ((SIZE, False), ((SIZE + WINDOW) // 2, True), (WINDOW, False))
"""Side in pixels, and whether mirrored, of the views of an image whose mean the copy says. It learned from whole images at WINDOW
pixels and from windows of the image as it is; benchmarks/views.py compares others."""
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
PEAK_OUTPUT = TensorSpec("peak", ("batch",), "float32", "mean of the map's PEAK highest logits, as each view has them")
"""A recipe's own model says it beside the others: the mean of its views' maps has lower peaks than they have."""


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
    """The graph of the `shipped` network and, beside it, of a copy with the weights of `learned` for the outputs LEARNED and `peak`.

    The copy says the mean of what it sees in VIEWS. Weights that are equal are stored once. They are nearly twice as many: they are stored
    in half precision, and computed with in single.
    """
    model = onnx.ModelProto()
    model.CopyFrom(shipped)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}.shipped" if name in LEARNED else name for name in names]
    model.graph.output.remove(next(output for output in model.graph.output if output.name == LEFT_OUT))
    model.graph.output.append(helper.make_tensor_value_info("peak", onnx.TensorProto.FLOAT, ["batch"]))
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in _CONSTANTS.items())
    part, weights = onnx.utils.Extractor(shipped).extract_model(["pixels"], list(LEARNED)), _weights_of(learned, shipped, model)
    views = [_view(part, weights, f".view{number}", *view, model) for number, view in enumerate(VIEWS)]
    for name in (*LEARNED, "peak"):
        model.graph.node.append(helper.make_node("Mean", [view[name] for view in views], [name]))
    DeadCode().apply(model)
    return _stored_in_half(model)


_CONSTANTS = {
    "view.last": np.array([-1], np.int64),
    "view.before_first": np.array([np.iinfo(np.int64).min], np.int64),
    "view.channel": np.array([1], np.int64),
    "view.row": np.array([0, -1], np.int64),
    "view.peak": np.array([PEAK], np.int64),
}


def _weights_of(learned: TextureNetwork, shipped: onnx.ModelProto, model: onnx.ModelProto) -> dict[str, str]:
    """Add the weights of `learned` that differ from the shipped ones to `model`; their names by those of the shipped ones."""
    own, names = {f"network.{name}": values.numpy() for name, values in learned.state_dict().items()}, {}
    for item in shipped.graph.initializer:
        if item.name in own and not np.array_equal(numpy_helper.to_array(item), own[item.name]):
            names[item.name] = f"{item.name}.learned"
            model.graph.initializer.append(numpy_helper.from_array(own[item.name], names[item.name]))
    return names


def _view(part: onnx.ModelProto, weights: dict[str, str], tail: str, side: int, mirrored: bool, model: onnx.ModelProto) -> dict[str, str]:
    """Add the nodes of `part` with other `weights` to `model`, for the image at `side` pixels, mirrored or not; what they make is named
    NAME + `tail`. The names of the outputs LEARNED and `peak`, the map at its full size and turned back.

    Nodes that would make what the shipped network makes are not added.
    """

    def add(kind: str, inputs: list[str], *results: str, **attributes: Any) -> str:
        model.graph.node.append(helper.make_node(kind, inputs, [result + tail for result in results], **attributes))
        return results[0] + tail

    def resized(name: str, result: str, factor: float) -> str:
        scales = numpy_helper.from_array(np.array([1, 1, factor, factor], np.float32), f"{result}.factor{tail}")
        model.graph.initializer.append(scales)
        return add("Resize", [name, "", scales.name], result, mode="linear")

    def turned(name: str, result: str) -> str:
        return add("Slice", [name, "view.last", "view.before_first", "view.last", "view.last"], result) if mirrored else name

    seen = turned("pixels" if side == SIZE else resized("pixels", "pixels.small", side / SIZE), "pixels.turned")
    names = weights if seen == "pixels" else weights | {"pixels": seen}
    for node in part.graph.node:
        if not any(name in names for name in node.input):
            continue
        names = names | {name: name + tail for name in node.output}
        copy = model.graph.node.add()
        copy.CopyFrom(node)
        copy.name = node.name + tail if node.name else ""
        copy.input[:] = [names.get(name, name) for name in node.input]
        copy.output[:] = [names[name] for name in node.output]
        if node.op_type == "Reshape":  # the map as a row, which is shorter here
            copy.input[1] = "view.row"
            del copy.attribute[:]
    place = names["map"]
    highest = add("TopK", [add("Reshape", [place, "view.row"], "map.row"), "view.peak"], "map.highest", "map.where")
    peak = add("ReduceMean", [highest, "view.channel"], "peak", keepdims=0)
    if side != SIZE:
        full = resized(add("Unsqueeze", [place, "view.channel"], "map.channel"), "map.full", SIZE / side)
        place = add("Squeeze", [full, "view.channel"], "map.whole")
    return {name: names[name] for name in LEARNED} | {"map": turned(place, "map.back"), "peak": peak}


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
    made = {output.name for output in graph.graph.output}
    outputs = tuple(spec for spec in (*SIGNATURE.outputs, PEAK_OUTPUT) if spec.name in made)
    Signature(SIGNATURE.inputs, outputs).write(folder / "signature.json")
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    lines = [f'name = "{name}"', f'version = "{VERSION}"', 'task = "features and defects of textured parts"', 'licence = "Apache-2.0"']
    for title, values in {"artefact": {"sha256": digest}, **sections}.items():
        lines += ["", f"[{title}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (folder / "card.toml").write_text("\n".join(lines) + "\n")
    return digest
