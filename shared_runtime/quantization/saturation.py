"""What happens to U8 x S8 products on a CPU without VNNI: `pmaddubsw` adds two of them in 16 bits and saturates.

The instruction is emulated on the activations of a sample, so that no second machine is needed to see it.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from shared_runtime.graph.passes.base import plain_session
from shared_runtime.signature import Tensors

MOST_PLACES = 2048
"""Places of a layer's output that are emulated, chosen at random."""


class LayerSaturation(msgspec.Struct, frozen=True):
    """One layer: sums of two products that were emulated, how many saturate, and the largest relative error of an output."""

    layer: str
    sums: int
    saturated: int
    worst_error: float


def count_saturation(model: onnx.ModelProto, inputs: Tensors, seed: int = 0) -> list[LayerSaturation]:
    """Emulate `pmaddubsw` in every convolution and matrix product of a QDQ graph whose activations are U8 and weights S8."""
    layers = list(_quantized(model))
    if not layers:
        return []
    taps = sorted({activation for _, activation, _ in layers})
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    present = {output.name for output in probe.graph.output}
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in taps if name not in present)
    session = plain_session(probe)
    activations = dict(zip(taps, session.run(taps, inputs), strict=True))
    generator = np.random.default_rng(seed)
    found = []
    for node, activation, weight in layers:
        values = activations[activation]
        if values.dtype != np.uint8 or weight.dtype != np.int8:
            continue
        rows, columns = _products(node, values, weight, generator)
        if rows is not None and columns is not None:
            found.append(emulate(node.name, rows, columns))
    return found


def emulate(layer: str, rows: NDArray[np.uint8], columns: NDArray[np.int8]) -> LayerSaturation:
    """`rows` (places, K) uint8 times `columns` (K, channels) int8, two neighbours of K added in saturating 16 bits."""
    inner = rows.shape[1] + rows.shape[1] % 2
    a = np.zeros((len(rows), inner), np.int32)
    b = np.zeros((inner, columns.shape[1]), np.int32)
    a[:, : rows.shape[1]], b[: len(columns)] = rows, columns
    saturated, exact, clipped = 0, np.zeros((len(a), b.shape[1]), np.int64), np.zeros((len(a), b.shape[1]), np.int64)
    for k in range(0, inner, 2):
        pair = a[:, k : k + 1] * b[k] + a[:, k + 1 : k + 2] * b[k + 1]
        limited = np.clip(pair, -32768, 32767)
        saturated += int(np.count_nonzero(pair != limited))
        exact += pair
        clipped += limited
    scale = max(1.0, float(np.abs(exact).max(initial=0)))
    return LayerSaturation(layer, a.shape[0] * b.shape[1] * inner // 2, saturated, float(np.abs(exact - clipped).max(initial=0) / scale))


def _quantized(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str, NDArray[np.int8]]]:
    """Layers with the name of their quantized activation and their stored weights."""
    made = {name: node for node in model.graph.node for name in node.output}
    constants = {item.name: item for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        x, w = (made.get(name) for name in node.input[:2])
        if x is None or w is None or x.op_type != "DequantizeLinear" or w.op_type != "DequantizeLinear" or w.input[0] not in constants:
            continue
        yield node, x.input[0], numpy_helper.to_array(constants[w.input[0]])


def _products(
    node: onnx.NodeProto, values: NDArray[np.uint8], weight: NDArray[np.int8], generator: np.random.Generator
) -> tuple[NDArray[np.uint8] | None, NDArray[np.int8] | None]:
    """The layer as a matrix product on some of its places."""
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type != "Conv":
        matrix = weight.T if attributes.get("transB", 0) else weight
        if matrix.ndim != 2 or attributes.get("transA", 0):
            return None, None
        return _some(values.reshape(-1, values.shape[-1]), generator), matrix
    if attributes.get("group", 1) != 1:
        return None, None  # depthwise kernels do not use the instruction
    rank = weight.ndim - 2
    pads = attributes.get("pads", [0] * (2 * rank))
    strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
    padded = np.pad(values, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    span = [dilations[a] * (weight.shape[2 + a] - 1) + 1 for a in range(rank)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, span, axis=tuple(range(2, 2 + rank)))
    step = (slice(None), slice(None), *(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))
    windows = windows[step]
    places = windows.shape[0] * int(np.prod(windows.shape[2 : 2 + rank]))
    chosen = generator.choice(places, min(places, MOST_PLACES), replace=False)
    index = np.unravel_index(chosen, (windows.shape[0], *windows.shape[2 : 2 + rank]))
    rows = windows[(index[0], slice(None), *index[1:])].reshape(len(chosen), -1)
    return rows, weight.reshape(len(weight), -1).T


def _some(rows: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    if len(rows) <= MOST_PLACES:
        return rows
    return rows[generator.choice(len(rows), MOST_PLACES, replace=False)]
