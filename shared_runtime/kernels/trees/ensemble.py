"""Reads an ensemble of trees, and what follows it, from an ONNX graph into the arrays that the kernel walks.

Operators: `TreeEnsembleRegressor` and `TreeEnsembleClassifier` of ai.onnx.ml (onnx.ai/onnx/operators/onnx_aionnxml_*).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.graph.passes.base import GraphEditor
from shared_runtime.graph.passes.trees import hands_on, takes_second

NODE = np.dtype([("threshold", np.float32), ("feature", np.int32), ("left", np.int32), ("missing", np.int32)])
"""A node: right where x >= threshold, else `left`; right is the next after left. A leaf is its own left, its threshold infinite.
NaN goes right where `missing` is 1."""
NONE, LOGISTIC, SOFTMAX, PAIR = range(4)
"""What is made of the sums: nothing, a sigmoid each, a softmax, or a sigmoid and what it lacks to 1 before it."""
BLOCK_TREES = 64
MOST_WEIGHTS = 1 << 26
ORDERS = {b"BRANCH_LT": (False, False), b"BRANCH_LEQ": (False, True), b"BRANCH_GTE": (True, False), b"BRANCH_GT": (True, True)}
"""Modes as `x < t` after exchanging the branches (first) and with the next larger threshold (second)."""


@dataclass(frozen=True)
class Ensemble:
    """Trees in the kernel's layout.

    `nodes` (N,) NODE, `weights` (N, K) float32 (zero but in leaves), `roots` (T,) int32 by blocks of trees of like
    depth, `blocks` (B, 2) int32 of number and depth, `base` (K,) float64, `features` of a row. A row's sums are
    `scale` * weights of its leaves + base, then `post`. `output`: the tensor of scores, `label`: that of the most
    probable class and `classes` its values, where the graph gives it.
    """

    nodes: NDArray[Any]
    weights: NDArray[np.float32]
    roots: NDArray[np.int32]
    blocks: NDArray[np.int32]
    base: NDArray[np.float64]
    features: int
    post: int
    scale: float
    output: str
    label: str = ""
    classes: NDArray[np.int64] | None = None

    @property
    def columns(self) -> int:
        """Scores of a row."""
        return 2 if self.post == PAIR else len(self.base)


def read_ensemble(proto: onnx.ModelProto, features: int) -> Ensemble:
    """The ensemble of a graph that is nothing else but its scores. Raises UnsupportedModelError with the reason."""
    graph = GraphEditor(proto)
    found = [n for n in proto.graph.node if n.op_type in ("TreeEnsembleRegressor", "TreeEnsembleClassifier")]
    if len(found) != 1 or len(proto.graph.input) != 1 or found[0].input[0] != proto.graph.input[0].name:
        raise UnsupportedModelError("the graph does not begin with one ensemble of trees that reads its only input")
    tree, given = found[0], {item.name: helper.get_attribute_value(item) for item in found[0].attribute}
    classifier = tree.op_type == "TreeEnsembleClassifier"
    if given.get("aggregate_function", b"SUM") not in (b"SUM", b"AVERAGE"):
        raise UnsupportedModelError(f"trees are joined by {given['aggregate_function'].decode()}; the kernel sums or averages")
    if strange := [name for name in given if name.endswith("_as_tensor")]:
        raise UnsupportedModelError(f"the trees are in double precision ({strange[0]})")
    post, ids = _post(given, classifier), "class_ids" if classifier else "target_ids"
    targets = int(given.get("n_targets", 1))
    if classifier:
        classes = list(given.get("classlabels_int64s", []))
        targets = 1 if post == PAIR else len(classes)
    output, post = _tail(graph, tree.output[1 if classifier else 0], post, targets)
    label = tree.output[0] if classifier and tree.output[0] in graph.outputs else ""
    if label and not classes:
        raise UnsupportedModelError("the classes have no whole numbers as names")
    if label and post == LOGISTIC and len(classes) == 2 and targets == 1:
        raise UnsupportedModelError("the label of two classes is asked for beside the score of one")
    if sorted(graph.outputs) != sorted({output, label} - {""}):
        raise UnsupportedModelError(f"outputs {sorted(graph.outputs)} are not all made by the ensemble")
    nodes, weights, roots, depths = _layout(given, ids.split("_")[0], ids, targets, single=post == PAIR)
    if nodes["feature"].max(initial=0) >= features:
        raise UnsupportedModelError(f"a tree reads feature {nodes['feature'].max()}, the input has {features}")
    blocks = [depths[start : start + BLOCK_TREES] for start in range(0, len(depths), BLOCK_TREES)]
    base = np.zeros(targets) if not given.get("base_values") else np.asarray(given["base_values"], np.float64)
    if len(base) != targets:
        raise UnsupportedModelError(f"{len(base)} base values for {targets} scores")
    return Ensemble(
        nodes=nodes,
        weights=weights,
        roots=roots,
        blocks=np.array([(len(some), some.max()) for some in blocks], np.int32),
        base=base,
        features=features,
        post=post,
        scale=1 / len(roots) if given.get("aggregate_function") == b"AVERAGE" else 1.0,
        output=output,
        label=label,
        classes=np.asarray(classes, np.int64) if label else None,
    )


def _post(given: Mapping[str, Any], classifier: bool) -> int:
    """The transform of an operator; a classifier of two classes that sums one score gives both probabilities."""
    name = given.get("post_transform", b"NONE")
    known = {b"NONE": NONE, b"LOGISTIC": LOGISTIC, b"SOFTMAX": SOFTMAX}
    if name not in known:
        raise UnsupportedModelError(f"the kernel has no transform {name.decode()}")
    if classifier and len(given.get("classlabels_int64s", given.get("classlabels_strings", []))) == 2 and len(set(given["class_ids"])) == 1:
        if name != b"LOGISTIC":
            raise UnsupportedModelError(f"two classes by one score with the transform {name.decode()}")
        return PAIR
    return known[name]


def _tail(graph: GraphEditor, scores: str, post: int, targets: int) -> tuple[str, int]:
    """What follows the ensemble: the output at the end of a chain, and the transform with what the chain adds to it.

    Each step is Identity, a sigmoid, a softmax over the columns, or the choice of the second of two probabilities.
    """
    while scores not in graph.outputs:
        readers = graph.readers.get(scores, [])
        if len(readers) != 1:
            raise UnsupportedModelError(f"{len(readers)} operators read {scores!r}; the kernel knows one chain behind the trees")
        node = readers[0]
        if node.op_type == "Sigmoid" and post == NONE:
            post = LOGISTIC
        elif node.op_type == "Softmax" and post == NONE and _axis(node) in (1, -1):
            post = SOFTMAX
        elif post == PAIR and takes_second(graph, node):
            post = LOGISTIC
        elif not hands_on(graph, node):
            raise UnsupportedModelError(f"the kernel does not know {node.op_type} behind the trees")
        scores = node.output[0]
    return scores, post


def _axis(node: onnx.NodeProto) -> int:
    return next((item.i for item in node.attribute if item.name == "axis"), -1)


def _layout(
    given: Mapping[str, Any], part: str, ids: str, targets: int, *, single: bool
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
    """Nodes level by level with both branches side by side, weights, roots and depths; shallow trees first."""
    find = _Finder(given["nodes_treeids"], given["nodes_nodeids"])
    count, tree = len(find.tree), find.tree
    if count * targets > MOST_WEIGHTS:
        raise UnsupportedModelError(f"{count} nodes with {targets} scores each are too many for the kernel's table")
    modes = np.array(given["nodes_modes"])
    if unknown := set(given["nodes_modes"]) - set(ORDERS) - {b"LEAF"}:
        raise UnsupportedModelError(f"the kernel does not know branches of the kind {sorted(unknown)[0].decode()}")
    inner = np.flatnonzero(modes != b"LEAF")
    swapped, next_up = (np.isin(modes[inner], [mode for mode, order in ORDERS.items() if order[side]]) for side in (0, 1))
    true, false = (find.nodes(tree[inner], np.asarray(given[f"nodes_{side}nodeids"])[inner]) for side in ("true", "false"))
    children = np.full((count, 2), -1)
    children[inner] = np.stack((np.where(swapped, false, true), np.where(swapped, true, false)), axis=1)
    parents = np.bincount(children[inner].ravel(), minlength=count)
    roots = np.flatnonzero(parents == 0)
    if parents.max() > 1 or len(roots) != tree.max() + 1:
        raise UnsupportedModelError(
            f"{tree.max() + 1} trees have {len(roots)} nodes that no branch leads to, expected one each; a node has one parent"
        )
    depths = np.zeros(len(roots), np.int32)
    for depth, level in enumerate(_levels(roots, children)):
        depths[tree[level]] = depth
    roots = roots[np.argsort(depths[tree[roots]], kind="stable")]
    order = np.concatenate(list(_levels(roots, children)))
    if len(order) < count:
        raise UnsupportedModelError(f"{count - len(order)} nodes belong to no tree")
    place = np.empty(count, np.int32)
    place[order] = np.arange(count)
    limits = np.asarray(given["nodes_values"], np.float32)[inner]
    limits = np.where(next_up, np.nextafter(limits, np.float32(np.inf)), limits)
    if not np.isfinite(limits).all():
        raise UnsupportedModelError(f"a branch compares with {limits[~np.isfinite(limits)][0]}")
    nodes = np.zeros(count, NODE)
    nodes["left"], nodes["threshold"] = np.arange(count), np.inf
    here, tracks = place[inner], np.asarray(given.get("nodes_missing_value_tracks_true") or np.zeros(count), bool)
    nodes["threshold"][here] = limits
    nodes["feature"][here] = np.asarray(given["nodes_featureids"])[inner]
    nodes["left"][here] = place[children[inner, 0]]
    nodes["missing"][here] = tracks[inner] == swapped
    weights = np.zeros((count, targets), np.float32)
    leaves = place[find.nodes(find.trees(given[f"{part}_treeids"]), np.asarray(given[f"{part}_nodeids"]))]
    columns = np.zeros(len(leaves), int) if single or targets == 1 else np.asarray(given[ids])
    np.add.at(weights, (leaves, columns), np.asarray(given[f"{part}_weights"], np.float32))
    return nodes, weights, place[roots], depths[tree[roots]]


def _levels(roots: NDArray[np.int64], children: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The nodes of all trees, a level at a time."""
    level = roots
    while len(level):
        yield level
        below = children[level].ravel()
        level = below[below >= 0]


class _Finder:
    """Where a node of a tree is listed. `tree`: the tree of each node, counted from 0."""

    def __init__(self, trees: Sequence[int], nodes: Sequence[int]) -> None:
        self._trees, self.tree = np.unique(trees, return_inverse=True)
        self._names, number = np.unique(nodes, return_inverse=True)
        keys = self.tree * len(self._names) + number
        self._order = np.argsort(keys)
        self._keys = keys[self._order]
        if (np.diff(self._keys) == 0).any():
            raise UnsupportedModelError("a node is listed twice")

    def trees(self, names: Sequence[int]) -> NDArray[np.int64]:
        """Trees by the graph's names for them."""
        return _places(self._trees, np.asarray(names))

    def nodes(self, trees: NDArray[np.int64], names: NDArray[np.int64]) -> NDArray[np.int64]:
        """Nodes by their trees and the graph's names for them."""
        return self._order[_places(self._keys, trees * len(self._names) + _places(self._names, names))]


def _places(known: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of `wanted` is in `known`, which is sorted."""
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    if (known[places] != wanted).any():
        raise UnsupportedModelError("a branch or a leaf names a node that is not there")
    return places
