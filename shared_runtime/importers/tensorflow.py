"""TensorFlow SavedModels and Keras files through tf2onnx (an optional extra; TensorFlow itself is not a dependency)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.importers.base import Imported, needs, tensors
from shared_runtime.importers.sklearn import name_batch
from shared_runtime.numeric import relative_difference
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

        def layers(given: Tensors) -> Tensors:
            """The tensors that keep their name on the way to ONNX, in the graph's layout: channels first or last."""
            from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

            frozen = convert_variables_to_constants_v2(keyed.get_concrete_function(), lower_control_flow=False, aggressive_inlining=True)
            there = {tensor.name for operation in frozen.graph.get_operations() for tensor in operation.outputs}
            kept = [output for node in proto.graph.node for output in node.output if output in there]
            values = frozen.prune(frozen.inputs, kept)(*(tensorflow.constant(given[graph.name]) for graph in proto.graph.input))
            ours, found = tensors(proto, kept, given), {}
            for name, value in zip(kept, map(np.asarray, values), strict=True):
                layouts = [value, *([np.moveaxis(value, -1, 1)] if value.ndim > 2 else [])]
                if fitting := [layout for layout in layouts if layout.shape == ours[name].shape]:
                    found[name] = min(fitting, key=lambda layout: relative_difference(ours[name], layout))
            return found

        given = None if example is None else {key: np.asarray(value) for key, value in example.items()}
        return Imported(proto, origin, f"tensorflow {tensorflow.__version__}", given, layers)


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
    with tempfile.TemporaryDirectory(prefix="triscope-keras-") as folder:
        source.export(folder)
        return _serving(tensorflow, Path(folder))
