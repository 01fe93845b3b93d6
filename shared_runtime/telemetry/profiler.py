"""`rt.profile(session)`: where a model's time goes, an operator: times, bytes, arithmetic, and how near it is to the host's bound."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from shared_runtime.graph.check import read_whole
from shared_runtime.graph.cost import NodeCost, graph_cost
from shared_runtime.planning.ceiling import ceiling, gain
from shared_runtime.signature import Tensors
from shared_runtime.variants import FLOAT

if TYPE_CHECKING:
    from shared_runtime.session import Session

RUNS = 5


class OperatorProfile(msgspec.Struct, frozen=True):
    """One operator of the graph that ran. Times are means over the runs; figures of arithmetic and bytes are of one run.

    `bound_ms` is the least time that the host could take for its arithmetic and bytes, `share_of_bound` that over
    the time taken (1 is as fast as this host can be), `limit` which of the two bounds it.
    """

    name: str
    kind: str
    calls: int
    total_ms: float
    mean_ms: float
    share: float
    operations: float
    bytes_read: int
    bytes_written: int
    weight_bytes: int
    gflops: float
    gbytes: float
    intensity: float
    limit: str
    bound_ms: float
    share_of_bound: float
    where: str
    start_us: float


@dataclass(frozen=True)
class Profile:
    """The operators of one session, in the order in which they ran."""

    model: str
    plan: str
    wall_ms: float
    operators: tuple[OperatorProfile, ...]

    def table(self, most: int = 20) -> str:
        """The `most` slowest operators, aligned for reading."""
        rows = sorted(self.operators, key=lambda o: -o.mean_ms)[:most]
        lines = [
            self.plan,
            f"{'operator':40} {'kind':22} {'ms':>9} {'share':>6} {'GFLOP/s':>9} {'GB/s':>7} {'limit':>8} {'of bound':>8}  where",
        ]
        lines += [
            f"{o.name[:40]:40} {o.kind[:22]:22} {o.mean_ms:9.3f} {o.share:6.1%} {o.gflops:9.1f} {o.gbytes:7.1f} {o.limit:>8} "
            f"{o.share_of_bound:8.1%}  {o.where}"
            for o in rows
        ]
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        operators = [msgspec.to_builtins(operator) for operator in self.operators]
        return {"model": self.model, "plan": self.plan, "wall_ms": self.wall_ms, "operators": operators}

    def chrome_trace(self, path: Path | str) -> None:
        """Write a trace for chrome://tracing or Perfetto."""
        events = [
            {
                "name": o.name,
                "cat": o.kind,
                "ph": "X",
                "ts": o.start_us,
                "dur": 1e3 * o.mean_ms,
                "pid": 0,
                "tid": 0,
                "args": {"operations": o.operations, "bytes": o.bytes_read + o.bytes_written, "where": o.where},
            }
            for o in self.operators
        ]
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


@dataclass
class _Timed:
    name: str
    kind: str
    where: str
    calls: int
    seconds: float
    start_us: float


def profile(session: Session, inputs: Mapping[str, Any] | None = None, runs: int = RUNS) -> Profile:
    """Profile a session on `inputs` (those that it was planned on without): the engine's own profile of the plan's first choice, joined
    with the arithmetic and bytes of the graph. An engine that runs the graph in one call gives one operator for all of it."""
    if runs < 1:
        raise ValueError(f"a profile takes one run at least, got {runs}")
    plan, model = session.plan, session.model
    checked = session.probe() if inputs is None else model.signature.check(inputs, model.name)
    begin = time.perf_counter()
    for _ in range(runs):
        session.run(checked)
    wall = 1e3 * (time.perf_counter() - begin) / runs
    graph = model.graph if plan.variant == FLOAT else model.variant(plan.variant).graph(model.graph)
    if plan.backend == "onnxruntime":
        timed, costs = _onnxruntime(model.name, graph, checked, plan.device, plan.threads, runs)
    elif plan.backend == "openvino":
        rest = FLOAT if plan.variant == FLOAT else model.variant(plan.variant).facts.rest
        timed, costs = _openvino(graph, checked, plan.threads, rest, runs), _costs(model.graph, checked)
    elif plan.backend == "fused":
        timed, costs = _fused(graph, checked, runs), _costs(graph, checked)
    elif plan.backend == "torch":
        timed, costs = _torch(graph, checked, plan.device, runs), _costs(graph, checked)
    else:
        timed, costs = _whole(session, graph, checked, runs)
    total = sum(item.seconds for item in timed) or 1e-12
    operators = tuple(_operator(item, costs.get(item.name), total, plan.precision, plan.threads) for item in timed)
    return Profile(model.name, plan.describe(), round(wall, 4), operators)


def _operator(item: _Timed, cost: NodeCost | None, total: float, precision: str, threads: int) -> OperatorProfile:
    best = ceiling()
    mean = item.seconds
    work, read, written, weights = (cost.operations, cost.bytes_read, cost.bytes_written, cost.weight_bytes) if cost else (0.0, 0, 0, 0)
    speed = (best.operations_one if threads == 1 else best.operations) * gain(precision)
    compute, memory = work / speed, (read + written) / best.bytes
    bound = max(compute, memory)
    return OperatorProfile(
        item.name,
        item.kind,
        item.calls,
        round(1e3 * mean * item.calls, 5),
        round(1e3 * mean, 5),
        mean / total,
        work,
        read,
        written,
        weights,
        work / mean / 1e9 if mean else 0.0,
        (read + written) / mean / 1e9 if mean else 0.0,
        work / (read + written) if read + written else 0.0,
        ("compute" if compute >= memory else "memory") if cost else "",
        round(1e3 * bound, 5),
        min(1.0, bound / mean) if mean else 0.0,
        item.where,
        item.start_us,
    )


def _costs(graph: Path, inputs: Tensors) -> dict[str, NodeCost]:
    """Costs by node name, and by the tensor that a node makes: engines that lost the names keep those."""
    if graph.suffix != ".onnx":
        return {}
    proto = read_whole(graph)
    nodes = graph_cost(proto, inputs).nodes
    found = {cost.name: cost for cost in nodes}
    for node, cost in zip(proto.graph.node, nodes, strict=True):
        found.update(dict.fromkeys(node.output, cost))
    return found


def _onnxruntime(name: str, graph: Path, inputs: Tensors, device: str, threads: int, runs: int) -> tuple[list[_Timed], dict[str, NodeCost]]:
    from shared_runtime.backends.onnxruntime import profiled_run

    events = profiled_run(name, graph, inputs, device, threads, runs)
    costs = _costs(graph, inputs)
    timed: dict[str, _Timed] = {}
    for event in events:
        label = event["name"].removesuffix("_kernel_time").removeprefix("fused ")
        known = label if label in costs else label.rsplit("_", 1)[0] if label.rsplit("_", 1)[0] in costs else label
        item = timed.setdefault(known, _Timed(known, event["args"]["op_name"], event["args"]["provider"], 0, 0.0, float(event["ts"])))
        item.calls += 1
        item.seconds += event["dur"] / 1e6
    first = min((item.start_us for item in timed.values()), default=0.0)
    for item in timed.values():
        item.seconds /= runs
        item.calls //= runs
        item.start_us -= first
    return list(timed.values()), costs


def _openvino(graph: Path, inputs: Tensors, threads: int, rest: str, runs: int) -> list[_Timed]:
    import openvino

    from shared_runtime.backends.openvino import HINTS, read_network
    from shared_runtime.backends.openvino_mends import mend, safe
    from shared_runtime.backends.signal_stack import signal_stack_kept

    core = openvino.Core()
    network = read_network(graph)
    mend(network)
    network.reshape({key: list(value.shape) for key, value in inputs.items()})
    properties = {"INFERENCE_PRECISION_HINT": HINTS[rest], "INFERENCE_NUM_THREADS": str(threads), "PERF_COUNT": "YES"}
    with signal_stack_kept():
        request = core.compile_model(network, "CPU", properties | safe(network)).create_infer_request()
    request.infer(inputs)
    timed: dict[str, _Timed] = {}
    for _ in range(runs):
        request.infer(inputs)
        for info in request.profiling_info:
            if info.real_time.total_seconds() == 0.0 and "NOT_RUN" in str(info.status):
                continue
            item = timed.setdefault(info.node_name, _Timed(info.node_name, info.node_type, info.exec_type, 1, 0.0, 0.0))
            item.seconds += info.real_time.total_seconds() / runs
    start = 0.0
    for item in timed.values():
        item.start_us = start
        start += 1e6 * item.seconds
    return list(timed.values())


def _fused(graph: Path, inputs: Tensors, runs: int) -> list[_Timed]:
    from shared_runtime.kernels.fused import _cpu
    from shared_runtime.kernels.fused.lowering import lower

    made = lower(read_whole(graph), {name: value.shape for name, value in inputs.items()})
    program = _cpu.prepare(made.instructions, made.constants, made.scratch, made.sizes, made.work)
    arrays = [inputs[name] for name in made.inputs] + [np.empty(shape, np.float32) for shape in made.outputs.values()]
    _cpu.run(program, *arrays)
    seconds = np.zeros(len(made.instructions))
    for _ in range(runs):
        _cpu.timed(program, seconds, *arrays)
    timed: dict[str, _Timed] = {}
    start = 0.0
    for (name, kind), taken in zip(made.sources, (seconds / runs).tolist(), strict=True):
        timed.setdefault(name, _Timed(name, kind, "cpu", 1, 0.0, start)).seconds += taken
        start += 1e6 * taken
    return list(timed.values())


def _whole(session: Session, graph: Path, inputs: Tensors, runs: int) -> tuple[list[_Timed], dict[str, NodeCost]]:
    """All of a graph as one operator, named after its dearest one."""
    nodes = list({id(cost): cost for cost in _costs(graph, inputs).values()}.values())
    dearest = max(nodes, key=lambda cost: cost.operations, default=None)
    name, kind = (dearest.name, dearest.kind) if dearest else (session.model.name, session.plan.backend)
    sums = (sum(getattr(cost, field) for cost in nodes) for field in ("operations", "bytes_read", "bytes_written", "weight_bytes"))
    session.run(inputs)
    begin = time.perf_counter()
    for _ in range(runs):
        session.run(inputs)
    seconds = (time.perf_counter() - begin) / runs
    return [_Timed(name, kind, session.plan.backend, 1, seconds, 0.0)], {name: NodeCost(name, kind, *sums)}


def _torch(graph: Path, inputs: Tensors, device: str, runs: int) -> list[_Timed]:
    import torch

    from shared_runtime.backends.torch_graph import GraphProgram

    program = GraphProgram(graph, device)
    timed: list[_Timed] = []

    def watch(at: int, kind: str, name: str, seconds: float) -> None:
        if at == len(timed):
            timed.append(_Timed(name, kind, device, 1, 0.0, 0.0))
        timed[at].seconds += seconds / runs

    with torch.inference_mode():
        given = {key: torch.tensor(value, device=device) for key, value in inputs.items()}
        program(given)
        for _ in range(runs):
            program.timed(given, watch)
    start = 0.0
    for item in timed:
        item.start_us = start
        start += 1e6 * item.seconds
    return timed
