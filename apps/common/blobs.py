"""Blobs by content hash: a folder, or an S3 bucket, through fsspec."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

import fsspec

from apps.common.errors import BlobError
from pipelines import UnavailableError

MAX_BYTES = 8 * 2**30
RENEWED = timedelta(hours=1)
"""What is stored again after so long is written again, so that `remove` sees that it is in use."""
WHOLE = {"s3", "memory"}
"""Stores in which what is written appears at once; in others it gets its name when it is complete."""


class BlobsUnavailableError(UnavailableError, BlobError):
    """The store of blobs does not answer, or takes nothing."""


class BlobStore:
    """Blobs below `url` (`file:///DIR`, `s3://BUCKET/PREFIX`, `memory://`). A reference is `sha256:HEX`."""

    def __init__(self, url: str) -> None:
        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise BlobError(f"blob address {url!r} can't be used: {error}; expected file:///DIR or s3://BUCKET/PREFIX") from error
        protocol = self._system.protocol
        self._protocols = {protocol} if isinstance(protocol, str) else set(protocol)

    def put(self, content: bytes) -> str:
        """Store `content` and return its reference; a half-written blob is never visible. Raises BlobsUnavailableError."""
        reference = f"sha256:{hashlib.sha256(content).hexdigest()}"
        path = self._path(reference)
        with self._answering():
            with suppress(FileNotFoundError):
                if datetime.now(UTC) - self._system.modified(path) < RENEWED:
                    return reference
            if not WHOLE.isdisjoint(self._protocols):
                self._system.pipe_file(path, content)
                return reference
            part = f"{path}.{uuid.uuid4().hex}.part"
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self._system.open(part, "wb") as stream:
                stream.write(content)
            self._system.mv(part, path)
        return reference

    def get(self, reference: str) -> bytes:
        """The content of `reference`. Raises BlobError where it is missing or was changed, BlobsUnavailableError."""
        path = self._path(reference)
        try:
            with self._answering(BlobError, FileNotFoundError):
                size = int(self._system.size(path) or 0)
                if size > MAX_BYTES:
                    raise BlobError(f"blob {reference} has {size} bytes, more than the {MAX_BYTES} that are read")
                content: bytes = self._system.cat_file(path)
        except FileNotFoundError as error:
            raise BlobError(f"no blob {reference} in this store; check blob_url, or send the study again") from error
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != reference:
            raise BlobError(f"blob {reference} was changed on disk; restore it or send the study again")
        return content

    def remove(self, reference: str, before: datetime) -> bool:
        """Delete what was last stored `before` a time (with its zone) that is RENEWED ago or longer; False where it was stored since.

        Raises BlobsUnavailableError.
        """
        path = self._path(reference)
        with self._answering(), suppress(FileNotFoundError):
            if self._system.modified(path) >= before:
                return False
            self._system.rm_file(path)
        return True

    @contextmanager
    def _answering(self, *known: type[Exception]) -> Iterator[None]:
        """Raises BlobsUnavailableError for what a store raises but `known`: each has errors of its own."""
        try:
            yield
        except known:
            raise
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise BlobsUnavailableError(f"the blobs at {self._root} do not answer: {why}; check blob_url and its rights") from error

    def _path(self, reference: str) -> str:
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", reference):
            raise BlobError(f"{reference[:80]!r} is no blob reference; expected sha256: and 64 hexadecimal digits")
        digest = reference[7:]
        return f"{self._root}/{digest[:2]}/{digest}"
