"""The plug-in point of an importer, the comparison with the origin, and the writing of a model folder."""

from __future__ import annotations

import bisect
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from shared_runtime.certificate import hash_file
from shared_runtime.errors import ImportMismatchError, ModelError, UnsupportedModelError
from shared_runtime.folders import replace_folder
from shared_runtime.graph.check import check_graph
from shared_runtime.graph.passes.base import plain_session
from shared_runtime.graph.rounding import movement
from shared_runtime.numeric import difference, disagreeing, relative_difference
from shared_runtime.signature import Signature, Tensors, TensorSpec

TOLERANCE = 1e-4
"""Largest relative difference of an output from its origin: norm of the difference over the norm."""
NOT_VALID = "; where these are no valid inputs, give some as example={'input_name': array} (--example FILE.npz on the command line)"
MOST_NUMBERS = 2_000_000
"""How many numbers random inputs have at most, where larger sizes are tried."""
EXTRAS = {"torch": "train", "monai": "train", "tensorflow": "tensorflow", "tf2onnx": "tensorflow"}
"""The extra that has an optional package, where it is not `optimize`."""
logger = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass
class Imported:
    """An ONNX graph with what it came from. `origin` computes the same outputs by the original framework; `layers`
    gives, for inputs, the origin's value of graph tensors in order, so that the first layer that differs can be named; `part`
    names it where the origin's parts are no tensors of the graph, or says nothing."""

    proto: onnx.ModelProto
    origin: Callable[[Tensors], Tensors]
    source: str
    given: Tensors | None = None
    layers: Callable[[Tensors], Mapping[str, np.ndarray[Any, Any]]] | None = None
    part: Callable[[Tensors], str] | None = None
    card: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    outputs: tuple[TensorSpec, ...] = ()
    tolerance: float = TOLERANCE


class Importer(Protocol):
    """One origin. `takes` looks at a path or an object without loading it; `load` may need the extra packages in `requires`."""

    name: str
    requires: str

    def takes(self, source: Any) -> bool:
        """Whether this importer is the one for `source`."""
        ...

    def load(self, source: Any, example: Mapping[str, Any] | None) -> Imported:
        """Raises UnsupportedModelError with the reason and the way out."""
        ...


def compare(imported: Imported, signature: Signature, path: Path, name: str) -> tuple[float, dict[str, int]]:
    """The largest relative difference from the origin, on random inputs of one and two rows and on the given ones; and the sizes
    that named dimensions had: as given, or the first that the origin takes.

    Raises ImportMismatchError, naming the first layer that differs where the origin can tell its layers, and
    UnsupportedModelError where one of the two fails.
    """
    session = plain_session(path, optimised=True)
    names = [output.name for output in session.get_outputs()]

    dims = signature.dims_of(imported.given or {})
    if not imported.given and signature.sizes():
        dims = _sizes_that_fit(imported, signature, name)
    probes = [signature.random(1, 1, dims), signature.random(2, 2, dims), *([imported.given] if imported.given else [])]
    worst, agreed = 0.0, False
    for inputs in probes:
        example = inputs is imported.given
        try:
            expected = {output: np.asarray(value) for output, value in imported.origin(inputs).items()}
        except Exception as error:
            if imported.given is not None and not example:
                continue  # not all numbers are valid inputs: the given ones are
            raise _fails(imported, name, inputs, error, "" if example else NOT_VALID) from error
        try:
            got = dict(zip(names, map(np.asarray, session.run(names, inputs)), strict=True))
        except Exception as error:
            raise _fails(imported, name, inputs, error, "; its origin does not") from error
        far = difference(got, expected)
        if (output := disagreeing(got, expected, imported.tolerance, partial(movement, imported.proto, inputs))) is not None:
            if example and agreed and _featureless(inputs):
                logger.warning(
                    "%r differs by %.1e (relative) on its example, all of whose numbers are equal: normalised, they leave rounding alone; "
                    "on random inputs it agrees",
                    name,
                    far,
                )
                continue
            again = imported.origin(inputs)
            if relative_difference(np.asarray(again[output]), expected[output]) > imported.tolerance:
                raise ImportMismatchError(
                    f"{name!r} can't be compared with its {imported.source} origin, whose output {output!r} is another one each time "
                    "for the same inputs: random numbers are drawn within; take them in as an input; nothing was imported"
                )
            where = _first_layer(imported, inputs, name) or f"output {output!r}"
            distance = relative_difference(got[output], expected[output])
            raise ImportMismatchError(
                f"{name!r} does not compute what its {imported.source} origin computes: {where} differs by {distance:.1e} "
                f"(relative), expected at most {imported.tolerance:.0e}; nothing was imported"
            )
        worst, agreed = max(worst, far), True
    if worst > imported.tolerance:
        logger.warning(
            "%r differs by %.1e (relative) on inputs where rounding alone moves its outputs as far; an example of what it "
            "will be given compares better",
            name,
            worst,
        )
    return worst, dims


def _featureless(inputs: Tensors) -> bool:
    """Whether the numbers of each input in floating point are all equal, as in an example of zeros that was made for its shape alone."""
    values = [value for value in inputs.values() if value.dtype.kind == "f" and value.size > 0]
    return bool(values) and all((value == value.flat[0]).all() for value in values)


def _sizes_that_fit(imported: Imported, signature: Signature, name: str) -> dict[str, int]:
    """Sizes of the named dimensions with which the origin runs: the usual ones, or larger, as a window of sound must not be shorter
    than a filter. Raises UnsupportedModelError with what the origin said of the usual ones."""
    first: Exception | None = None
    for scale in (1, 4, 16, 64, 512):
        dims = signature.sizes(scale) if scale > 1 else {}
        inputs = signature.random(1, 1, dims)
        if sum(value.size for value in inputs.values()) > MOST_NUMBERS:
            break
        try:
            imported.origin(inputs)
        except Exception as error:
            first = first or error
        else:
            return dims
    assert first is not None
    raise _fails(imported, name, signature.random(1, 1), first, NOT_VALID) from first


def _fails(imported: Imported, name: str, inputs: Tensors, error: Exception, more: str) -> UnsupportedModelError:
    shapes = {key: list(value.shape) for key, value in inputs.items()}
    kind = "the example" if inputs is imported.given else "random inputs"
    reason = " ".join(str(error).split())[:300]
    return UnsupportedModelError(f"{name!r} ({imported.source}) fails on {kind} of shape {shapes}: {reason}{more}")


def _first_layer(imported: Imported, inputs: Tensors, model: str) -> str:
    """The layer from which on values differ, as words that go before "differs"; nothing where it can't be told."""
    try:
        name = (imported.part(inputs) if imported.part else "") or _first_tensor(imported, inputs)
    except Exception as error:  # that outputs differ is told in any case
        logger.warning("the first layer of %r that differs can't be told: %s", model, error)
        return ""
    return f"the first layer to differ is {name}; it" if name else ""


def _first_tensor(imported: Imported, inputs: Tensors) -> str:
    if imported.layers is None:
        return ""
    expected = imported.layers(inputs)
    makers = {output: node for node in imported.proto.graph.node for output in node.output}
    wanted = [layer for layer in expected if layer in makers]

    def first(some: Sequence[str]) -> str | None:
        got = tensors(imported.proto, some, inputs, optimised=True)
        return next((layer for layer in some if not relative_difference(got[layer], np.asarray(expected[layer])) <= TOLERANCE), None)

    layer = first(wanted)
    if layer is None:  # what an engine fuses wrongly comes right as soon as the tensors within are asked for: one at a time
        place = bisect.bisect_left(wanted, True, key=lambda one: first([one]) is not None)
        layer = wanted[place] if place < len(wanted) else None
    return "" if layer is None else f"{makers[layer].op_type} {makers[layer].name or layer!r}"


def tensors(proto: onnx.ModelProto, names: Sequence[str], inputs: Tensors, *, optimised: bool = False) -> Tensors:
    """The values of tensors within a graph."""
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    present = {output.name for output in probe.graph.output}
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in present)
    values = plain_session(probe, optimised=optimised).run(list(names), inputs) if names else []
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


def write_folder(imported: Imported, folder: Path, name: str) -> Path:
    """Compare with the origin and write the model folder whole or not at all. Raises ImportMismatchError, UnsupportedModelError."""
    if not NAME.fullmatch(name):
        raise ModelError(f"{name!r} can't be a model's name; expected letters, digits, '.', '_', '-', starting with a letter or digit")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        graph = part / "model.onnx"
        graph.write_bytes(imported.proto.SerializeToString())
        check_graph(graph)
        signature = Signature.from_onnx(graph)
        if imported.outputs:
            signature = Signature(signature.inputs, imported.outputs)
        error, dims = compare(imported, signature, graph, name)
        signature.write(part / "signature.json")
        for file, content in imported.files.items():
            (part / file).write_bytes(content)
        facts: dict[str, dict[str, Any]] = {
            "artefact": {"sha256": hash_file(graph)},
            "import": {"from": imported.source, "difference": float(f"{error:.3g}")},
        }
        if dims:
            facts["dims"] = dict(dims)
        (part / "card.toml").write_text(card_text(name, {**facts, **imported.card}))
        part.chmod(0o755)
        replace_folder(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def card_text(name: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """A card: the name, a version, and a table a section; what TOML has no form for is kept as JSON text."""
    lines = [f"name = {json.dumps(name)}", 'version = "1"']
    for title, values in sections.items():
        lines += ["", f"[{title}]", *(f"{json.dumps(str(key))} = {_toml(value)}" for key, value in values.items() if value is not None)]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, (bool, int, float)) or (isinstance(value, list) and all(isinstance(v, (bool, int, float, str)) for v in value)):
        return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")
    return json.dumps(value if isinstance(value, str) else json.dumps(value))


def input_name(example: Mapping[str, Any] | None) -> str:
    """What the one input of an estimator of rows is called: as in the example, or `features`."""
    return next(iter(example), "features") if example else "features"


def needs(package: str, what: str) -> Any:
    """Import an optional package. Raises UnsupportedModelError naming the extra to install."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UnsupportedModelError(
            f"{what} needs the package {package}: pip install 'triscope[{EXTRAS.get(package, 'optimize')}]' ({error})"
        ) from error
