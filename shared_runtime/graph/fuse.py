"""`@rt.fuse`: a Python function of torch tensors as one fusible region, compiled as a whole or refused with the reason."""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar, cast

from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError

P = ParamSpec("P")
R = TypeVar("R")
TOLERANCE = 1e-3
ROUNDINGS = 4
"""Of the result's own type: a compiled region keeps the results between its operators in single precision."""


def fuse(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function or method of torch tensors as one fusible region.

    It is compiled at its first call on a device and compared once, for each shape and type of its tensors, with the function as it was
    written; inside a torch.export it is the plain function, so that the exported graph stays standard. Raises UnsupportedModelError at
    its call where it can't be one region.
    """
    region = _Region(function)

    @functools.wraps(function)
    def fused(*args: P.args, **kwargs: P.kwargs) -> R:
        return cast(R, region.run(args, kwargs))

    return fused


class _Region:
    """The compiled form of a function, and for which tensors it was compared."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._name = function, getattr(function, "__qualname__", repr(function))
        self._compiled: Any = None
        self._checked: set[tuple[Any, ...]] = set()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of one call."""
        import torch

        if torch.compiler.is_compiling():
            return self._function(*args, **kwargs)
        tensors = [value for value in _leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if not tensors:
            raise UnsupportedModelError(f"{self._name} is a fused region of torch tensors and was called without one")
        self._ready(tensors[0].device.type)
        key = tuple((t.device.type, tuple(t.shape), t.dtype) for t in tensors)
        if key in self._checked:
            return self._fused(args, kwargs)
        own, named = _copied((args, kwargs))
        plain = self._function(*own, **named)
        result = self._fused(args, kwargs)
        self._compare(result, plain)
        self._checked.add(key)
        return result

    def _ready(self, device: str) -> None:
        import torch

        if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            raise BackendUnavailableError("a fused region on the CPU needs a C++ compiler (g++ or clang++); install one or use a GPU")
        if self._compiled is None:
            self._compiled = torch.compile(self._function, fullgraph=True)

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        import torch

        try:
            return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise UnsupportedModelError(f"{self._name} can't be one region: {reason}; take that out of the function") from error

    def _compare(self, fused: Any, plain: Any) -> None:
        import torch

        pairs = list(zip(_leaves(fused), _leaves(plain), strict=True))
        error = max((_difference(a, b) for a, b in pairs if isinstance(b, torch.Tensor)), default=0.0)
        if error > 1:
            raise UnsupportedModelError(
                f"the fused {self._name} differs from the plain one by {error:.1e} times what rounding explains; it is not used (where it "
                "draws random numbers, take them out of the function)"
            )


def _leaves(value: Any) -> Iterator[Any]:
    """What tuples, lists and dicts hold, however deep."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _copied(value: Any) -> Any:
    """`value` with tensors and modules of its own, however deep: a function may change what it is given."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, torch.nn.Module):
        with contextlib.suppress(Exception):  # some hold what can't be copied, such as tensors within a gradient
            return copy.deepcopy(value)
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_copied(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _difference(a: Any, b: Any) -> float:
    """How far `a` is from `b`, in what is allowed: relative to the norm of what is finite; the rest must be the same."""
    import torch

    allowed = max(TOLERANCE, ROUNDINGS * torch.finfo(b.dtype).eps) if b.dtype.is_floating_point else TOLERANCE
    kind = torch.complex128 if b.dtype.is_complex else torch.float64
    a, b = a.detach().to("cpu", kind), b.detach().to("cpu", kind)
    finite = torch.isfinite(b)
    if a.shape != b.shape or not torch.allclose(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    scale = max(float(torch.linalg.vector_norm(b[finite])), 1e-12)
    error = float(torch.linalg.vector_norm(a[finite] - b[finite])) / scale
    return error / allowed if error == error else float("inf")
