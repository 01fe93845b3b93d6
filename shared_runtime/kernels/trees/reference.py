"""What an ensemble computes, in numpy: the measure of every kernel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared_runtime.kernels.trees.ensemble import LOGISTIC, PAIR, SOFTMAX, Ensemble


def scores(ensemble: Ensemble, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, features) float32 -> (N, columns) float32."""
    rows, nodes = np.arange(len(x))[:, None], ensemble.nodes
    at = np.broadcast_to(ensemble.roots, (len(x), len(ensemble.roots))).copy()
    for _ in range(int(ensemble.blocks[:, 1].max(initial=0))):
        node = nodes[at]
        value = x[rows, node["feature"]]
        right = np.where(np.isnan(value), node["missing"] == 1, value >= node["threshold"])
        leaf = node["left"] == at
        at = np.where(leaf, at, node["left"] + right)
    sums = ensemble.weights[at].astype(np.float64).sum(axis=1) * ensemble.scale + ensemble.base
    if ensemble.post in (LOGISTIC, PAIR):
        sums = 1 / (1 + np.exp(-sums))
    if ensemble.post == PAIR:
        sums = np.concatenate((1 - sums, sums), axis=1)
    if ensemble.post == SOFTMAX:
        sums = np.exp(sums - sums.max(axis=1, keepdims=True))
        sums /= sums.sum(axis=1, keepdims=True)
    return np.asarray(sums, np.float32)
