"""ONNX files, with or without external weights: made one file, checked, and compared with themselves unoptimised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.graph.check import check_graph
from shared_runtime.graph.passes.base import plain_session
from shared_runtime.importers.base import Imported, tensors
from shared_runtime.signature import Tensors

LARGEST = 2**31 - 1


class OnnxImporter:
    """`.onnx` files."""

    name, requires = "onnx", "nothing more"

    def takes(self, source: Any) -> bool:
        return isinstance(source, Path) and source.suffix == ".onnx" and source.is_file()

    def load(self, source: Any, example: Mapping[str, Any] | None) -> Imported:
        check_graph(source)
        proto = onnx.load(str(source))
        if proto.ByteSize() > LARGEST:
            raise UnsupportedModelError(f"{source.name} holds {proto.ByteSize() / 2**30:.1f} GiB; expected under 2 GiB with its weights")
        session = plain_session(source)
        names = [output.name for output in session.get_outputs()]

        def origin(inputs: Tensors) -> Tensors:
            return dict(zip(names, session.run(names, inputs), strict=True))

        def layers(inputs: Tensors) -> Tensors:
            return tensors(proto, [output for node in proto.graph.node for output in node.output if output], inputs)

        given = None if example is None else dict(example)
        return Imported(proto, origin, "onnx", given, layers)
