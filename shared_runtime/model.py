"""The model artefact: a folder with `model.onnx`, `signature.json` and `card.toml`, or a bare ONNX file."""

from __future__ import annotations

import hashlib
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.errors import ModelIntegrityError, ModelNotFoundError, UnsupportedModelError
from shared_runtime.graph.export import to_onnx
from shared_runtime.repository.store import ModelRepository
from shared_runtime.signature import Signature

GRAPH_FILE, SIGNATURE_FILE, CARD_FILE = "model.onnx", "signature.json", "card.toml"


@dataclass(frozen=True)
class Model:
    """A verified model on disk. `sha256` is that of the graph file; `card` is empty for a bare file."""

    name: str
    graph: Path
    signature: Signature
    sha256: str
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The card's version, or the first digits of the hash."""
        return str(self.card.get("version", self.sha256[:12]))


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load(
    source: str | Path | Any,
    *,
    sha256: str | None = None,
    example: Mapping[str, Any] | None = None,
    name: str | None = None,
    repository: ModelRepository | None = None,
) -> Model:
    """Load a model from an ONNX file, a model folder, a repository name or a torch module.

    `sha256` is what the graph file must hash to; a folder's card states it. A torch module needs
    `example`, named inputs with a leading batch dimension, to be exported with.
    Raises ModelNotFoundError, ModelIntegrityError, UnsupportedModelError.
    """
    if not isinstance(source, (str, Path)):
        return _from_torch(source, example, name)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, sha256)
    if path.is_file():
        return _from_file(path, sha256, name)
    if path.suffix or len(path.parts) > 1:
        raise ModelNotFoundError(f"no model at {path}; expected an ONNX file, a model folder or a repository name")
    return _from_folder((repository or ModelRepository.default()).folder(str(source)), sha256)


def _from_file(path: Path, sha256: str | None, name: str | None) -> Model:
    if path.suffix != ".onnx":
        raise UnsupportedModelError(
            f"{path.name} has suffix {path.suffix!r}; supported are .onnx files, model folders and torch modules: export it to ONNX"
        )
    actual = _verified(path, sha256)
    return Model(name or path.stem, path, Signature.from_onnx(path), actual)


def _from_folder(folder: Path, sha256: str | None) -> Model:
    graph, card_file = folder / GRAPH_FILE, folder / CARD_FILE
    for needed in (graph, card_file, folder / SIGNATURE_FILE):
        if not needed.is_file():
            raise ModelNotFoundError(f"model folder {folder} has no {needed.name}; restore it or import the model again")
    try:
        card = tomllib.loads(card_file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UnsupportedModelError(f"the card {card_file} is not valid TOML: {error}") from error
    stated = card.get("artefact", {}).get("sha256")
    if not isinstance(stated, str):
        raise ModelIntegrityError(f"the card {card_file} states no artefact.sha256, so the model can't be verified")
    actual = _verified(graph, sha256 or stated)
    return Model(str(card.get("name", folder.name)), graph, Signature.read(folder / SIGNATURE_FILE), actual, card)


def _verified(path: Path, expected: str | None) -> str:
    actual = sha256_of(path)
    if expected is not None and actual != expected.lower():
        raise ModelIntegrityError(
            f"{path} has SHA-256 {actual}, expected {expected}; the file was changed or damaged: install or import the model again"
        )
    return actual


def _from_torch(module: Any, example: Mapping[str, Any] | None, name: str | None) -> Model:
    """Export through torch.export into a temporary file that lives as long as the process."""
    kind = type(module).__module__.partition(".")[0]
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or not isinstance(module, torch.nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"can't load a {type(module).__name__} from {kind!r}; supported are paths, repository names and torch.nn.Module "
            "(TorchScript holds code: export the original module instead)"
        )
    if not example:
        raise UnsupportedModelError("a torch module needs example={'input_name': array} with a leading batch dimension")
    folder = Path(tempfile.mkdtemp(prefix="triscope-model-"))
    graph = folder / GRAPH_FILE
    tensors = {key: torch.from_numpy(np.repeat(np.asarray(value)[:1], 2, axis=0)) for key, value in example.items()}
    graph.write_bytes(to_onnx(module, tensors).SerializeToString())
    return _from_file(graph, None, name or type(module).__name__)
