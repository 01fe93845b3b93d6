"""`@rt.fuse`: a Python function of torch tensors as one fusible region, compiled as a whole or refused with the reason."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError

TOLERANCE = 1e-3


class FusedFunction:
    """What `@rt.fuse` makes. The region is compiled at its first call on a device and compared once with the function as it
    was written; inside a torch.export it is the plain function, so that the exported graph stays standard."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self._compiled: Any = None
        self._checked: set[tuple[Any, ...]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.compiler.is_compiling():
            return self.function(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if not tensors:
            raise UnsupportedModelError(f"{self.function.__qualname__} is a fused region of torch tensors and was called without one")
        device = tensors[0].device.type
        self._ready(device)
        try:
            result = self._compiled(*args, **kwargs)
        except torch._dynamo.exc.Unsupported as error:
            reason = str(error).strip().splitlines()[0]
            raise UnsupportedModelError(
                f"{self.function.__qualname__} can't be one region: {reason}; take that out of the function"
            ) from error
        key = (device, *((tuple(t.shape), t.dtype) for t in tensors))
        if key not in self._checked:
            self._compare(result, self.function(*args, **kwargs))
            self._checked.add(key)
        return result

    def _ready(self, device: str) -> None:
        import torch

        if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            raise BackendUnavailableError("a fused region on the CPU needs a C++ compiler (g++ or clang++); install one or use a GPU")
        if self._compiled is None:
            self._compiled = torch.compile(self.function, fullgraph=True)

    def _compare(self, fused: Any, plain: Any) -> None:
        import torch

        pairs = zip(fused, plain, strict=True) if isinstance(fused, (tuple, list)) else [(fused, plain)]
        for a, b in pairs:
            scale = max(float(torch.linalg.vector_norm(b.float())), 1e-12)
            error = float(torch.linalg.vector_norm(a.float() - b.float())) / scale
            if not error <= TOLERANCE:
                raise UnsupportedModelError(
                    f"the fused {self.function.__qualname__} differs from the plain one by {error:.1e}; it is not used"
                )


def fuse(function: Callable[..., Any]) -> FusedFunction:
    """Mark a function of torch tensors as one fusible region. Raises UnsupportedModelError at its call where it can't be one."""
    return FusedFunction(function)
