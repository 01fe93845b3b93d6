"""Calibration and validation data: any iterable, read once, checked, hashed, and kept on disk instead of in memory."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.certificate import DataDigest
from shared_runtime.errors import CalibrationError, InputError
from shared_runtime.signature import Signature, Tensors

MOST_SAMPLES = 300


class SampleStore:
    """Checked samples (input dicts) in a temporary folder that lives as long as this object; iterable any number of times."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="triscope-samples-")
        self._digest = hashlib.sha256()
        self.items, self.rows = 0, 0
        self.row_hashes: set[bytes] = set()

    def add(self, inputs: Any, signature: Signature, model: str) -> None:
        """Keep one sample: inputs by name, or what `_named` takes. Raises CalibrationError where it does not fit the signature or holds
        what is not a number."""
        place = f"{self.name} sample {self.items} of {model!r}"
        named = inputs if isinstance(inputs, Mapping) else _named(inputs, signature)
        if named is None:
            raise CalibrationError(
                f"{place} is a {type(inputs).__name__}; expected a dict of arrays by input name, with a leading batch dimension, "
                f"or the arrays in the order of the inputs; these are {', '.join(spec.describe() for spec in signature.inputs)}"
            )
        named = {name: _plain(value) if hasattr(value, "detach") else value for name, value in named.items()}
        try:
            checked = signature.check(named, model)
        except InputError as error:
            raise CalibrationError(f"{place} does not fit: {error}") from error
        for name, value in checked.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                bad = int(np.size(value) - np.isfinite(value).sum())
                raise CalibrationError(f"{place}: input {name!r} holds {bad} values that are not finite; clean the data first")
        rows = signature.rows(checked)
        if not rows:
            raise CalibrationError(f"{place} has no rows")
        checked = {name: value.astype(str) if value.dtype.kind == "O" else value for name, value in checked.items()}
        for row in range(rows):
            digest = hashlib.sha256()
            one = signature.row(checked, row)
            if signature.fixed_rows is not None:
                one = {name: value[row : row + 1] if value.ndim and len(value) == rows else value for name, value in checked.items()}
            for name, value in sorted(one.items()):
                digest.update(name.encode() + str(value.shape).encode())
                digest.update("\0".join(value.ravel()).encode() if value.dtype.kind == "U" else np.ascontiguousarray(value).tobytes())
            self.row_hashes.add(digest.digest())
            self._digest.update(digest.digest())
        np.savez(self._path(self.items), **checked)  # type: ignore[arg-type]
        self.items += 1
        self.rows += rows

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> Tensors:
        with np.load(self._path(index)) as stored:
            return {name: stored[name].astype(object) if stored[name].dtype.kind == "U" else stored[name] for name in stored.files}

    def __iter__(self) -> Iterator[Tensors]:
        return (self[index] for index in range(self.items))

    @property
    def digest(self) -> DataDigest:
        """How much there is, and the hash over it."""
        return DataDigest(self.items, self.rows, self._digest.hexdigest())

    def _path(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index:06d}.npz"


def _named(value: Any, signature: Signature) -> dict[str, Any] | None:
    """Inputs by name from what data loaders and tables give: the array of a model's one input, with or without its leading dimension;
    arrays in the order of the inputs; either of them, or inputs by name, with a target behind; a table, whose columns are the inputs or
    the columns of the one input. None for anything else."""
    specs = signature.inputs
    if _is_table(value):
        names = [spec.name for spec in specs]
        if set(names) <= set(map(str, value.columns)):
            return {name: value[name].to_numpy().reshape(-1, 1) for name in names}
        value = value.to_numpy()
    if isinstance(value, (tuple, list)):
        if len(value) == 2 and isinstance(value[0], Mapping):
            return dict(value[0])
        if len(value) == 2 and isinstance(value[0], (tuple, list)) and len(specs) > 1:
            value = value[0]
    several = isinstance(value, (tuple, list)) and len(value) in (len(specs), len(specs) + 1)
    parts = list(value[: len(specs)]) if several and all(hasattr(part, "ndim") for part in value[: len(specs)]) else [value]
    if len(parts) != len(specs):
        return None
    named = {}
    for spec, part in zip(specs, parts, strict=True):
        array = _plain(part)
        if array is None:
            return None
        array = array[None] if array.ndim == len(spec.shape) - 1 else array
        if array.ndim != len(spec.shape):
            return None
        named[spec.name] = array
    return named


def _is_table(value: Any) -> bool:
    """Whether it is a data frame; neither pandas nor polars is imported for it."""
    return hasattr(value, "columns") and hasattr(value, "to_numpy")


def _plain(value: Any) -> np.ndarray[Any, Any] | None:
    """An array, or a torch tensor from wherever it lies; None for anything else."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def each_of(data: Any, what: str) -> Iterator[Any]:
    """The items of an iterable, or of what has a length and places (torch's data sets). Raises CalibrationError for anything else."""
    try:
        items = iter(data)
    except TypeError as error:
        raise CalibrationError(f"the {what} set is a {type(data).__name__}; expected an iterable of samples") from error
    return items if hasattr(data, "__iter__") or not hasattr(data, "__len__") else itertools.islice(items, len(data))


def read_calibration(data: Iterable[Any], signature: Signature, model: str, most: int = MOST_SAMPLES) -> SampleStore:
    """The first `most` samples of any iterable, or rows of a table; a dict is one sample of many rows.

    Raises CalibrationError where there are none or one can't be used.
    """
    store = SampleStore("calibration")
    if _is_table(data) and (named := _named(data, signature)) is not None:
        data = (signature.row(named, row) for row in range(signature.rows(named)))
    for inputs in [data] if isinstance(data, Mapping) else each_of(data, "calibration"):
        if len(store) >= most:
            break
        store.add(inputs, signature, model)
    if not len(store):
        raise CalibrationError(f"no calibration samples for {model!r}; give an iterable of input dicts (a generator works once)")
    return store


def read_validation(data: Iterable[Any], signature: Signature, model: str, labelled: bool = True) -> tuple[SampleStore, list[Any]]:
    """Every (inputs, target) pair: the inputs on disk, the targets as they are. Arrays `(X, y)` of equal length are a pair a row.

    Not `labelled`: what is no pair is inputs alone, with the target None. Raises CalibrationError as above.
    """
    store, targets = SampleStore("validation"), []
    rows = _rows_of(data, signature, labelled)
    for place, item in enumerate(rows or ([data] if isinstance(data, Mapping) else each_of(data, "validation"))):
        item = _paired(item, len(signature.inputs))
        pair = isinstance(item, tuple)
        if labelled and not pair:
            raise CalibrationError(
                f"validation item {place} of {model!r} is a {type(item).__name__}; expected a pair (inputs, target); "
                "without targets leave the metric out: agreement with the float model needs none"
            )
        inputs, target = item if pair else (item, None)
        store.add(inputs, signature, model)
        targets.append(target.cpu() if target is not None and getattr(target, "is_cuda", False) else target)
    if not targets:
        raise CalibrationError(f"no validation pairs for {model!r}; give (inputs, target) pairs, or validation=None for agreement")
    return store, targets


def _paired(item: Any, inputs: int) -> Any:
    """The tuple (inputs, target) where `item` is one, or the arrays of several inputs and then a target; a tuple of anything else is
    made a list."""
    if not isinstance(item, (tuple, list)):
        return item
    if len(item) == inputs + 1 > 2:
        return (list(item[:-1]), item[-1])
    alone = len(item) == inputs and all(hasattr(part, "ndim") for part in item)
    return tuple(item) if len(item) == 2 and not alone else list(item)


def _rows_of(data: Any, signature: Signature, labelled: bool) -> Iterator[tuple[Any, Any]] | None:
    """A pair a row, where `data` is the two arrays (X, y), or inputs by name and y."""
    if not isinstance(data, (tuple, list)) or len(data) != 2 or isinstance(data[0], (tuple, list)):
        return None
    inputs = data[0] if isinstance(data[0], Mapping) else _named(data[0], signature)
    targets = _plain(data[1])
    try:
        rows = {len(np.asarray(value)) for value in (inputs or {}).values()}
    except (TypeError, ValueError):
        return None
    if targets is None:
        return None
    if targets.ndim and len(rows) == 1 and rows != {len(targets)} and len(targets) > 1 and labelled:
        raise CalibrationError(f"validation holds inputs of {rows.pop()} rows and {len(targets)} targets; expected as many")
    if not targets.ndim or rows != {len(targets)} or (not labelled and _named(data[1], signature)):
        return None
    named = {name: np.asarray(value) for name, value in (inputs or {}).items()}
    return (({name: value[row : row + 1] for name, value in named.items()}, targets[row : row + 1]) for row in range(len(targets)))


def hold_out(store: SampleStore, signature: Signature, model: str) -> tuple[SampleStore, SampleStore]:
    """Every fourth sample apart, as a validation set without labels. Raises CalibrationError where there is only one row."""
    items: list[Tensors] = list(store) if len(store) == 1 and signature.fixed_rows is None else []
    if items and store.rows > 1:
        items = [signature.row(items[0], row) for row in range(store.rows)]
    if len(store) == 1 and len(items) <= 1:
        raise CalibrationError(f"one calibration sample for {model!r} leaves none to validate on; give two or more, or validation=")
    kept, apart = SampleStore("calibration"), SampleStore("validation")
    for place, inputs in enumerate(items or store):
        target = apart if place % 4 == 1 else kept
        target.add(inputs, signature, model)
    if seen := kept.row_hashes & apart.row_hashes:
        raise CalibrationError(f"{len(seen)} of the calibration rows of {model!r} repeat, so none can be held out; give distinct samples")
    return kept, apart


def refuse_overlap(calibration: SampleStore, validation: SampleStore, model: str) -> None:
    """Raise CalibrationError where a row is in both sets: a metric on calibration data proves nothing."""
    if shared := calibration.row_hashes & validation.row_hashes:
        raise CalibrationError(
            f"validation and calibration of {model!r} share {len(shared)} rows of {len(validation.row_hashes)}; "
            "expected disjoint sets: take the shared rows out of one of them"
        )
