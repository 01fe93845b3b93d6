"""Static memory planning: where each tensor of a graph lies and when, and the peak that follows, before anything is loaded.

Live intervals in the graph's order are packed first-fit-decreasing by size (Pisarchyk and Lee, Efficient Memory
Management for Deep Neural Net Inference, arXiv:2001.03288); the most that is ever live at once is the lower bound.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import onnx

from shared_runtime.errors import MemoryBudgetError
from shared_runtime.graph.check import read_whole
from shared_runtime.graph.cost import tensor_sizes
from shared_runtime.signature import Tensors

if TYPE_CHECKING:
    from shared_runtime.model import Model

logger = logging.getLogger(__name__)
ALIGNMENT = 64
VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})


class Placement(msgspec.Struct, frozen=True):
    """One tensor: its offset and size in the arena [bytes], and the first and last node that need it."""

    tensor: str
    offset: int
    size: int
    first: int
    last: int


class MemoryPlan(msgspec.Struct, frozen=True):
    """The arena of the activations and what stands beside it [bytes]."""

    placements: tuple[Placement, ...]
    arena: int
    lower_bound: int
    weights: int
    interface: int
    unknown: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Planned peak: weights, inputs and outputs, and the arena."""
        return self.weights + self.interface + self.arena

    def describe(self) -> str:
        """One line."""
        mib = [value / 2**20 for value in (self.peak, self.weights, self.interface, self.arena, self.lower_bound)]
        line = "planned peak {:.1f} MiB: weights {:.1f}, inputs and outputs {:.1f}, activations {:.1f} (at least {:.1f})".format(*mib)
        return line + (f"; of unknown size: {', '.join(self.unknown[:3])}" if self.unknown else "")


def plan_memory(graph: Path | onnx.ModelProto, inputs: Tensors) -> MemoryPlan:
    """Place every activation of `graph` for inputs of these shapes. Views (Reshape and its like) share their source's place."""
    model = read_whole(graph) if isinstance(graph, Path) else graph
    shapes, widths = tensor_sizes(model, {name: tuple(value.shape) for name, value in inputs.items()})
    size = {name: math.prod(shape) * widths[name] for name, shape in shapes.items()}
    weights = {item.name for item in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}
    root: dict[str, str] = {}
    intervals: dict[str, list[int]] = {}
    unknown = []
    for index, node in enumerate(model.graph.node):
        for name in node.input:
            source = root.get(name, name)
            if source in intervals:
                intervals[source][1] = index
        for name in filter(None, node.output):
            if node.op_type in VIEWS and node.input[0] not in weights:
                root[name] = root.get(node.input[0], node.input[0])
            elif name in outputs:
                continue
            elif name in size:
                intervals[name] = [index, index]
            else:
                unknown.append(name)
    live = {name: (first, last, _aligned(size[name])) for name, (first, last) in intervals.items() if size[name]}
    placements = _pack(live)
    arena = max((p.offset + p.size for p in placements), default=0)
    interface = sum(size.get(name, 0) for name in (*inputs, *outputs))
    return MemoryPlan(tuple(placements), arena, _most_live(live), sum(size[name] for name in weights), interface, tuple(unknown))


def within_budget(model: Model, budget_mib: float) -> MemoryPlan:
    """The plan for one row. Raises MemoryBudgetError where its peak is above `budget_mib`."""
    plan = plan_memory(model.graph, model.random())
    logger.info("%s: %s", model.name, plan.describe())
    if plan.peak > budget_mib * 2**20:
        raise MemoryBudgetError(f"{model.name!r} is not loaded: {plan.describe()}; the budget is {budget_mib:.1f} MiB")
    return plan


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pack(live: dict[str, tuple[int, int, int]]) -> list[Placement]:
    """First fit, largest first: the lowest gap among the tensors that are alive at the same time."""
    placed: list[Placement] = []
    for name, (first, last, size) in sorted(live.items(), key=lambda item: (-item[1][2], item[1][0])):
        offset = 0
        for other in sorted((p for p in placed if p.first <= last and first <= p.last), key=lambda p: p.offset):
            if other.offset - offset >= size:
                break
            offset = max(offset, other.offset + other.size)
        placed.append(Placement(name, offset, size, first, last))
    return placed


def _most_live(live: dict[str, tuple[int, int, int]]) -> int:
    steps = {first for first, _, _ in live.values()}
    return max((sum(size for first, last, size in live.values() if first <= step <= last) for step in steps), default=0)
