"""The certificate of a variant: what was measured, on which data, on which host; and whether it still holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from shared_runtime.errors import NOT_JSON
from shared_runtime.host import host

CERTIFICATE_FILE = "certificate.json"
NUMERIC_FLAGS = ("avx2", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")
"""Vector instructions on which the values (not only the speed) of reduced arithmetic depend."""


class DataDigest(msgspec.Struct, frozen=True):
    """A set of samples: how many, rows in all, and the SHA-256 over them in order."""

    items: int
    rows: int
    sha256: str


class SliceScore(msgspec.Struct, frozen=True):
    """The metric on one slice of the validation set, of the float model and of the variant."""

    items: int
    before: float
    after: float
    drop_interval: tuple[float, float]


class Reversion(msgspec.Struct, frozen=True):
    """A layer that was put back to float, and why (`accuracy`: its harm; `speed`: times as slow as float)."""

    layer: str
    why: str
    value: float


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """What proves that a variant still does the float model's job.

    `drop` is `before - after` in the metric's unit, `drop_interval` its 95 % bootstrap interval. `probe_error` is
    the relative difference from the float model on the signature's own seeded inputs, of the sizes in `dims`: it can be computed again
    without any data; None where the model does not run on those. `packed`: layers of `reverted` whose weights are stored in
    INT8 all the same. `together`: the most samples that were judged in one run, besides one by one, with the metric's drop on such
    runs (None where it says nothing of them: rows depend on each other). `numerics` names what the values depend on; the
    certificate is void where it differs.
    """

    model: str
    sha256: str
    variant: str
    precision: str
    files: dict[str, str]
    metric: str
    before: float
    after: float
    drop: float
    drop_interval: tuple[float, float]
    max_drop: float
    slices: dict[str, SliceScore]
    calibration: DataDigest | None
    validation: DataDigest
    passes: tuple[str, ...] = ()
    layers: int = 0
    reverted: tuple[Reversion, ...] = ()
    packed: tuple[str, ...] = ()
    saturated: int | None = None
    together: int = 1
    together_drop: float | None = None
    probe_error: float | None = 0.0
    dims: dict[str, int] = {}
    bytes: int = 0
    float_bytes: int = 0
    speedup: float | None = None
    numerics: tuple[str, ...] = ()
    host: str = ""
    created: str = ""

    def write(self, folder: Path) -> None:
        """Write `certificate.json`."""
        (folder / CERTIFICATE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    def void(self, sha256: str, folder: Path, numerics: tuple[str, ...]) -> str:
        """Why the certificate does not hold for the float model `sha256` and the files in `folder`; "" where it does."""
        if self.sha256 != sha256:
            return f"certified for the float model {self.sha256[:12]}, not for {sha256[:12]}"
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                return f"its file {name} is missing"
            if hash_file(path) != expected:
                return f"its file {name} is not the one that was certified"
        if self.numerics != numerics:
            return f"certified where values depend on {list(self.numerics)}; here on {list(numerics)}: certify it on this host"
        if not self.drop <= self.max_drop:
            return f"the metric drops by {self.drop:.4g}, allowed are {self.max_drop:.4g}"
        return ""


def numerics(engine: str, device: str) -> tuple[str, ...]:
    """What the values of reduced arithmetic depend on: the engine with its version, and the processor's instructions or the GPU."""
    from shared_runtime.backends.base import backends

    version = backends()[engine].availability(device).version if engine in backends() else None
    if device == "cuda":
        return (f"{engine} {version}", *(gpu.name for gpu in host().gpus[:1]))
    return (f"{engine} {version}", *(flag for flag in NUMERIC_FLAGS if flag in host().vector))


def hash_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_certificate(folder: Path) -> Certificate | None:
    """The certificate in `folder`, or None where there is none that can be read."""
    try:
        return msgspec.json.decode((folder / CERTIFICATE_FILE).read_bytes(), type=Certificate)
    except (OSError, *NOT_JSON):
        return None
