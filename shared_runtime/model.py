"""The model artefact: a folder with `model.onnx`, `signature.json` and `card.toml`, or a bare ONNX file."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared_runtime.certificate import Certificate
from shared_runtime.errors import InputError, ModelIntegrityError, ModelNotFoundError, UnsupportedModelError
from shared_runtime.folders import settled, state_of
from shared_runtime.graph.check import OLDEST, check_graph, graph_hash, opset, read_graph
from shared_runtime.graph.versions import too_new
from shared_runtime.repository.store import ModelRepository
from shared_runtime.signature import Signature, Tensors
from shared_runtime.variants import Variant, VariantStore

GRAPH_FILE, SIGNATURE_FILE, CARD_FILE = "model.onnx", "signature.json", "card.toml"


_LOADED: dict[Path, tuple[object, str]] = {}
"""The graphs that were loaded: what tells each file from the one that takes its place, and its hash."""


@dataclass(frozen=True)
class Model:
    """A verified model on disk. `sha256` is that of the graph file; `card` is empty for a bare file.

    `known` holds every variant by name, also those that are not served; `dims` the usual sizes of named dimensions;
    `sample` one row of the calibration set and `example` one of what it was loaded with, in memory alone; `refused` says what the
    last `rt.optimize` tried and did not keep, and why.
    """

    name: str
    graph: Path
    signature: Signature
    sha256: str
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)
    known: Mapping[str, Variant] = field(default_factory=dict, repr=False)
    dims: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    sample: Tensors | None = field(default=None, repr=False, compare=False)
    example: Tensors | None = field(default=None, repr=False, compare=False)

    @property
    def version(self) -> str:
        """The card's version, or the first digits of the hash."""
        return str(self.card.get("version", self.sha256[:12]))

    def random(self, rows: int = 1, seed: int = 0) -> Tensors:
        """Seeded inputs of `rows`, as large as those that the model was imported or optimised with."""
        sizes = {str(name): int(size) for name, size in self.card.get("dims", {}).items()}
        for variant in self.known.values():
            if variant.certificate is not None:
                sizes |= variant.certificate.dims
        return self.signature.random(rows, seed, {**sizes, **self.dims})

    def probe(self, rows: int = 1) -> Tensors:
        """Inputs of `rows` to measure on: the sample of the calibration set that it was optimised with, else random ones."""
        return self.random(rows) if self.sample is None else self.signature.repeated(self.sample, rows)

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants that hold a valid certificate on this host."""
        return tuple(name for name, variant in self.known.items() if not variant.why_void)

    def variant(self, name: str) -> Variant:
        """A certified variant. Raises ModelNotFoundError, naming those there are or why this one is void."""
        found = self.known.get(name)
        if found is None:
            raise ModelNotFoundError(f"model {self.name!r} has no variant {name!r}; it has {list(self.known) or 'none'}: run rt.optimize")
        if found.why_void:
            raise ModelIntegrityError(f"variant {name!r} of {self.name!r} is not served: {found.why_void}")
        return found

    def certificate(self, name: str) -> Certificate:
        """The certificate of a variant. Raises as `variant` does."""
        certificate = self.variant(name).certificate
        assert certificate is not None
        return certificate


def load(
    source: str | Path | Any,
    *,
    sha256: str | None = None,
    example: Any = None,
    name: str | None = None,
    repository: ModelRepository | None = None,
    variants: VariantStore | None = None,
) -> Model:
    """Load a model: a repository name, a model folder, an ONNX file, or anything that `rt.import_model` takes
    (an ONNX graph, a torch module or exported program, a scikit-learn, XGBoost or LightGBM estimator, a MONAI bundle, an nnU-Net
    folder ...).

    `sha256` is what the graph file must hash to; a folder's card states it. `example`: valid inputs by name with a leading batch
    dimension (an array, or a tuple of them in order, does as well); a torch module needs some, and sessions of any model are planned
    on its first row. What was optimised on this host before comes with its certified variants.
    Raises ModelNotFoundError, ModelIntegrityError, UnsupportedModelError, ImportMismatchError; InputError where the example does not
    fit a model that is on disk.
    """
    model = _load(source, sha256, example, name, repository, variants or VariantStore())
    if example is None:
        return model
    from shared_runtime.importers import named

    try:
        given = model.signature.check(named(model.graph, example) or {}, model.name)
    except InputError:
        if isinstance(source, (str, Path)):
            raise
        return model  # an estimator's table has other columns than the graph has inputs
    one = {key: value.copy() for key, value in model.signature.row(given, 0).items()}
    return replace(model, example=one if model.signature.rows(given) else None, dims=model.signature.dims_of(given))


def _load(
    source: Any, sha256: str | None, example: Any, name: str | None, repository: ModelRepository | None, store: VariantStore
) -> Model:
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir() and (path / CARD_FILE).is_file():
            return settled([path], lambda: _from_folder(path, sha256, store))
        if path.suffix == ".onnx" and path.is_file():
            actual, sha256 = _verified(path, sha256), None
            proto = read_graph(path)
            if opset(proto) >= OLDEST and not too_new(proto):
                return _from_file(path, actual, name, store)
        if not path.exists():
            if path.suffix or len(path.parts) > 1:
                raise ModelNotFoundError(f"no model at {path}; expected an ONNX file, a model folder or a repository name")
            known = repository or ModelRepository.default()
            return settled(known.places(str(source)), lambda: _from_folder(known.folder(str(source)), sha256, store))
    from shared_runtime.importers import import_to_folder

    folder = Path(tempfile.mkdtemp(prefix="triscope-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return _from_folder(import_to_folder(source, folder / "model", name=name, example=example), sha256, store)


def _from_file(path: Path, actual: str, name: str | None, store: VariantStore) -> Model:
    check_graph(path)
    return Model(name or path.stem, path, Signature.from_onnx(path), actual, known=store.read(actual))


def _from_folder(folder: Path, sha256: str | None, store: VariantStore) -> Model:
    graph, card_file = folder / GRAPH_FILE, folder / CARD_FILE
    for needed in (graph, card_file, folder / SIGNATURE_FILE):
        if not needed.is_file():
            raise ModelNotFoundError(f"model folder {folder} has no {needed.name}; restore it or import the model again")
    try:
        card = tomllib.loads(card_file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UnsupportedModelError(f"the card {card_file} is not valid TOML: {error}") from error
    stated = card.get("artefact", {}).get("sha256")
    if not isinstance(stated, str):
        raise ModelIntegrityError(f"the card {card_file} states no artefact.sha256, so the model can't be verified")
    actual = _verified(graph, sha256 or stated)
    known = store.read(actual, folder / "variants")
    return Model(str(card.get("name", folder.name)), graph, Signature.read(folder / SIGNATURE_FILE), actual, card, known)


def refuse_replaced(model: Model) -> None:
    """Raise ModelIntegrityError where the graph's file is no longer the one that was loaded: it is hashed again where it was touched."""
    state, known = _LOADED.get(model.graph, (None, ""))
    if known != model.sha256 or state_of(model.graph) == state:
        return
    if not model.graph.is_file() or graph_hash(model.graph) != known:
        raise ModelIntegrityError(f"{model.graph} was replaced since {model.name!r} was loaded; load it again")


def _verified(path: Path, expected: str | None) -> str:
    state, actual = state_of(path), graph_hash(path)
    _LOADED[path] = (state, actual)
    if expected is not None and actual != expected.lower():
        raise ModelIntegrityError(
            f"{path} has SHA-256 {actual}, expected {expected}; the file was changed or damaged: install or import the model again"
        )
    return actual
