"""ONNX files, with or without external weights: made one file, checked, and compared with themselves unoptimised.

Those of operators or of a file format that the engine is too new or too old for are brought to what it knows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.graph.check import IR, LARGEST, OLDEST, check_graph, opset, read_whole
from shared_runtime.graph.passes.base import plain_session
from shared_runtime.graph.versions import changed_since, newest, relabelled, too_new
from shared_runtime.importers.base import Imported, tensors
from shared_runtime.signature import Tensors

UPGRADED = 18
"""What operators older than OLDEST are converted to."""


class OnnxImporter:
    """`.onnx` files, and graphs in memory (`onnx.ModelProto`)."""

    name, requires = "onnx", "nothing more"

    def takes(self, source: Any) -> bool:
        return isinstance(source, onnx.ModelProto) or (isinstance(source, Path) and source.suffix == ".onnx" and source.is_file())

    def load(self, source: Any, example: Mapping[str, Any] | None) -> Imported:
        if isinstance(source, onnx.ModelProto):
            _refuse_large(source, "the graph")
            with tempfile.TemporaryDirectory(prefix="triscope-graph-") as folder:
                path = Path(folder) / "graph.onnx"
                onnx.save(source, path)
                return self.load(path, example)
        check_graph(source)
        proto = read_whole(source)
        _refuse_large(proto, source.name)
        if (version := opset(proto)) < OLDEST:
            return _upgraded(proto, version, source.name, example)
        if too_new(proto):
            return _lowered(proto, source.name, example)
        return _compared(proto, plain_session(source), "onnx", example)


def _refuse_large(proto: onnx.ModelProto, name: str) -> None:
    """Raise UnsupportedModelError for a graph that does not fit into one file."""
    if proto.ByteSize() > LARGEST:
        raise UnsupportedModelError(f"{name} holds {proto.ByteSize() / 2**30:.1f} GiB; expected under 2 GiB with its weights")


def _upgraded(proto: onnx.ModelProto, version: int, name: str, example: Mapping[str, Any] | None) -> Imported:
    """A graph of operators that no engine runs any more: converted, and compared with ONNX's reference implementation of the old ones.

    Raises UnsupportedModelError.
    """
    from onnx.reference import ReferenceEvaluator
    from onnx.version_converter import convert_version

    try:
        made, reference = convert_version(proto, UPGRADED), ReferenceEvaluator(proto)
        made.ir_version = max(made.ir_version, IR)  # older ones want every constant among the inputs
        onnx.checker.check_model(made)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(
            f"{name} uses the operators of opset {version}, older than {OLDEST}, and can't be converted ({reason}); export it again"
        ) from error
    return _compared(made, reference, f"onnx (opset {version}, converted to {UPGRADED})", example, own=False)


def _lowered(proto: onnx.ModelProto, name: str, example: Mapping[str, Any] | None) -> Imported:
    """A graph of a version that no engine here loads yet, as the newest that one does. Where an operator was given a new definition
    in between, the graph is compared with ONNX's reference implementation of that.

    Raises UnsupportedModelError.
    """
    from onnx.reference import ReferenceEvaluator

    (ir, operators), version = newest(), opset(proto)
    made, changed = relabelled(proto), changed_since(proto, operators)
    try:
        onnx.checker.check_model(made)
        session = plain_session(made)
        reference = ReferenceEvaluator(proto) if changed else None
    except Exception as error:
        which = f" ({', '.join(sorted(changed))} among them)" if changed else ""
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(
            f"{name} uses the operators of opset {version}{which} in format {proto.ir_version}, newer than what the engines here know "
            f"(opset {operators}, format {ir}), and does not hold as those ({reason}); export it for an older opset"
        ) from error
    return _compared(made, reference or session, f"onnx (opset {version}, format {proto.ir_version})", example, own=reference is None)


def _compared(proto: onnx.ModelProto, computes: Any, source: str, example: Mapping[str, Any] | None, *, own: bool = True) -> Imported:
    """A graph with what gives its outputs by name: a session of its `own`, so that its tensors can be compared as well, or another's."""
    names = [output.name for output in proto.graph.output]

    def origin(inputs: Tensors) -> Tensors:
        return {output: np.asarray(value) for output, value in zip(names, computes.run(names, inputs), strict=True)}

    def layers(inputs: Tensors) -> Tensors:
        return tensors(proto, [output for node in proto.graph.node for output in node.output if output], inputs)

    return Imported(proto, origin, source, None if example is None else dict(example), layers if own else None)
