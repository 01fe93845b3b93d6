"""From what others trained to a model folder; each import ends with a numerical comparison against its origin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.importers.base import Importer, write_folder
from shared_runtime.importers.boosting import LightgbmImporter, XgboostImporter
from shared_runtime.importers.monai_bundle import MonaiBundleImporter
from shared_runtime.importers.nnunet import NnunetImporter
from shared_runtime.importers.onnx_file import OnnxImporter
from shared_runtime.importers.sklearn import SklearnImporter
from shared_runtime.importers.tensorflow import TensorflowImporter
from shared_runtime.importers.torch_module import TorchImporter
from shared_runtime.repository.store import ModelRepository

IMPORTERS: tuple[Importer, ...] = (
    OnnxImporter(),
    NnunetImporter(),
    MonaiBundleImporter(),
    TensorflowImporter(),
    XgboostImporter(),
    LightgbmImporter(),
    TorchImporter(),
    SklearnImporter(),
)


def import_to_folder(source: Any, folder: Path, *, name: str | None = None, example: Mapping[str, Any] | None = None) -> Path:
    """Import `source` as the model folder `folder`; see `import_model`."""
    if isinstance(source, (str, Path)):
        source = Path(source)
        if not source.exists():
            raise UnsupportedModelError(f"there is nothing at {source} to import")
    importer = next((one for one in IMPORTERS if one.takes(source)), None)
    if importer is None:
        what = f"{source.name} (suffix {source.suffix!r})" if isinstance(source, Path) else f"a {type(source).__name__}"
        module = "" if isinstance(source, Path) else f" from {type(source).__module__.partition('.')[0]!r}"
        raise UnsupportedModelError(
            f"can't load {what}{module}; supported are ONNX files, torch modules, scikit-learn, XGBoost and LightGBM estimators, "
            "TensorFlow SavedModels, MONAI bundles and nnU-Net folders (pickled files hold code and are not opened: load them in "
            "Python and pass the object)"
        )
    default = source.stem if isinstance(source, Path) else type(source).__name__
    return write_folder(importer.load(source, example), folder, name or default)


def import_model(source: Any, name: str, *, example: Mapping[str, Any] | None = None, repository: ModelRepository | None = None) -> Path:
    """Import `source` into the repository under `name`; the folder. An earlier model of that name is replaced at once.

    `source`: a path (ONNX, SavedModel or .keras, MONAI bundle, nnU-Net v2 folder, XGBoost .ubj/.json, LightGBM .txt) or an
    object (torch module with `example`, scikit-learn, XGBoost or LightGBM estimator). Raises UnsupportedModelError,
    ImportMismatchError, ModelIntegrityError; the repository is then as it was.
    """
    root = (repository or ModelRepository.default()).roots[0]
    return import_to_folder(source, root / name, name=name, example=example)
