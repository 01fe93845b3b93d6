"""Errors of the runtime.

SharedRuntimeError
├── ModelError
│   ├── ModelNotFoundError        no such file or repository name
│   ├── ModelIntegrityError       the file's hash is not the one its card states
│   ├── UnsupportedModelError     a form that the runtime can't load, or a graph that a backend can't run
│   └── ImportMismatchError       an imported model does not compute what its origin computes
├── OptimizationError
│   ├── CalibrationError          calibration or validation data that can't be used: not a number, overlap, no samples
│   ├── MetricError               the metric does not give a finite number
│   └── VariantRefusedError       a variant that was asked for by name did not pass its guard
├── MemoryBudgetError             the planned peak is above the budget
├── InputError                    a tensor does not fit the signature
├── BackendUnavailableError       a device or backend that was asked for is missing; names what is missing
└── BatcherError
    ├── QueueFullError            the bounded queue has no room for the request
    └── BatcherClosedError        the batcher does not take requests (any more)
"""

from __future__ import annotations

import msgspec

NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises of bytes that are no JSON of the wanted shape."""


class SharedRuntimeError(Exception):
    """Root of the runtime's errors."""


class ModelError(SharedRuntimeError):
    """A model can't be used."""


class ModelNotFoundError(ModelError):
    """No file, folder or repository entry of that name."""


class ModelIntegrityError(ModelError):
    """A model file does not have the hash that its card states."""


class UnsupportedModelError(ModelError):
    """The model's form, or an operator in it, is not supported."""


class ImportMismatchError(ModelError):
    """An imported model does not compute what its origin computes; the message names the first layer that differs."""


class OptimizationError(SharedRuntimeError):
    """A model could not be optimised."""


class CalibrationError(OptimizationError):
    """Calibration or validation data can't be used."""


class MetricError(OptimizationError):
    """The metric does not give a finite number."""


class VariantRefusedError(OptimizationError):
    """A variant that was asked for did not pass its guard."""


class MemoryBudgetError(SharedRuntimeError):
    """The planned peak memory of a model is above the budget."""


class InputError(SharedRuntimeError):
    """An input tensor does not fit the model's signature."""


class BackendUnavailableError(SharedRuntimeError):
    """A backend or device that was asked for is not there; the message names what it lacks."""


class BatcherError(SharedRuntimeError):
    """A request could not be batched."""


class QueueFullError(BatcherError):
    """The queue holds its maximum of rows."""


class BatcherClosedError(BatcherError):
    """The batcher is not running."""
