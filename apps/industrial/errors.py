"""Errors of the industrial app.

IndustrialError
├── InputError            an image, a folder or a name can't be used as it is
├── RecipeNotFoundError   no recipe has this name
└── SourceError           a camera or another source can't be opened
"""

from __future__ import annotations


class IndustrialError(Exception):
    """Root of the industrial app's errors."""


class InputError(IndustrialError):
    """An image, a folder or a name can't be used; the message says what was expected."""


class RecipeNotFoundError(IndustrialError):
    """No recipe has this name."""


class SourceError(IndustrialError):
    """A source of frames can't be opened or stays away."""
