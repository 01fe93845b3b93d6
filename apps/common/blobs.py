"""Blobs by content hash: a folder, or an S3 bucket, through fsspec."""

from __future__ import annotations

import hashlib
import re
import uuid

import fsspec

from apps.common.errors import BlobError

MAX_BYTES = 8 * 2**30


class BlobStore:
    """Blobs below `url` (`file:///DIR`, `s3://BUCKET/PREFIX`, `memory://`). A reference is `sha256:HEX`."""

    def __init__(self, url: str) -> None:
        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise BlobError(f"blob address {url!r} can't be used: {error}; expected file:///DIR or s3://BUCKET/PREFIX") from error

    def put(self, content: bytes) -> str:
        """Store `content` once and return its reference; a half-written blob is never visible."""
        reference = f"sha256:{hashlib.sha256(content).hexdigest()}"
        path = self._path(reference)
        if not self._system.exists(path):
            part = f"{path}.{uuid.uuid4().hex}.part"
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self._system.open(part, "wb") as stream:
                stream.write(content)
            self._system.mv(part, path)
        return reference

    def get(self, reference: str) -> bytes:
        """The content of `reference`. Raises BlobError where it is missing or was changed."""
        path = self._path(reference)
        try:
            size = int(self._system.size(path) or 0)
            if size > MAX_BYTES:
                raise BlobError(f"blob {reference} has {size} bytes, more than the {MAX_BYTES} that are read")
            content: bytes = self._system.cat_file(path)
        except FileNotFoundError as error:
            raise BlobError(f"no blob {reference} in this store; check blob_url, or send the study again") from error
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != reference:
            raise BlobError(f"blob {reference} was changed on disk; restore it or send the study again")
        return content

    def _path(self, reference: str) -> str:
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", reference):
            raise BlobError(f"{reference[:80]!r} is no blob reference; expected sha256: and 64 hexadecimal digits")
        digest = reference[7:]
        return f"{self._root}/{digest[:2]}/{digest}"
