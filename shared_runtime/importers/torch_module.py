"""torch modules through torch.export; TorchScript and pickled files are refused, with the way out."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.importers.base import Imported, needs
from shared_runtime.signature import Tensors

logger = logging.getLogger(__name__)
MOST_WAYS = 16
SCRIPT = "TorchScript holds code that can't be exported: load the original module in Python and pass it to rt.load(module, example=...)"
PICKLED = "a pickled torch file may hold code: build the module in Python, load its weights with weights_only=True and pass the module"


PROGRAM = "an exported program is not read from its file: pass what torch.export.load gives in Python to rt.load"


class TorchImporter:
    """`torch.nn.Module` objects and programs of torch.export; recognises torch files to say why they are refused."""

    name, requires = "torch", "torch and onnxscript"

    def takes(self, source: Any) -> bool:
        if isinstance(source, Path):
            return source.suffix in (".pt", ".pth", ".ts", ".pt2", ".ckpt") and source.is_file()
        module = any(base.__module__.startswith("torch.nn.modules") or base.__name__ == "ScriptModule" for base in type(source).__mro__)
        return module or is_program(source)

    def load(self, source: Any, example: Mapping[str, Any] | None) -> Imported:
        if isinstance(source, Path):
            reason = PROGRAM if source.suffix == ".pt2" else SCRIPT if _is_script(source) else PICKLED
            raise UnsupportedModelError(f"{source.name} is refused: {reason}")
        torch = needs("torch", "a torch module")
        needs("onnxscript", "a torch module")
        if isinstance(source, torch.jit.ScriptModule):
            raise UnsupportedModelError(f"a {type(source).__name__} is refused: {SCRIPT}")
        if is_program(source):
            names = source.graph_signature.user_inputs
            if not source.range_constraints:
                raise UnsupportedModelError(
                    "the program was exported for one number of rows; export it with a free first dimension: "
                    "torch.export.export(..., dynamic_shapes=({0: torch.export.Dim('batch')}, ...)), or pass the module and an example"
                )
            if not example and source.example_inputs is not None:
                values = torch.utils._pytree.tree_leaves(source.example_inputs)
                example = {
                    name: value.detach().numpy() for name, value in zip(names, values, strict=True) if isinstance(value, torch.Tensor)
                }
            elif example and set(example) == set(names):
                example = {name: example[name] for name in names}
            source = torch.export.unflatten(source)
        if not example:
            raise UnsupportedModelError("a torch module needs example={'input_name': array} with a leading batch dimension")
        return from_module(source, example, "torch")


def is_program(source: Any) -> bool:
    """Whether `source` is a `torch.export.ExportedProgram`; torch is not imported for it."""
    return type(source).__name__ == "ExportedProgram" and type(source).__module__.startswith("torch.export")


def from_module(module: Any, example: Mapping[str, Any], source: str, outputs: tuple[str, ...] = ()) -> Imported:
    """Export a module whose inputs, by name or else in order, are `example`'s; its layers are the values of its sub-modules. One that
    lies on a GPU is copied from there.

    Raises UnsupportedModelError where torch.export can't.
    """
    import torch

    from shared_runtime.graph.export import to_onnx

    given = {name: _array(value, name) for name, value in example.items()}
    places = {values.device.type for values in (*module.parameters(), *module.buffers())}
    if "meta" in places:
        raise UnsupportedModelError(f"this {type(module).__name__} has no weights yet (device 'meta'); load them and pass it again")
    if places - {"cpu"}:
        module = copy.deepcopy(module).cpu()
    module = by_name(module, given)
    was_training = module.training
    try:
        module.eval()
    except NotImplementedError as error:
        raise UnsupportedModelError(f"this module came out of torch.export ({error}); pass the exported program itself") from error
    try:
        module = _tensors_only(module, given)
        axes = _row_axes(module, given)
        tensors = {name: torch.from_numpy(value) for name, value in _two_rows(given, axes).items()}
        outputs = outputs or tuple(f"{key}_out" if key in given else key for key in _keys(_run(module, given, given)))
        proto, scopes = to_onnx(module, tensors, outputs, scopes=True, row_axes=axes)
        if (fixed := _fixed_rows(proto, axes)) is not None:
            proto, scopes = _read(module, tensors, outputs, axes, fixed)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"torch can't export this {type(module).__name__}: {_reason(error)}") from error
    finally:
        module.train(was_training)
    names = [output.name for output in proto.graph.output]

    def origin(inputs: Tensors) -> Tensors:
        return dict(zip(names, _flat(_run(module, given, inputs)), strict=True))

    def layers(inputs: Tensors) -> Mapping[str, np.ndarray[Any, Any]]:
        seen: dict[str, np.ndarray[Any, Any]] = {}
        hooks = []
        for path, tensor in scopes.items():
            try:
                part = module.get_submodule(path)
            except AttributeError:
                continue

            def keep(_: Any, __: Any, value: Any, tensor: str = tensor) -> None:
                if isinstance(value, torch.Tensor):
                    seen[tensor] = value.detach().numpy()

            hooks.append(part.register_forward_hook(keep))
        try:
            _run(module, given, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        order = {name: place for place, node in enumerate(proto.graph.node) for name in node.output}
        return dict(sorted(seen.items(), key=lambda item: order.get(item[0], len(order))))

    return Imported(proto, origin, source, given, layers)


def _fixed_rows(proto: Any, axes: Mapping[str, int | None]) -> int | None:
    """The one number of rows that a graph holds for, or None."""
    for value in proto.graph.input:
        axis, shape = axes[value.name], value.type.tensor_type.shape.dim
        if axis is not None and shape[axis].HasField("dim_value"):
            return int(shape[axis].dim_value)
    return None


def _read(module: Any, tensors: Mapping[str, Any], outputs: tuple[str, ...], axes: Mapping[str, int | None], fixed: int) -> Any:
    """The graph by reading the module's code: there the length of a tensor is no number yet. Raises UnsupportedModelError."""
    from shared_runtime.graph.export import to_onnx

    reason: Exception | None = None
    try:
        made = to_onnx(module, tensors, outputs, scopes=True, row_axes=axes, strict=True)
        if _fixed_rows(made[0], axes) is None:
            return made
    except Exception as error:
        reason = error
    raise UnsupportedModelError(
        f"this {type(module).__name__} can be exported for {fixed} rows only: it makes a Python number "
        "of the size of its batch, as int(x.shape[0]) does; use x.shape[0] as it is"
    ) from reason


def _array(value: Any, name: str) -> np.ndarray[Any, Any]:
    """An example's value as numpy, from wherever it lies. Raises UnsupportedModelError."""
    try:
        return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:  # bfloat16, meta tensors, ragged lists
        raise UnsupportedModelError(f"example {name!r} is no array ({error}); expected one of numbers, such as float32") from error


def by_name(module: Any, given: Mapping[str, Any]) -> Any:
    """The module, taking its inputs in the order of `given`, where these are names of parameters in another order."""
    import inspect

    import torch

    known = list(inspect.signature(module.forward).parameters)
    if list(given) == known[: len(given)] or not set(given) <= set(known):
        return module

    class Named(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.train(module.training)

        def forward(self, *values: Any) -> Any:
            return self.module(**dict(zip(given, values, strict=True)))

    return Named()


def _tensors_only(module: Any, given: Tensors) -> Any:
    """The module without what it returns beside tensors (caches of keys and values, numbers). Raises TypeError where no tensor is left."""
    import torch

    left_out: list[str] = []
    result = _run(module, given, given)
    kept = _tensors_of(result, left_out)
    if _nothing(kept):
        raise TypeError(f"it returns {', '.join(left_out) or 'nothing'}; expected tensors")
    if left_out:
        logger.warning("left out of what %s returns, as a graph gives tensors only: %s", type(module).__name__, ", ".join(left_out))
    if kept is result:
        return module

    class TensorsOnly(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *values: Any) -> Any:
            return _tensors_of(self.module(*values), [])

    return TensorsOnly()


def _tensors_of(result: Any, left_out: list[str]) -> Any:
    """A result as it is where mappings and sequences hold nothing but tensors; otherwise without the rest, whose kinds go to
    `left_out`, and with mappings for data classes and named tuples."""
    import torch

    if result is None or isinstance(result, torch.Tensor):
        return result
    parts: Mapping[Any, Any]
    plain = type(result) in (tuple, list)
    if dataclasses.is_dataclass(result) and not isinstance(result, (type, Mapping)):
        parts = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    elif isinstance(result, tuple) and hasattr(result, "_asdict"):
        parts = result._asdict()
    elif isinstance(result, (Mapping, tuple, list)):
        parts = result if isinstance(result, Mapping) else dict(enumerate(result))
    else:
        left_out.append(type(result).__name__)
        return None
    made = {key: _tensors_of(value, left_out) for key, value in parts.items()}
    if (plain or parts is result) and all(made[key] is value for key, value in parts.items()):
        return result
    kept = {key: value for key, value in made.items() if not _nothing(value)}
    return list(kept.values()) if plain else kept


def _nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (Mapping, tuple, list)) and not value)


def _keys(result: Any, of: str = "") -> tuple[str, ...]:
    """What a module that returns a mapping calls its outputs; a part of a part is called "part.of" or "part.0"."""
    if isinstance(result, Mapping):
        parts = [(str(key), value) for key, value in result.items()]
    elif of and isinstance(result, (tuple, list)):
        parts = [(str(place), value) for place, value in enumerate(result)]
    else:
        return (of,) if of else ()
    return tuple(name for key, value in parts if value is not None for name in _keys(value, f"{of}.{key}" if of else key))


def _row_axes(module: Any, given: Tensors) -> dict[str, int | None]:
    """The axis of each input that counts rows: its first where that is as long as the first input's, else, as with the states of a
    recurrent network (layers, rows, width), another one that is; None for an input without. Where several are, the module is asked."""
    rows = next((value.shape[0] for value in given.values() if value.ndim), 1)
    fitting: list[Sequence[int | None]] = [np.flatnonzero(np.array(value.shape) == rows).tolist() or [None] for value in given.values()]
    ways = [dict(zip(given, way, strict=True)) for way in itertools.islice(itertools.product(*fitting), MOST_WAYS)]
    for way in ways if len(ways) > 1 else ():
        try:
            _run(module, given, _two_rows(given, way))
        except Exception as error:
            logger.debug("rows are not on the axes %s: %s", way, error)
        else:
            return way
    return ways[0]


def _two_rows(given: Tensors, axes: Mapping[str, int | None]) -> Tensors:
    made = {}
    for name, value in given.items():
        axis = axes[name]
        made[name] = value.copy() if axis is None else np.repeat(value.take([0], axis=axis), 2, axis=axis)
    return made


def _run(module: Any, given: Mapping[str, Any], inputs: Tensors) -> Any:
    import torch

    was_training = module.training
    try:
        with torch.inference_mode():
            return module.eval()(*(torch.from_numpy(np.asarray(inputs[name], order="C")) for name in given))
    finally:
        module.train(was_training)


def _flat(value: Any) -> list[np.ndarray[Any, Any]]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [array for item in value for array in _flat(item)]
    return [] if value is None else [value.detach().cpu().numpy()]


def _is_script(path: Path) -> bool:
    if path.suffix == ".ts":
        return True
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # the exporter's own words are about itself
        error = error.__cause__
    return " ".join(str(error).split())[:400] or type(error).__name__
