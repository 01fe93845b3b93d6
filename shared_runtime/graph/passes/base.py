"""The plug-in point of a graph pass, and its numerical check: a pass that changes what a graph computes is refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
import onnx
import onnxruntime as ort

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.graph.check import EXACT_BYTES, ROUNDS_WEIGHTS, computes_on_bytes, read_graph, session_source
from shared_runtime.host import host
from shared_runtime.numeric import relative_difference
from shared_runtime.signature import Tensors

logger = logging.getLogger(__name__)
EXACT = 1e-5
"""Largest relative difference that reordered float32 arithmetic may make."""


class PassRefused(Exception):
    """A pass does not apply to this graph; the message says why."""


@runtime_checkable
class OptimizationPass(Protocol):
    """One rewrite of an ONNX graph. `tolerance`: the relative difference that it may make; None where it is lossy by
    intent (pruning ...) and only the guard can tell. `engine`: the backend whose operators it uses, "" for all.
    A pass may name its `options`; any other is refused then."""

    name: str
    summary: str
    tolerance: float | None
    engine: str

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        """Rewrite `model` in place; how many places changed. Raises PassRefused."""
        ...


class PassResult(msgspec.Struct, frozen=True):
    """What a pass did: places changed, nodes and bytes before and after, the difference it made; `refused` says why it did not."""

    name: str
    changes: int
    nodes: tuple[int, int]
    bytes: tuple[int, int]
    difference: float | None
    seconds: float
    refused: str = ""


@cache
def passes() -> Mapping[str, OptimizationPass]:
    """The installed passes by name, from the entry points `triscope.passes`."""
    found: dict[str, OptimizationPass] = {}
    for entry in sorted(entry_points(group="triscope.passes"), key=lambda item: item.name):
        made = entry.load()()
        found[made.name] = made
    return found


def run_pass(
    model: onnx.ModelProto, one: OptimizationPass, probes: Sequence[Tensors], **options: Any
) -> tuple[onnx.ModelProto, PassResult]:
    """Apply a pass to a copy and verify it on `probes` with the engine's own optimisations off; the copy, or the model as it was."""
    begin = time.perf_counter()
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    before = (len(model.graph.node), model.ByteSize())
    changes, error, refused = 0, None, ""
    try:
        known = getattr(one, "options", None)
        if known is not None and (unknown := sorted(set(options) - set(known))):
            raise PassRefused(f"it has no option {unknown[0]!r}; it has {', '.join(known)}")
        changes = one.apply(changed, **options)
        if changes:
            del changed.graph.value_info[:]
            onnx.checker.check_model(changed)
            same_inputs = list(model.graph.input) == list(changed.graph.input)
            error = pass_difference(model, changed, probes if same_inputs else ())
            error = error if same_inputs else None
            if one.tolerance is None:
                pass
            elif error is None:
                refused = "it changes what the inputs are, so it can't be verified"
            elif not error <= one.tolerance:
                refused = f"it changes outputs by {error:.1e} (relative), allowed are {one.tolerance:.0e}"
        else:
            refused = "nothing to do"
    except PassRefused as reason:
        refused = str(reason)
    except (onnx.checker.ValidationError, UnsupportedModelError) as reason:
        refused = f"the graph would not be valid: {' '.join(str(reason).split())[:200]}"
    kept = model if refused else changed
    if refused:
        logger.info("pass %s refused: %s", one.name, refused)
    after = (len(kept.graph.node), kept.ByteSize())
    seconds = time.perf_counter() - begin
    sizes = (before[0], after[0]), (before[1], after[1])
    return kept, PassResult(one.name, 0 if refused else changes, *sizes, error, round(seconds, 4), refused)


def pass_difference(before: onnx.ModelProto, after: onnx.ModelProto, probes: Sequence[Tensors]) -> float:
    """The largest relative difference of an output that both have, with the engine's own optimisations off.

    Raises PassRefused where one of them fails on a probe, as graphs do that random numbers are no valid inputs of.
    """
    produced = {output.name for output in after.graph.output}
    shared = [output.name for output in before.graph.output if output.name in produced]
    first, second = evaluator(before), evaluator(after)
    worst = 0.0
    for inputs in probes:
        try:
            found, wanted = second(shared, inputs), first(shared, inputs)
        except Exception as reason:  # engines have exceptions of their own
            raise PassRefused(
                f"it can't be verified, as the graph fails on inputs tried: {' '.join(str(reason).split())[:200]}"
            ) from reason
        for a, b in zip(found, wanted, strict=True):
            worst = max(worst, relative_difference(np.asarray(a), np.asarray(b)))
    return worst


def evaluator(model: onnx.ModelProto) -> Callable[[list[str], Tensors], list[Any]]:
    """What computes named outputs of a graph: ONNX Runtime, or ONNX's own reference implementation for a graph that
    holds bfloat16, which ONNX Runtime has no operators for on a CPU. Raises UnsupportedModelError."""
    if any(item.data_type == onnx.TensorProto.BFLOAT16 for item in model.graph.initializer):
        from onnx.reference import ReferenceEvaluator

        reference = ReferenceEvaluator(model)
        return lambda names, inputs: list(reference.run(names, inputs))
    session = plain_session(model)
    return lambda names, inputs: list(session.run(names, inputs))


def plain_session(model: onnx.ModelProto | Path, *, optimised: bool = False) -> ort.InferenceSession:
    """ONNX Runtime on the CPU, without its optimisations unless `optimised` (or it would saturate on this processor), and without the
    one that changes what is computed.

    Raises UnsupportedModelError.
    """
    options = ort.SessionOptions()
    if host().saturates:
        options.add_session_config_entry(EXACT_BYTES, "1")
        optimised = optimised or computes_on_bytes(read_graph(model) if isinstance(model, Path) else model)
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(
            session_source(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=[ROUNDS_WEIGHTS]
        )
    except Exception as error:
        raise UnsupportedModelError(" ".join(str(error).split())[:400]) from error


class GraphEditor:
    """Lookups that rewrites need: who makes a tensor, who reads it, constant values; and safe replacement."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.constants = {item.name: item for item in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.refresh()

    def refresh(self) -> None:
        """Read the graph again after nodes changed."""
        self.maker: dict[str, onnx.NodeProto] = {name: node for node in self.graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def value(self, name: str) -> np.ndarray[Any, Any] | None:
        """The constant called `name`, or None."""
        item = self.constants.get(name)
        return None if item is None else onnx.numpy_helper.to_array(item)

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor that is no output of the graph; None where there are others."""
        readers: list[onnx.NodeProto] = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def set_value(self, name: str, value: np.ndarray[Any, Any]) -> None:
        """Replace or add a constant."""
        item = onnx.numpy_helper.from_array(np.asarray(value, order="C"), name)
        if name in self.constants:
            self.constants[name].CopyFrom(item)
        else:
            self.graph.initializer.append(item)
            self.constants[name] = self.graph.initializer[-1]

    def redirect(self, old: str, new: str) -> None:
        """Every reader of `old` reads `new`."""
        for node in self.graph.node:
            for place, name in enumerate(node.input):
                if name == old:
                    node.input[place] = new

    def bypass(self, node: onnx.NodeProto) -> bool:
        """Take out a node that hands its first input on; False where both ends are the graph's own names."""
        source, target = node.input[0], node.output[0]
        if target not in self.outputs:
            self.redirect(target, source)
        else:
            maker = self.maker.get(source)
            if maker is None or source in self.outputs:
                return False
            maker.output[list(maker.output).index(source)] = target
            self.redirect(source, target)
        self.graph.node.remove(node)
        self.refresh()
        return True


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value, or `default`."""
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with constants folded, dead nodes gone and every node named once: what quantizers start from."""
    from shared_runtime.graph.passes.simplify import ConstantFolding, DeadCode

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    ConstantFolding().apply(copy)
    DeadCode().apply(copy)
    used: set[str] = set()
    for index, node in enumerate(copy.graph.node):
        if not node.name or node.name in used:
            node.name = f"{node.op_type}_{index}"
        used.add(node.name)
    return copy
