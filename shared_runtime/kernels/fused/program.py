"""Programs that the kernel runs: instructions over strided views of a few spaces of float32."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shared_runtime.errors import UnsupportedModelError

UNARY = (
    *("Copy", "Neg", "Abs", "Sqrt", "Reciprocal", "Relu", "LeakyRelu", "Exp", "Sigmoid", "Tanh"),
    *("Sign", "Log", "Elu", "Softplus", "Erf", "Gelu", "Floor", "HardSigmoid"),
)
BINARY = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min")
REDUCE = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin")
SOFTMAX = ("Softmax", "LogSoftmax")
KINDS = {name: number for number, name in enumerate((*UNARY, *BINARY, *REDUCE, *SOFTMAX, "Gemm", "MatMul", "LSTM", "GRU"))}
"""The kernel's numbers of instructions, in the order of its own enumeration."""
DIMS, OPERANDS, LANES = 5, 7, 16
CONSTANTS, SCRATCH, GIVEN = 0, 1, 2
"""Spaces: constants, scratch, and from `GIVEN` on the inputs and the outputs."""
OPERAND = np.dtype([("space", np.int32), ("offset", np.int32), ("stride", np.int32, DIMS)])
INSTRUCTION = np.dtype(
    [
        ("kind", np.int32),
        ("flag", np.int32),
        ("shape", np.int32, DIMS),
        ("operands", np.int32),
        ("operand", OPERAND, OPERANDS),
        ("alpha", np.float32),
        ("beta", np.float32),
    ]
)
MOST_INSTRUCTIONS, MOST_FLOATS, MOST_GIVEN = 5000, 1 << 30, 30


@dataclass(frozen=True)
class View:
    """A tensor in float32 (shape, strides in elements) somewhere in a buffer of the builder."""

    buffer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie one after another."""
        return all(n == 1 or s == e for n, s, e in zip(self.shape, self.strides, strides_of(self.shape), strict=True))

    def transposed(self, order: Sequence[int]) -> Self:
        """Its axes in another order."""
        return replace(self, shape=tuple(self.shape[a] for a in order), strides=tuple(self.strides[a] for a in order))

    def broadcast(self, shape: Sequence[int]) -> Self:
        """As a view of that shape, by the rules of numpy."""
        missing = len(shape) - len(self.shape)
        strides = (0,) * missing + tuple(0 if n == 1 else s for n, s in zip(self.shape, self.strides, strict=True))
        return replace(self, shape=tuple(shape), strides=strides)

    def picked(self, axis: int, start: int, step: int, count: int) -> Self:
        """Every `step`-th index of an axis, `count` of them."""
        shape, strides = list(self.shape), list(self.strides)
        shape[axis], strides[axis] = count, strides[axis] * step
        return replace(self, shape=tuple(shape), strides=tuple(strides), offset=self.offset + start * self.strides[axis])

    def inserted(self, axis: int) -> Self:
        """With one more axis of length 1 there."""
        return replace(self, shape=(*self.shape[:axis], 1, *self.shape[axis:]), strides=(*self.strides[:axis], 0, *self.strides[axis:]))

    def without(self, axis: int) -> Self:
        """Its first index of an axis, and the axis no more."""
        return replace(self, shape=self.shape[:axis] + self.shape[axis + 1 :], strides=self.strides[:axis] + self.strides[axis + 1 :])

    def merged(self, start: int, end: int) -> Self | None:
        """With the axes from `start` to before `end` as one; None where their elements don't lie at one distance."""
        kept = [(n, s) for n, s in zip(self.shape[start:end], self.strides[start:end], strict=True) if n != 1]
        if any(a[1] != b[1] * b[0] for a, b in itertools.pairwise(kept)):
            return None
        one = (math.prod(self.shape[start:end]),), (kept[-1][1] if kept else 0,)
        return replace(
            self, shape=self.shape[:start] + one[0] + self.shape[end:], strides=self.strides[:start] + one[1] + self.strides[end:]
        )


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True)
class Program:
    """What the kernel needs: instructions (N,) INSTRUCTION, constants (M,) float32, floats of scratch, shapes of inputs and outputs.

    `work`: multiplications of a run. `sources`: for each instruction, the name and the operator of the node it comes from.
    """

    instructions: NDArray[Any]
    constants: NDArray[np.float32]
    scratch: int
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]
    work: int
    sources: tuple[tuple[str, str], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each input, then of each output."""
        return tuple(math.prod(shape) for shape in (*self.inputs.values(), *self.outputs.values()))


@dataclass
class _Step:
    kind: str
    shape: tuple[int, ...]
    operands: list[View]
    source: tuple[str, str]
    flag: int = 0
    alpha: float = 0.0
    beta: float = 0.0


@dataclass
class Builder:
    """Collects the steps of a program; scratch is shared by tensors that are not needed at the same time."""

    inputs: dict[str, tuple[int, ...]]
    most_work: int | None = None
    _sizes: list[int] = field(default_factory=list)
    _constants: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    _known: dict[tuple[Any, ...], View] = field(default_factory=dict)
    _steps: list[_Step] = field(default_factory=list)
    work: int = 0
    source: tuple[str, str] = ("", "")
    """Name and operator of the node that steps are for."""

    def __post_init__(self) -> None:
        self.given = {name: self._buffer(shape) for name, shape in self.inputs.items()}

    def _buffer(self, shape: Sequence[int]) -> View:
        self._sizes.append(math.prod(shape))
        return View(len(self._sizes) - 1, tuple(shape), strides_of(shape))

    def constant(self, values: NDArray[Any]) -> View:
        """A tensor that is known; the same one is kept once."""
        values = np.ascontiguousarray(values, np.float32)
        key = (values.shape, values.tobytes())
        if key not in self._known:
            view = self._known[key] = self._buffer(values.shape)
            self._constants[view.buffer] = values.ravel()
        return self._known[key]

    def panels(self, weights: NDArray[Any]) -> View:
        """Weights (depth, columns) as the kernel reads them: panels of 16 columns, each (depth, 16), zeros behind the last column."""
        depth, columns = weights.shape
        padded = np.zeros((depth, -(-columns // LANES) * LANES), np.float32)
        padded[:, :columns] = weights
        return self.constant(padded.reshape(depth, -1, LANES).transpose(1, 0, 2))

    def emit(self, kind: str, shape: Sequence[int], operands: list[View], flag: int = 0, alpha: float = 0.0, beta: float = 0.0) -> None:
        """A step in loops of `shape`: each operand has a stride for each of them."""
        self._steps.append(_Step(kind, tuple(shape), operands, self.source, flag, alpha, beta))
        if len(self._steps) > MOST_INSTRUCTIONS:
            raise UnsupportedModelError(
                f"the network needs more than {MOST_INSTRUCTIONS} instructions; the fused kernel is made for small ones"
            )

    def spend(self, multiplications: int) -> None:
        """Count work. Raises UnsupportedModelError where it is more than `most_work`."""
        self.work += multiplications
        if self.most_work is not None and self.work > self.most_work:
            raise UnsupportedModelError(
                f"a run takes more than {self.most_work} multiplications; the fused kernel is made for small networks"
            )

    def new(self, shape: Sequence[int]) -> View:
        """A tensor to be written."""
        return self._buffer(shape)

    def nest(self, kind: str, to: View, sources: Sequence[View], alpha: float = 0.0, beta: float = 0.0) -> View:
        """`to` = kind(sources), element by element; all have the shape of `to`."""
        shape, strides = _collapsed(to.shape, [to.strides, *(s.strides for s in sources)])
        views = [replace(v, shape=shape, strides=s) for v, s in zip((to, *sources), strides, strict=True)]
        self.emit(kind, shape, views, alpha=alpha, beta=beta)
        return to

    def unary(self, kind: str, x: View, alpha: float = 0.0, beta: float = 0.0) -> View:
        """kind(x)."""
        return self.nest(kind, self.new(x.shape), [x], alpha, beta)

    def binary(self, kind: str, x: View, y: View) -> View:
        """kind(x, y), broadcast."""
        try:
            shape = np.broadcast_shapes(x.shape, y.shape)
        except ValueError as error:
            raise UnsupportedModelError(f"{kind} of tensors of shape {list(x.shape)} and {list(y.shape)}") from error
        return self.nest(kind, self.new(shape), [x.broadcast(shape), y.broadcast(shape)])

    def contiguous(self, x: View) -> View:
        """`x`, copied where its elements don't lie one after another."""
        return x if x.contiguous else self.unary("Copy", x)

    def reshaped(self, x: View, shape: Sequence[int]) -> View:
        """`x` in another shape of as many elements."""
        return replace(self.contiguous(x), shape=tuple(shape), strides=strides_of(shape))

    def one(self, x: View, start: int, end: int) -> View:
        """`x` with the axes from `start` to before `end` as one, copied if need be."""
        found = x.merged(start, end)
        return found if found is not None else self.reshaped(x, (*x.shape[:start], math.prod(x.shape[start:end]), *x.shape[end:]))

    def reduced(self, kind: str, x: View, axes: Sequence[int], keep: bool) -> View:
        """The sum, mean, largest or smallest over `axes`."""
        kept = [a for a in range(len(x.shape)) if a not in axes]
        if any(x.shape[a] == 0 for a in axes):
            raise UnsupportedModelError("a reduction over no elements")
        source = self.one(x.transposed([*kept, *axes]), len(kept), len(x.shape))
        to = self.new([x.shape[a] for a in kept])
        shape, (out, given) = _collapsed(to.shape, [to.strides, source.strides[:-1]], DIMS - 1)
        whole = (*shape, source.shape[-1])
        self.emit(kind, whole, [replace(to, strides=(*out, 0)), replace(source, strides=(*given, source.strides[-1]))])
        return self.reshaped(to, [1 if a in axes else n for a, n in enumerate(x.shape)]) if keep else to

    def softmax(self, kind: str, x: View, axis: int) -> View:
        """Softmax, or its logarithm, over one axis."""
        order = [a for a in range(len(x.shape)) if a != axis] + [axis]
        source = x.transposed(order)
        if source.shape[-1] > 1 and source.strides[-1] != 1:
            source = self.unary("Copy", source)
        to = self.new(source.shape)
        shape, strides = _collapsed(to.shape[:-1], [to.strides[:-1], source.strides[:-1]], DIMS - 1)
        views = [replace(v, strides=(*s, 1)) for v, s in zip((to, source), strides, strict=True)]
        self.emit(kind, (*shape, to.shape[-1]), views)
        return to.transposed(np.argsort(order).tolist())

    def product(self, a: View, b: NDArray[np.float32], start: View | None = None) -> View:
        """start + a (rows, depth) @ b (depth, columns), where b is constant; `start` is (columns,) or (rows, columns)."""
        rows, depth = a.shape
        columns = b.shape[1]
        self.spend(rows * depth * columns)
        if depth > 1 and a.strides[1] != 1:
            a = self.reshaped(self.unary("Copy", a), a.shape)
        to = self.new((rows, columns))
        shape = (1, 1, rows, columns, depth)
        views = [
            replace(to, strides=(0, 0, columns, 1, 0)),
            replace(a, strides=(0, 0, a.strides[0], 0, 1)),
            replace(self.panels(b), strides=(0,) * DIMS),
        ]
        if start is not None:
            wide = (
                self.contiguous(start).broadcast((rows, columns))
                if start.shape[-1] == columns
                else self.unary("Copy", start.broadcast((rows, columns)))
            )
            views.append(replace(wide, strides=(0, 0, wide.strides[0], 1, 0)))
        self.emit("Gemm", shape, views)
        return to

    def contraction(self, a: View, b: View) -> View:
        """a (batch, rows, depth) @ b (batch, depth, columns) -> (batch, rows, columns), whatever their strides."""
        batch, rows, depth = a.shape
        columns = b.shape[2]
        self.spend(batch * rows * depth * columns)
        to = self.new((batch, rows, columns))
        views = [
            replace(to, strides=(0, rows * columns, columns, 1, 0)),
            replace(a, strides=(0, a.strides[0], a.strides[1], 0, a.strides[2])),
            replace(b, strides=(0, b.strides[0], 0, b.strides[2], b.strides[1])),
        ]
        self.emit("MatMul", (1, batch, rows, columns, depth), views)
        return to

    def finish(self, outputs: Mapping[str, View]) -> Program:
        """The program that leaves these tensors as outputs."""
        if len(self.inputs) + len(outputs) > MOST_GIVEN:
            raise UnsupportedModelError(f"{len(self.inputs) + len(outputs)} inputs and outputs; the fused kernel takes {MOST_GIVEN}")
        place = {view.buffer: (GIVEN + i, 0) for i, view in enumerate(self.given.values())}
        self.source = ("outputs", "Copy")
        for i, view in enumerate(outputs.values()):
            target = self._buffer(view.shape)
            place[target.buffer] = (GIVEN + len(self.inputs) + i, 0)
            self.nest("Copy", target, [view])
        constants, end = [np.zeros(LANES, np.float32)], LANES
        for buffer, values in self._constants.items():
            place[buffer] = (CONSTANTS, end)
            padded = np.zeros(-(-values.size // LANES) * LANES, np.float32)
            padded[: values.size] = values
            constants.append(padded)
            end += padded.size
        scratch = self._share(place)
        if max(scratch, end) > MOST_FLOATS:
            raise UnsupportedModelError(f"a run needs {max(scratch, end)} numbers at once; the fused kernel holds {MOST_FLOATS}")
        table = np.zeros(len(self._steps), INSTRUCTION)
        for row, step in zip(table, self._steps, strict=True):
            row["kind"], row["flag"], row["alpha"], row["beta"] = KINDS[step.kind], step.flag, step.alpha, step.beta
            row["shape"], row["operands"] = _five(step.shape, 1, step.kind), len(step.operands)
            for slot, view in zip(row["operand"], step.operands, strict=False):
                space, offset = place[view.buffer]
                slot["space"], slot["offset"], slot["stride"] = space, offset + view.offset, _five(view.strides, 0, step.kind)
        return Program(
            table,
            np.concatenate(constants),
            scratch,
            self.inputs,
            {name: view.shape for name, view in outputs.items()},
            self.work,
            tuple(step.source for step in self._steps),
        )

    def _share(self, place: dict[int, tuple[int, int]]) -> int:
        """Give each buffer of the scratch an offset: the first gap among those that live at the same time. Returns the size."""
        life: dict[int, list[int]] = {}
        for number, step in enumerate(self._steps):
            for view in step.operands:
                if view.buffer not in place:
                    life.setdefault(view.buffer, [number, number])[1] = number
        taken: list[tuple[int, int, int, int]] = []  # offset, end, first, last
        for buffer, (first, last) in sorted(life.items(), key=lambda item: item[1][0]):
            size, offset = -(-self._sizes[buffer] // LANES) * LANES, 0
            for start, end, begins, ends in sorted(taken):
                if begins <= last and first <= ends:
                    if offset + size <= start:
                        break
                    offset = max(offset, end)
            taken.append((offset, offset + size, first, last))
            place[buffer] = (SCRATCH, offset)
        return max((end for _, end, _, _ in taken), default=0)


def _collapsed(shape: Sequence[int], strides: Sequence[Sequence[int]], most: int = DIMS) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The same loops in as few as there can be: without those of one turn, neighbours joined where every operand allows it."""
    loops: list[list[int]] = []
    for loop in zip(shape, *strides, strict=True):
        if loop[0] == 1:
            continue
        if loops and all(outer == inner * loop[0] for outer, inner in zip(loops[-1][1:], loop[1:], strict=True)):
            loops[-1] = [loops[-1][0] * loop[0], *loop[1:]]
        else:
            loops.append(list(loop))
    if len(loops) > most:
        raise UnsupportedModelError(f"{len(loops)} axes that can't be joined; the fused kernel has {most} loops")
    columns = list(zip(*loops, strict=True)) if loops else [()] * (1 + len(strides))
    return tuple(columns[0]), [tuple(c) for c in columns[1:]]


def _five(values: Sequence[int], fill: int, kind: str) -> tuple[int, ...]:
    """Loops are counted from the innermost one, but for those of recurrent layers."""
    rest = (fill,) * (DIMS - len(values))
    return (*values, *rest) if kind in ("LSTM", "GRU") else (*rest, *values)
