"""Lossy passes: pruning, low rank and shared weight values. What they lose only the guard can tell; none is verified as exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from shared_runtime.graph.passes.base import GraphEditor, PassRefused, attribute

SMALLEST = 256
CHANNELWISE = frozenset(
    {"Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "Elu", "HardSwish", "Gelu", "MaxPool", "AveragePool", "Dropout", "Identity"}
)


class PruneWeights:
    """The smallest weights become zero (unstructured, by magnitude: Han et al., 2015)."""

    name, tolerance, engine = "prune-weights", None, ""
    summary = "set the smallest weights to zero: option sparsity (0.5)"
    options = ("sparsity",)

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        sparsity = _share(options.get("sparsity", 0.5), "sparsity")
        editor, changes = GraphEditor(model), 0
        for name in _weights(editor):
            value = editor.value(name)
            assert value is not None
            limit = np.quantile(np.abs(value), sparsity)
            kept = np.where(np.abs(value) > limit, value, 0).astype(value.dtype)
            changes += int(np.count_nonzero(value) - np.count_nonzero(kept))
            editor.set_value(name, kept)
        return changes


class PruneChannels:
    """Whole channels of a convolution with the smallest L1 norm go, with what the next layer read from them (Li et al., 2017)."""

    name, tolerance, engine = "prune-channels", None, ""
    summary = "take out the convolution channels of the smallest L1 norm: option share (0.25)"
    options = ("share",)

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        share = _share(options.get("share", 0.25), "share")
        editor, changes = GraphEditor(model), 0
        for node in [n for n in model.graph.node if n.op_type == "Conv"]:
            chain = self._chain(editor, node)
            weight = editor.value(node.input[1])
            if chain is None or weight is None or len(editor.readers[node.input[1]]) > 1:
                continue
            drop = int(share * len(weight))
            if not drop or drop >= len(weight):
                continue
            norms = np.abs(weight.reshape(len(weight), -1)).sum(1)
            kept = np.sort(np.argsort(norms)[drop:])
            between, following = chain
            editor.set_value(node.input[1], weight[kept])
            for owner in (node, *between):
                for name in list(owner.input)[2 if owner is node else 1 :]:
                    value = editor.value(name)
                    if value is not None and value.shape == (len(weight),):
                        editor.set_value(name, value[kept])
            after = editor.value(following.input[1])
            assert after is not None
            editor.set_value(following.input[1], after[:, kept])
            changes += drop
        return changes

    def _chain(self, editor: GraphEditor, node: onnx.NodeProto) -> tuple[list[onnx.NodeProto], onnx.NodeProto] | None:
        """What stands between a convolution and the one convolution that reads it, where each acts on channels alone."""
        if attribute(node, "group", 1) != 1:
            return None
        between: list[onnx.NodeProto] = []
        at = editor.only_reader(node.output[0])
        while at is not None and (at.op_type in CHANNELWISE or at.op_type in ("BatchNormalization", "InstanceNormalization")):
            between.append(at)
            at = editor.only_reader(at.output[0])
        shared = at is not None and len(editor.readers.get(at.input[1], [])) > 1
        if at is None or at.op_type != "Conv" or attribute(at, "group", 1) != 1 or shared or editor.value(at.input[1]) is None:
            return None
        return between, at


class LowRank:
    """A matrix product becomes two thin ones by the singular value decomposition, where that is less arithmetic."""

    name, tolerance, engine = "low-rank", None, ""
    summary = "split matrix products into two thin ones by SVD: option energy (0.98)"
    options = ("energy",)

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        energy = _share(options.get("energy", 0.98), "energy")
        editor, changes = GraphEditor(model), 0
        for node in [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm")]:
            stored = editor.value(node.input[1])
            if stored is None or stored.ndim != 2 or stored.size < SMALLEST or attribute(node, "transA", 0):
                continue
            across = bool(attribute(node, "transB", 0))
            u, s, v = np.linalg.svd(stored.T if across else stored, full_matrices=False)
            rank = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), energy)) + 1
            if rank * (u.shape[0] + v.shape[1]) >= 0.9 * stored.size:
                continue
            out = node.output[0]
            editor.set_value(f"{out}_first", (u[:, :rank] * s[:rank]).astype(np.float32))
            second = v[:rank].astype(np.float32)
            editor.set_value(f"{out}_second", second.T if across else second)
            place = list(model.graph.node).index(node)
            model.graph.node.insert(place, helper.make_node("MatMul", [node.input[0], f"{out}_first"], [f"{out}_thin"], name=f"{out}_thin"))
            node.input[0], node.input[1] = f"{out}_thin", f"{out}_second"
            changes += 1
        return changes


class ShareValues:
    """Each weight tensor holds few distinct values (k-means: Han et al., Deep Compression): the file compresses, the arithmetic stays."""

    name, tolerance, engine = "share-values", None, ""
    summary = "round each weight tensor to few shared values: option values (32)"
    options = ("values",)

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        count = int(options.get("values", 32))
        if not 2 <= count <= 4096:
            raise PassRefused(f"values is {count}; expected 2 to 4096")
        editor, changes = GraphEditor(model), 0
        for name in _weights(editor):
            value = editor.value(name)
            assert value is not None
            centres = np.quantile(value, np.linspace(0, 1, count))
            for _ in range(10):
                owner = (
                    np.abs(value.ravel()[:, None] - centres).argmin(1)
                    if value.size * count < 2e7
                    else np.digitize(value.ravel(), (centres[1:] + centres[:-1]) / 2)
                )
                sums, counts = np.bincount(owner, value.ravel(), count), np.bincount(owner, minlength=count)
                centres = np.sort(np.where(counts > 0, sums / np.maximum(counts, 1), centres))
            owner = np.digitize(value.ravel(), (centres[1:] + centres[:-1]) / 2)
            editor.set_value(name, centres[owner].reshape(value.shape).astype(value.dtype))
            changes += 1
        return changes


def _share(value: Any, name: str) -> float:
    if not 0 < float(value) < 1:
        raise PassRefused(f"{name} is {value}; expected a number between 0 and 1")
    return float(value)


def _weights(editor: GraphEditor) -> list[str]:
    """The float weights of convolutions and matrix products that are worth a change."""
    found = []
    for node in editor.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            value = editor.value(node.input[1])
            if value is not None and value.dtype == np.float32 and value.size >= SMALLEST and node.input[1] not in found:
                found.append(node.input[1])
    return found
