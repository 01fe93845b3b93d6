"""Variants of a model: other forms of the same job (INT8, FP16, bfloat16 ...), each served only by its certificate."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shared_runtime.certificate import Certificate, hash_file, numerics, read_certificate
from shared_runtime.errors import NOT_JSON
from shared_runtime.folders import replace_folder
from shared_runtime.home import home

logger = logging.getLogger(__name__)
VARIANT_FILE = "variant.json"
FLOAT = "float32"
DYNAMIC = "int8-dynamic"
"""The form that takes the scale of a layer's input from what it is given, over all rows of a run."""


class VariantFacts(msgspec.Struct, frozen=True):
    """What `variant.json` says: the engine and device that run it, its precision, its graph ("" is the float graph)."""

    name: str
    precision: str
    engine: str
    device: str
    graph: str = ""
    rest: str = FLOAT
    """Precision of what is not quantized, where the engine chooses it."""


@dataclass(frozen=True)
class Variant:
    """A form of a model that one engine runs. `why_void` says why it is not served; "" where it may be."""

    facts: VariantFacts
    folder: Path
    certificate: Certificate | None = None
    why_void: str = ""

    @property
    def name(self) -> str:
        """The variant's name, such as `int8-openvino`."""
        return self.facts.name

    def graph(self, reference: Path) -> Path:
        """The file that the engine loads; `reference` is the float graph."""
        return self.folder / self.facts.graph if self.facts.graph else reference


@dataclass(frozen=True)
class VariantStore:
    """Folders of variants by the float graph's hash: `TRISCOPE_HOME/variants`, and those that travel in a model's folder."""

    root: Path = field(default_factory=lambda: home() / "variants")

    def folder(self, sha256: str) -> Path:
        """Where the variants of the float graph `sha256` are kept."""
        return self.root / sha256

    def read(self, sha256: str, also: Path | None = None) -> Mapping[str, Variant]:
        """Every variant by name, with a valid certificate or the reason why it is void."""
        found: dict[str, Variant] = {}
        for parent in (also, self.folder(sha256)):
            if parent is None or not parent.is_dir():
                continue
            for file in sorted(parent.glob(f"*/{VARIANT_FILE}")):
                variant = _read(file, sha256)
                found[variant.name] = variant
        return found

    def write(self, sha256: str, facts: VariantFacts, fill: Callable[[Path], Certificate]) -> Variant:
        """Make a variant whole or not at all: `fill` writes its files into a folder that is then moved into place.

        Two processes may write the same variant; the later one stays.
        """
        parent = self.folder(sha256)
        parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{facts.name}-", dir=parent))
        try:
            certificate = fill(part)
            (part / VARIANT_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n")
            certificate.write(part)
            part.chmod(0o755)
            replace_folder(part, parent / facts.name)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return Variant(facts, parent / facts.name, certificate)

    def remove(self, sha256: str, name: str) -> None:
        """Forget a variant."""
        shutil.rmtree(self.folder(sha256) / name, ignore_errors=True)


def _read(file: Path, sha256: str) -> Variant:
    try:
        facts = msgspec.json.decode(file.read_bytes(), type=VariantFacts)
    except (OSError, *NOT_JSON) as error:
        unknown = VariantFacts(file.parent.name, "unknown", "unknown", "cpu")
        return Variant(unknown, file.parent, None, f"its {VARIANT_FILE} can't be read: {error}")
    certificate = read_certificate(file.parent)
    if certificate is None:
        return Variant(facts, file.parent, None, "it has no certificate that can be read")
    why = certificate.void(sha256, file.parent, numerics(facts.engine, facts.device))
    if not why and facts.graph and facts.graph not in certificate.files:
        why = f"its graph {facts.graph} is not covered by the certificate"
    if why:
        logger.warning("variant %s is not served: %s", facts.name, why)
    return Variant(facts, file.parent, certificate, why)


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a variant, by name, without its descriptions."""
    return {p.name: hash_file(p) for p in sorted(folder.iterdir()) if p.is_file() and p.suffix != ".json"}
