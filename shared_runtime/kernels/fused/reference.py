"""What a program does, in numpy: the measure of the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from shared_runtime.kernels.fused.program import DIMS, GIVEN, KINDS, LANES, Program

Array = NDArray[np.float32]
ERF = np.vectorize(math.erf, otypes=[np.float64])
UNARY: Mapping[str, Callable[[Array, float, float], Any]] = {
    "Copy": lambda x, a, b: x,
    "Neg": lambda x, a, b: -x,
    "Abs": lambda x, a, b: abs(x),
    "Sqrt": lambda x, a, b: np.sqrt(x),
    "Reciprocal": lambda x, a, b: 1 / x,
    "Relu": lambda x, a, b: np.maximum(x, 0),
    "LeakyRelu": lambda x, a, b: np.where(x < 0, a * x, x),
    "Exp": lambda x, a, b: np.exp(x),
    "Sigmoid": lambda x, a, b: _sigmoid(x),
    "Tanh": lambda x, a, b: np.tanh(x),
    "Sign": lambda x, a, b: np.sign(x),
    "Log": lambda x, a, b: np.log(x),
    "Elu": lambda x, a, b: np.where(x < 0, a * np.expm1(x), x),
    "Softplus": lambda x, a, b: np.logaddexp(x, 0),
    "Erf": lambda x, a, b: ERF(x),
    "Gelu": lambda x, a, b: 0.5 * x * (1 + ERF(x / math.sqrt(2))),
    "Floor": lambda x, a, b: np.floor(x),
    "HardSigmoid": lambda x, a, b: np.clip(a * x + b, 0, 1),
}
BINARY: Mapping[str, Callable[[Array, Array], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Max": np.maximum,
    "Min": np.minimum,
}
REDUCE: Mapping[str, Callable[..., Any]] = {"ReduceSum": np.sum, "ReduceMean": np.mean, "ReduceMax": np.max, "ReduceMin": np.min}
NAMES = {number: name for name, number in KINDS.items()}


def run(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a program, by name."""
    outputs = {name: np.zeros(shape, np.float32) for name, shape in program.outputs.items()}
    spaces = [program.constants.copy(), np.zeros(program.scratch, np.float32)]
    spaces += [np.ascontiguousarray(inputs[name], np.float32).ravel() for name in program.inputs]
    spaces += [value.reshape(-1) for value in outputs.values()]
    assert len(spaces) == GIVEN + len(inputs) + len(outputs)
    with np.errstate(all="ignore"):
        for step in program.instructions:
            _do(step, spaces)
    return outputs


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)), np.float32)


def _view(step: Any, place: int, spaces: list[Array], shape: tuple[int, ...]) -> Array:
    operand = step["operand"][place]
    start = spaces[operand["space"]][operand["offset"] :]
    view: Array = as_strided(start, shape, [4 * int(s) for s in operand["stride"][: len(shape)]])
    return view


def _do(step: Any, spaces: list[Array]) -> None:
    kind, shape = NAMES[int(step["kind"])], tuple(int(n) for n in step["shape"])
    whole = [_view(step, place, spaces, shape) for place in range(step["operands"])] if kind not in ("Gemm", "LSTM", "GRU") else []
    if kind in UNARY:
        whole[0][...] = UNARY[kind](whole[1], step["alpha"], step["beta"])
    elif kind in BINARY:
        whole[0][...] = BINARY[kind](whole[1], whole[2])
    elif kind in REDUCE:
        whole[0][..., 0] = REDUCE[kind](whole[1], axis=-1)
    elif kind in ("Softmax", "LogSoftmax"):
        shifted = whole[1] - whole[1].max(axis=-1, keepdims=True)
        logarithm = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        whole[0][...] = logarithm if kind == "LogSoftmax" else np.exp(logarithm)
    elif kind == "MatMul":
        whole[0][..., 0] = (whole[1].astype(np.float64) * whole[2]).sum(axis=-1)
    elif kind == "Gemm":
        *outer, columns, depth = shape
        rows = _view(step, 1, spaces, (*outer, 1, depth))[..., 0, :]
        start = _view(step, 3, spaces, (*outer, columns)) if step["operands"] > 3 else np.zeros(1, np.float32)
        _view(step, 0, spaces, (*outer, columns))[...] = start + rows @ _panels(step, 2, spaces, columns, depth)
    else:
        _recurrent(step, spaces, kind, *shape[: DIMS - 2])


def _panels(step: Any, place: int, spaces: list[Array], columns: int, depth: int) -> Array:
    operand, wide = step["operand"][place], -(-columns // LANES)
    flat = spaces[operand["space"]][operand["offset"] :][: wide * LANES * depth]
    panels: Array = flat.reshape(wide, depth, LANES).transpose(1, 0, 2).reshape(depth, -1)[:, :columns]
    return panels


def _recurrent(step: Any, spaces: list[Array], kind: str, steps: int, batch: int, hidden: int) -> None:
    gates = (4 if kind == "LSTM" else 3) * hidden
    states = _view(step, 0, spaces, (steps, batch, hidden))
    given = _view(step, 1, spaces, (steps, batch, gates))
    weights = _panels(step, 2, spaces, gates, hidden)
    state = _view(step, 3, spaces, (1, batch, hidden))[0]
    for t in range(steps)[:: -1 if step["flag"] else 1]:
        product = state @ weights
        if kind == "LSTM":
            cell = _view(step, 5, spaces, (1, batch, hidden))[0]
            enter, leave, keep, new = np.split(product + given[t], 4, axis=1)
            cell[...] = _sigmoid(keep) * cell + _sigmoid(enter) * np.tanh(new)
            states[t] = _sigmoid(leave) * np.tanh(cell)
        else:
            product = product + _view(step, 5, spaces, (1, 1, gates))[0]
            update, reset = (_sigmoid(given[t][:, s] + product[:, s]) for s in (slice(0, hidden), slice(hidden, 2 * hidden)))
            new = np.tanh(given[t][:, 2 * hidden :] + reset * product[:, 2 * hidden :])
            states[t] = (1 - update) * new + update * state
        state = states[t]
