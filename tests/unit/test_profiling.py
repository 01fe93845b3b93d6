"""The profiler, the tracer, fused regions, and the plan's own account of itself."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shared_runtime as rt
from shared_runtime.backends.base import backends
from shared_runtime.graph.cost import graph_cost
from shared_runtime.planning import contenders
from shared_runtime.planning.measure import Timed, interleave, paired_ratio
from shared_runtime.planning.objective import energy_counter
from shared_runtime.telemetry.trace import Tracer
from tests.conftest import absent
from tests.networks import classifier


@pytest.mark.parametrize("device_backend", ["onnxruntime", "openvino"])
def test_a_profile_accounts_for_the_whole_run(device_backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = contenders._ways
    monkeypatch.setattr(contenders, "_ways", lambda *asked: (way for way in every(*asked) if way[0].name == device_backend))
    model = rt.load("hippocampus-t1")
    with rt.Session(model, threads=2, plans=tmp_path, ladder=(1,), budget_s=1.0) as session:
        assert session.plan.backend == device_backend
        found = rt.profile(session, runs=2)
    assert sum(operator.share for operator in found.operators) == pytest.approx(1.0, abs=1e-6)
    assert 0.3 * found.wall_ms < sum(operator.mean_ms for operator in found.operators) < 3 * found.wall_ms
    heaviest = max(found.operators, key=lambda operator: operator.mean_ms)
    assert heaviest.operations > 1e8
    assert 0 < heaviest.share_of_bound <= 1
    assert len(heaviest.__struct_fields__) >= 12
    found.chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(events) == len(found.operators)
    assert json.dumps(found.json())
    assert heaviest.name[:20] in found.table()


def test_the_fused_kernel_says_what_its_operators_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacks := backends()["fused"].availability("cpu").lacks:
        absent(f"the fused kernel lacks {lacks}")
    every = contenders._ways
    monkeypatch.setattr(contenders, "_ways", lambda *asked: (way for way in every(*asked) if way[0].name in ("onnxruntime", "fused")))
    with rt.Session(rt.load("fraud-sequence"), threads=1, plans=tmp_path, ladder=(1,), budget_s=1.0) as session:
        if session.plan.backend != "fused":
            pytest.skip(f"here another one is faster: {session.plan.why}")
        found = rt.profile(session, runs=20)
    assert [o.kind for o in sorted(found.operators, key=lambda o: -o.mean_ms)[:3]] == ["LSTM"] * 3
    assert 0.2 * found.wall_ms < sum(o.mean_ms for o in found.operators) < 3 * found.wall_ms


def test_costs_are_those_of_the_arithmetic(tmp_path: Path) -> None:
    model = rt.load(classifier(tmp_path / "c.onnx", False))
    cost = graph_cost(model.graph, model.signature.random(5))
    by_name = {node.name: node for node in cost.nodes}
    assert by_name["filter"].operations == 2 * 5 * 192 * 4
    assert by_name["spread"].operations == 2 * 5 * 3 * 64 * 27
    assert by_name["filter"].weight_bytes == 192 * 4 * 4
    assert cost.unknown == ()


def test_the_tracer_keeps_nesting_errors_and_threads(tmp_path: Path) -> None:
    tracer = Tracer(most=5)

    @tracer
    def inner() -> None:
        np.ones(10).sum()

    @tracer
    def outer(fail: bool) -> None:
        inner()
        if fail:
            raise ValueError

    outer(False)
    with pytest.raises(ValueError):
        outer(True)
    thread = threading.Thread(target=inner)
    thread.start()
    thread.join()
    spans = tracer.spans()
    assert [span.name.rpartition(".")[2] for span in spans] == ["inner", "outer", "inner", "outer", "inner"]
    assert spans[0].parent.endswith("outer")
    assert spans[4].parent == ""
    assert spans[3].error == "ValueError"
    assert spans[4].thread != spans[0].thread
    inner()
    assert len(tracer.spans()) == 5
    tracer.chrome_trace(tmp_path / "t.json")
    assert len(json.loads((tmp_path / "t.json").read_text())["traceEvents"]) == 5
    assert "outer" in tracer.table()


def test_a_coroutine_is_traced_until_it_is_done_and_a_generator_refused() -> None:
    tracer = Tracer()

    @tracer
    async def inner() -> int:
        await asyncio.sleep(0.05)
        return 3

    @tracer
    async def outer() -> int:
        return sum(await asyncio.gather(inner(), inner()))

    assert asyncio.run(outer()) == 6
    assert [span.parent.rpartition(".")[2] for span in tracer.spans()] == ["outer", "outer", ""]
    assert min(span.duration_us for span in tracer.spans()) > 45_000
    with pytest.raises(TypeError, match="is a generator"):

        @tracer
        def lines() -> Iterator[int]:
            yield 1


def test_an_engine_that_runs_all_in_one_call_is_one_operator(tmp_path: Path) -> None:
    model = rt.load("fraud-boosting")
    with rt.Session(model, threads=1, plans=tmp_path, ladder=(1,), budget_s=1.0) as session:
        if session.plan.backend != "trees":
            pytest.skip(f"here another one is faster: {session.plan.why}")
        found = rt.profile(session, runs=50)
        with pytest.raises(ValueError, match="one run at least"):
            rt.profile(session, runs=0)
    (operator,) = found.operators
    assert operator.kind.startswith("TreeEnsemble")
    assert operator.share == 1.0
    assert operator.operations > 1000
    assert 0.2 * found.wall_ms < operator.mean_ms < 5 * found.wall_ms


@pytest.fixture
def torch_with_compiler() -> Any:
    torch = pytest.importorskip("torch")
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    return torch


def test_a_fused_method_is_one_region_for_every_instance(torch_with_compiler: Any) -> None:
    torch = torch_with_compiler

    class Block(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.norm = torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)

        @rt.fuse
        def forward(self, x: Any) -> Any:
            return torch.relu(self.norm(self.dense(x)))

    network = torch.nn.Sequential(*[Block() for _ in range(10)]).eval()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for rows in range(1, 12):
            x = expected = torch.randn(rows, 8)
            for block in twin:
                expected = Block.forward.__wrapped__(block, expected)
            torch.testing.assert_close(network(x), expected)
    network.train()
    twin.train()
    x = torch.randn(5, 8)
    Block.forward.__wrapped__(twin[0], x)
    network[0](x)
    torch.testing.assert_close(network[0].norm.running_mean, twin[0].norm.running_mean)  # the comparison left no trace
    assert "relu" in str(torch.export.export(network.eval(), (x,)).graph)


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("kind", ["dict", "in place", "infinite", "list", "nothing", "half", "integers", "complex"])
def test_whatever_a_region_takes_and_gives_is_compared(torch_with_compiler: Any, kind: str) -> None:
    torch = torch_with_compiler
    functions: dict[str, Any] = {
        "dict": lambda x: {"a": x + 1, "b": (x * 2, x.sum())},
        "in place": lambda x: x.add_(1) * 2,
        "infinite": lambda x: torch.where(x > 0, x, float("-inf")),
        "list": lambda parts: parts[0] + parts[1],
        "nothing": lambda x: None,
        "half": lambda x: torch.softmax(x @ x.T, 1),
        "integers": lambda x: (x.argmax(1), x > 0),
        "complex": lambda x: torch.fft.fft(x),
    }
    x = torch.randn(6, 8)
    x = x.bfloat16() if kind == "half" else x
    given = [x, x] if kind == "list" else x
    expected = functions[kind](copy.deepcopy(given))
    torch.testing.assert_close(rt.fuse(functions[kind])(given), expected)


def test_a_region_with_random_numbers_is_refused_and_a_fault_of_its_own_is_the_functions(torch_with_compiler: Any) -> None:
    torch = torch_with_compiler
    with pytest.raises(rt.UnsupportedModelError, match="draws random numbers"):
        rt.fuse(lambda x: torch.nn.functional.dropout(x, 0.5))(torch.randn(40, 40))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        rt.fuse(lambda x: x @ x)(torch.randn(2, 3))


def test_a_fused_region_computes_what_the_function_computes(torch_with_compiler: Any) -> None:
    torch = torch_with_compiler

    @rt.fuse
    def region(x: object, scale: float) -> object:
        return torch.nn.functional.gelu(x * scale) + 1

    x = torch.linspace(-2, 2, 64)
    torch.testing.assert_close(region(x, 3.0), torch.nn.functional.gelu(x * 3.0) + 1)
    assert region.__name__ == "region"

    @rt.fuse
    def broken(x: object) -> object:
        if x.sum() > 0:
            print("side effect")
        return x

    with pytest.raises(rt.UnsupportedModelError, match="can't be one region"):
        broken(x)
    with pytest.raises(rt.UnsupportedModelError, match="without one"):
        region(1.0, 2.0)


def test_interleaving_gives_up_the_hopeless_and_pairs_the_rest() -> None:
    quick, slow = Timed(lambda: np.linalg.inv(np.eye(10))), Timed(lambda: np.linalg.inv(np.eye(200)))
    interleave([quick, slow], 0.3)
    assert "times as slow" in slow.out
    assert len(slow.times) < len(quick.times)
    ratio, (low, high) = paired_ratio([2.0, 2.2, 1.8, 2.0], [1.0, 1.0, 1.0, 1.0])
    assert ratio == 2.0
    assert low <= 2.0 <= high


@pytest.mark.parametrize("objective", ["throughput", "memory"])
def test_other_objectives(objective: str, tmp_path: Path) -> None:
    model = rt.load(classifier(tmp_path / "c.onnx", False))
    with rt.Session(model, threads=1, plans=tmp_path / "plans", objective=objective, budget_s=1.0) as session:
        plan = session.plan
    assert plan.objective == objective
    if objective == "memory":
        measured = [c.memory_mib for c in plan.candidates if c.memory_mib is not None]
        assert len(measured) >= 2
        assert plan.candidates[0].memory_mib == min(measured)
        assert any(c.mode == "lean" for c in plan.candidates)
    else:
        rates = [max(t.rows / t.median_ms for t in c.timings) for c in plan.candidates if c.timings]
        assert rates[0] == pytest.approx(max(rates), rel=1e-6)


def test_energy_is_measured_or_its_absence_named(tmp_path: Path) -> None:
    model = rt.load(classifier(tmp_path / "c.onnx", False))
    session = rt.Session(model, "cpu", threads=1, plans=tmp_path / "plans", objective="energy", budget_s=1.0)
    if energy_counter() is None:
        with pytest.raises(rt.BackendUnavailableError, match="RAPL"):
            session.prepare()
    else:
        assert all(c.joules for c in session.prepare().candidates if c.median_ms is not None)
    with pytest.raises(ValueError, match="unknown objective"):
        rt.Session(model, objective="beauty")


def test_the_plan_says_where_operators_ran_and_serves_every_number_of_rows(tmp_path: Path) -> None:
    model = rt.load("fraud-boosting")
    with rt.Session(model, threads=2, plans=tmp_path) as session:
        plan = session.prepare()
        assert sum(plan.nodes.values()) == 2
        assert [rung.rows for rung in plan.ladder] == [1, 8, 32]
        assert any(c.backend == "xgboost" and "bulk rows" in c.lost for c in plan.candidates)
        reference = backends()["onnxruntime"].compile(model, "cpu", 1)
        for rows in (1, 2, 7, 33, 500):
            x = model.signature.random(rows, seed=rows)
            np.testing.assert_allclose(session.run(x)["probability"], reference.run(x)["probability"], atol=1e-5)


def test_the_last_rung_may_be_another_engine(tmp_path: Path) -> None:
    model = rt.load("fraud-boosting")
    with rt.Session(model, threads=1, plans=tmp_path, ladder=(1, 20_000), budget_s=2.0) as session:
        plan = session.prepare()
        assert plan.ladder[-1].rows == 20_000
        assert any(c.backend == "xgboost" and c.timings for c in plan.candidates)
        again = rt.Session(model, threads=1, plans=tmp_path, ladder=(1, 20_000), budget_s=2.0)
        assert again.plan == plan
        again.close()


def test_threads_rest_when_a_run_ends_and_spin_only_where_that_was_measured_to_pay(tmp_path: Path) -> None:
    model = rt.load("texture-features")
    inputs = model.signature.random()
    executable = backends()["onnxruntime"].compile(model, "cpu", 2)
    idle = []
    for _ in range(5):
        executable.run(inputs)
        before = time.process_time()
        time.sleep(0.1)
        idle.append(time.process_time() - before)
    executable.close()
    assert sorted(idle)[2] < 0.01, "of the 40 ms that ONNX Runtime's threads spin by themselves"
    with rt.Session(rt.load("hippocampus-t1"), threads=2, plans=tmp_path / "slow", ladder=(1,), budget_s=0.5) as session:
        spinning = [c for c in session.plan.candidates if c.mode == "spinning"]
        assert [c.lost for c in spinning] == ["one row takes so long that threads need not spin until the next"]
    small = rt.load(classifier(tmp_path / "c.onnx", False))
    with rt.Session(small, threads=2, plans=tmp_path / "fast", ladder=(1,), budget_s=0.5) as session:
        assert any(c.mode == "spinning" and c.timings for c in session.plan.candidates)
