"""What goes into a model and what comes out: names, shapes with named dimensions, dtypes, units."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from shared_runtime.errors import NOT_JSON, InputError, ModelError, UnsupportedModelError
from shared_runtime.graph.check import read_graph

Tensors = dict[str, NDArray[Any]]


class TensorSpec(msgspec.Struct, frozen=True):
    """One tensor. A dimension is a size, or a name for one that varies (the first is the batch)."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    unit: str = ""

    def describe(self) -> str:
        """For messages: `image float32 (batch, 1, 48, 64, 48)`."""
        return f"{self.name} {self.dtype} ({', '.join(map(str, self.shape))})"


class Signature(msgspec.Struct, frozen=True):
    """The inputs and outputs of a model, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def from_onnx(cls, graph: Path | onnx.ModelProto) -> Signature:
        """Read the signature off an ONNX file or graph. Raises UnsupportedModelError where it is not one."""
        proto = read_graph(graph) if isinstance(graph, Path) else graph
        weights = {item.name for item in proto.graph.initializer}
        inputs = tuple(_spec(value) for value in proto.graph.input if value.name not in weights)
        outputs = tuple(_spec(value) for value in proto.graph.output)
        if not inputs or not outputs:
            name = graph.name if isinstance(graph, Path) else "the graph"
            raise UnsupportedModelError(f"{name} has {len(inputs)} inputs and {len(outputs)} outputs; expected one of each or more")
        return cls(inputs, outputs)

    @classmethod
    def read(cls, path: Path) -> Signature:
        """Read `signature.json`."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, *NOT_JSON) as error:
            raise ModelError(f"the signature {path} can't be read: {error}; restore the model folder") from error

    def write(self, path: Path) -> None:
        """Write `signature.json`."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    def check(self, inputs: Mapping[str, Any], model: str) -> Tensors:
        """`inputs` as contiguous arrays of the signature's dtypes.

        A dtype is converted only where no value can change (numpy's "safe" casting). Raises InputError
        for a missing or unknown name, a wrong rank or size, a lossy dtype, or batches that differ.
        """
        known = {spec.name: spec for spec in self.inputs}
        if not isinstance(inputs, Mapping):
            raise InputError(f"model {model!r} was given a {type(inputs).__name__}; expected arrays by input name: {sorted(known)}")
        if unknown := sorted(map(str, set(inputs) - set(known))):
            raise InputError(f"model {model!r} has no input {unknown[0]!r}; its inputs are {sorted(known)}")
        if missing := sorted(set(known) - set(inputs)):
            raise InputError(f"model {model!r} needs input {known[missing[0]].describe()}, which was not given")
        checked: Tensors = {}
        bound: dict[str, tuple[int, str]] = {}
        for name, spec in known.items():
            try:
                array = np.asarray(inputs[name])
            except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors of a GPU or that have gradients
                raise InputError(f"model {model!r}: input {name!r} ({type(inputs[name]).__name__}) is no array: {error}") from error
            checked[name] = _fit(array, spec, model, bound)
        return checked

    @property
    def fixed_rows(self) -> int | None:
        """The number of rows where the model was exported for exactly that many; None where the batch is free."""
        if self._row_names:
            return None
        return next((spec.shape[0] for spec in self.inputs if spec.shape and isinstance(spec.shape[0], int)), None)

    @property
    def _row_names(self) -> set[str]:
        """What leading dimensions are called: they count rows, also where a state has them further back, as (layers, batch, width)."""
        return {spec.shape[0] for spec in self.inputs if spec.shape and isinstance(spec.shape[0], str)}

    @property
    def joins_rows(self) -> bool:
        """Whether rows of several requests can be laid behind each other and the outputs cut apart again: each tensor counts
        rows on its first axis, and on no other."""
        names = self._row_names
        leading = all(spec.shape and isinstance(spec.shape[0], str) for spec in (*self.inputs, *self.outputs))
        return leading and not any(names & set(map(str, spec.shape[1:])) for spec in (*self.inputs, *self.outputs))

    def rows(self, inputs: Tensors) -> int:
        """How many rows the inputs have, by name or fixed; 1 where the model does not count them."""
        if self.fixed_rows is not None:
            return self.fixed_rows
        names = self._row_names
        return next((inputs[spec.name].shape[axis] for spec in self.inputs for axis, size in enumerate(spec.shape) if size in names), 1)

    def row(self, inputs: Tensors, place: int) -> Tensors:
        """One row of the inputs, as inputs of one row; all of them where the model takes a fixed number of rows."""
        names, one = self._row_names, slice(place, place + 1)
        cuts = {spec.name: tuple(one if size in names else slice(None) for size in spec.shape) for spec in self.inputs}
        return {name: np.asarray(value[cuts[name]]) for name, value in inputs.items()}

    def repeated(self, one: Tensors, rows: int) -> Tensors:
        """Inputs of `rows` rows from inputs of one; what has that many, or counts none, is left as it is."""
        names, made = self._row_names, dict(one)
        for spec in self.inputs:
            for axis in (axis for axis, size in enumerate(spec.shape) if size in names):
                if made[spec.name].shape[axis] != rows:
                    made[spec.name] = np.ascontiguousarray(np.repeat(made[spec.name], rows, axis=axis))
        return made

    @property
    def has_rows(self) -> bool:
        """Whether all inputs have the same free leading dimension, and each output has one (exporters may call it otherwise):
        the rows of a request."""
        leading = {spec.shape[0] if spec.shape else None for spec in self.inputs}
        free = all(spec.shape and isinstance(spec.shape[0], str) for spec in self.outputs)
        return len(leading) == 1 and isinstance(leading.pop(), str) and free

    def dims_of(self, inputs: Tensors) -> dict[str, int]:
        """The sizes that the named dimensions other than the batch have in `inputs`."""
        found: dict[str, int] = {}
        rows = self._row_names
        for spec in self.inputs:
            for axis, size in enumerate(spec.shape):
                if isinstance(size, str) and size not in rows and spec.name in inputs:
                    found[size] = int(inputs[spec.name].shape[axis])
        return found

    def sizes(self, scale: int = 1) -> dict[str, int]:
        """Sizes for named dimensions other than the batch: those of a small picture (64), a small volume (32), a short
        sequence (8), times `scale`; the largest of them where a name is of several."""
        found: dict[str, int] = {}
        for spec in self.inputs:
            usual = {4: 64, 5: 32}.get(len(spec.shape), 8)
            for size in spec.shape:
                if isinstance(size, str) and size not in self._row_names:
                    found[size] = max(found.get(size, 0), usual * scale)
        return found

    def random(self, rows: int = 1, seed: int = 0, dims: Mapping[str, int] | None = None) -> Tensors:
        """Standard normal inputs (0 or 1 for integers) of `rows`. Other named dimensions have the size in `dims`, or that of
        `sizes`."""
        generator, sizes = np.random.default_rng(seed), {**self.sizes(), **(dims or {}), **dict.fromkeys(self._row_names, rows)}
        made: Tensors = {}
        for spec in self.inputs:
            named = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
            dtype = np.dtype(spec.dtype)
            values = generator.standard_normal(named) if dtype.kind == "f" else generator.integers(0, 2, named)
            made[spec.name] = np.asarray(values).astype(str if dtype.kind == "O" else dtype).astype(dtype)
        return made


class Checker:
    """`Signature.check` for the calls of one session: what already fits is passed on after a few comparisons."""

    def __init__(self, signature: Signature, model: str) -> None:
        self._signature, self._model = signature, model
        self._specs = [(spec.name, np.dtype(spec.dtype), len(spec.shape), tuple(enumerate(spec.shape))) for spec in signature.inputs]

    def __call__(self, inputs: Mapping[str, Any]) -> Tensors:
        """Checked inputs by name. Raises InputError as `Signature.check` does."""
        if type(inputs) is dict and len(inputs) == len(self._specs) and self._fits(inputs):
            return inputs
        return self._signature.check(inputs, self._model)

    def _fits(self, inputs: Tensors) -> bool:
        bound: dict[str, int] = {}
        for name, dtype, rank, shape in self._specs:
            array = inputs.get(name)
            if type(array) is not np.ndarray or array.dtype != dtype or array.ndim != rank or not array.flags.c_contiguous:
                return False
            have = array.shape
            for axis, want in shape:
                if (want if type(want) is int else bound.setdefault(want, have[axis])) != have[axis]:  # type: ignore[arg-type]
                    return False
        return True


def _fit(array: NDArray[Any], spec: TensorSpec, model: str, bound: dict[str, tuple[int, str]]) -> NDArray[Any]:
    wanted = np.dtype(spec.dtype)
    if array.dtype != wanted and not np.can_cast(array.dtype, wanted, "safe"):
        raise InputError(
            f"model {model!r}: input {spec.name!r} is {array.dtype}, expected {wanted}; convert it with .astype({str(wanted)!r})"
        )
    shape = tuple(array.shape)
    fits = len(shape) == len(spec.shape) and all(
        isinstance(want, str) or have == want for have, want in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"model {model!r}: input {spec.name!r} has shape {list(shape)}, expected {list(spec.shape)}; the first dimension is the batch"
        )
    for have, want in zip(shape, spec.shape, strict=True):
        if isinstance(want, str):
            size, owner = bound.setdefault(want, (have, spec.name))
            if size != have:
                raise InputError(f"model {model!r}: dimension {want!r} is {size} in {owner!r} and {have} in {spec.name!r}; they must agree")
    return np.asarray(array, wanted, order="C")


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if tensor.elem_type == onnx.TensorProto.UNDEFINED:
        raise UnsupportedModelError(
            f"the graph does not say what type {value.name!r} holds; expected a tensor of a known type: export it again"
        )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    shape: list[int | str] = []
    for axis, dimension in enumerate(tensor.shape.dim):
        if dimension.HasField("dim_value") and dimension.dim_value >= 0:
            shape.append(int(dimension.dim_value))
        else:  # -1 and "?" are how some exporters write a size that is not known: each is a name of its own
            known = any(character.isalnum() for character in dimension.dim_param)
            shape.append(dimension.dim_param if known else "batch" if axis == 0 else f"{value.name}_{axis}")
    return TensorSpec(value.name, tuple(shape), str(dtype))
