"""TensorFlow SavedModels and Keras files through tf2onnx (an optional extra; TensorFlow itself is not a dependency)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.importers.base import Imported, needs
from shared_runtime.importers.sklearn import name_batch
from shared_runtime.signature import Tensors

OPSET = 18


class TensorflowImporter:
    """SavedModel folders (signature `serving_default`), `.keras` and `.h5` files."""

    name, requires = "tensorflow", "tensorflow and tf2onnx"

    def takes(self, source: Any) -> bool:
        if not isinstance(source, Path):
            return type(source).__module__.partition(".")[0] in ("keras", "tf_keras", "tensorflow")
        return (source.is_dir() and (source / "saved_model.pb").is_file()) or (source.is_file() and source.suffix in (".keras", ".h5"))

    def load(self, source: Any, example: Mapping[str, Any] | None) -> Imported:
        tensorflow = needs("tensorflow", "a TensorFlow model")
        tf2onnx = needs("tf2onnx", "a TensorFlow model")
        function = _serving(tensorflow, source)
        _, inputs = function.structured_input_signature
        specs = [tensorflow.TensorSpec(spec.shape, spec.dtype, name=key) for key, spec in inputs.items()]
        if len({spec.dtype for spec in specs}) and any(spec.shape.rank in (None, 0) for spec in specs):
            raise UnsupportedModelError("an input of this model has no leading batch dimension; expected (batch, ...)")
        keyed = tensorflow.function(lambda *args: function(**dict(zip(inputs, args, strict=True))), input_signature=specs)
        proto, _ = tf2onnx.convert.from_function(keyed, input_signature=specs, opset=OPSET)
        name_batch(proto)
        names = [output.name for output in proto.graph.output]
        order = sorted(function.structured_outputs)
        titles = dict(zip(names, order, strict=True)) if len(order) == len(names) else {}

        def origin(given: Tensors) -> Tensors:
            result = function(**{key: tensorflow.constant(given[graph.name]) for key, graph in zip(inputs, proto.graph.input, strict=True)})
            return {name: np.asarray(result[titles.get(name, name)]) for name in names}

        given = None if example is None else {key: np.asarray(value) for key, value in example.items()}
        return Imported(proto, origin, f"tensorflow {tensorflow.__version__}", given)


def _serving(tensorflow: Any, source: Any) -> Any:
    if isinstance(source, Path) and source.is_dir():
        module = tensorflow.saved_model.load(str(source))
        if "serving_default" not in module.signatures:
            raise UnsupportedModelError(f"{source} has no signature 'serving_default' (it has {list(module.signatures)}); save it with one")
        function = module.signatures["serving_default"]
        function._triscope_owner = module  # the function holds its variables weakly
        return function
    if isinstance(source, Path):
        source = tensorflow.keras.models.load_model(str(source), compile=False, safe_mode=True)
    import tempfile

    folder = tempfile.mkdtemp(prefix="triscope-keras-")
    source.export(folder)
    return _serving(tensorflow, Path(folder))
