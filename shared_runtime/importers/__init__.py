"""From what others trained to a model folder; each import ends with a numerical comparison against its origin."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.importers.base import Importer, write_folder
from shared_runtime.importers.boosting import LightgbmImporter, XgboostImporter
from shared_runtime.importers.monai_bundle import MonaiBundleImporter
from shared_runtime.importers.nnunet import NnunetImporter
from shared_runtime.importers.onnx_file import OnnxImporter
from shared_runtime.importers.sklearn import SklearnImporter
from shared_runtime.importers.tensorflow import TensorflowImporter
from shared_runtime.importers.torch_module import TorchImporter, is_program
from shared_runtime.repository.store import ModelRepository
from shared_runtime.signature import Signature

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


def import_to_folder(source: Any, folder: Path, *, name: str | None = None, example: Any = None) -> Path:
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
            f"can't load {what}{module}; supported are ONNX files and graphs, torch modules and exported programs, scikit-learn, XGBoost "
            "and LightGBM estimators, TensorFlow SavedModels, MONAI bundles and nnU-Net folders (pickled files hold code and are not "
            "opened: load them in Python and pass the object)"
        )
    default = source.stem if isinstance(source, Path) else type(source).__name__
    return write_folder(importer.load(source, named(source, example)), folder, name or default)


def named(source: Any, example: Any) -> Mapping[str, Any] | None:
    """An example by input name, from what people have at hand: a dict, an array or tensor, a tuple of them, a table.

    Raises UnsupportedModelError where there are more arrays than inputs.
    """
    if example is None or isinstance(example, Mapping):
        return example
    if hasattr(example, "columns"):
        return {str(column): example[column].to_numpy() for column in example.columns}
    if is_program(source):
        names = list(source.graph_signature.user_inputs)
    elif hasattr(source, "forward"):
        names = list(inspect.signature(source.forward).parameters)
    elif isinstance(source, onnx.ModelProto) or (isinstance(source, Path) and source.suffix == ".onnx"):
        names = [spec.name for spec in Signature.from_onnx(source).inputs]
    else:
        return {"features": np.asarray(example)}
    values = list(example) if isinstance(example, (tuple, list)) else [example]
    arrays = [value if hasattr(value, "detach") else np.asarray(value) for value in values]  # tensors may lie on a GPU
    if len(arrays) > len(names):
        raise UnsupportedModelError(f"the example holds {len(arrays)} arrays, the model takes {names}; give example={{'name': array}}")
    return dict(zip(names, arrays, strict=False))


def import_model(source: Any, name: str, *, example: Any = None, repository: ModelRepository | None = None) -> Path:
    """Import `source` into the repository under `name`; the folder. An earlier model of that name is replaced at once.

    `source`: a path (ONNX, SavedModel or .keras, MONAI bundle, nnU-Net v2 folder, XGBoost .ubj/.json, LightGBM .txt) or an
    object (ONNX graph, torch module with `example`, torch.export's program, scikit-learn, XGBoost or LightGBM estimator). `example`:
    valid inputs by name, each with a leading batch dimension; a single array, a tuple of arrays in order, or a table do as well.
    Raises UnsupportedModelError, ImportMismatchError, ModelIntegrityError; the repository is then as it was.
    """
    root = (repository or ModelRepository.default()).roots[0]
    return import_to_folder(source, root / name, name=name, example=example)
