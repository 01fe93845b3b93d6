"""Errors of the runtime.

SharedRuntimeError
├── ModelError
│   ├── ModelNotFoundError        no such file or repository name
│   ├── ModelIntegrityError       the file's hash is not the one its card states
│   └── UnsupportedModelError     a form that the runtime can't load, or a graph that a backend can't run
├── InputError                    a tensor does not fit the signature
├── BackendUnavailableError       a device or backend that was asked for is missing; names what is missing
└── BatcherError
    ├── QueueFullError            the bounded queue has no room for the request
    └── BatcherClosedError        the batcher does not take requests (any more)
"""

from __future__ import annotations


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
