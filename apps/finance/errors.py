"""Errors of the finance app.

FinanceError
├── InputError                 a table, a row or an argument can't be used; the message says why and what to do
├── ModelMismatchError         a model was trained on another version of the features
└── UnknownTransactionError    no such transaction in the store
"""

from __future__ import annotations


class FinanceError(Exception):
    """Root of the finance app's errors."""


class InputError(FinanceError):
    """The input can't be used; the message says what was seen, what was expected and what to do."""


class ModelMismatchError(FinanceError):
    """A model and the features of this installation do not belong together."""


class UnknownTransactionError(FinanceError):
    """No transaction with that identifier is in the store."""
