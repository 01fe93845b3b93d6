"""Errors of what the apps share.

TriscopeError
├── SettingsError     a setting is unknown or has a value that can't be used
├── BlobError         a blob is missing or is not what its name says
└── UsageError        a command was called in a way that can't work
"""

from __future__ import annotations


class TriscopeError(Exception):
    """Root of the shared errors."""


class SettingsError(TriscopeError):
    """A setting is unknown, or its value can't be used."""


class BlobError(TriscopeError):
    """A blob is missing, too large, or does not have the content that its reference names."""


class UsageError(TriscopeError):
    """A command's arguments can't work; the message says what was expected."""
