"""Errors of the medical app.

MedicalError
├── InputError            the input can't be used; the message says why and what to do
│   ├── SeriesError       a DICOM series is not one regular volume
│   └── NotHeadError      the image does not look like a T1 head
└── StudyNotFoundError    no such study in the store
"""

from __future__ import annotations


class MedicalError(Exception):
    """Root of the medical app's errors."""


class InputError(MedicalError):
    """The input can't be used; the message says what was seen, what was expected and what to do."""


class SeriesError(InputError):
    """A DICOM series does not form one regular volume."""


class NotHeadError(InputError):
    """The image is not a T1 head, or too little of one, for the model to be trusted with."""


class StudyNotFoundError(MedicalError):
    """No study with that identifier is in the store."""
