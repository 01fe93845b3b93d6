"""The batcher, against a session that notes what it was given."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from onnx import helper

import shared_runtime as rt
from shared_runtime.signature import Tensors
from tests.networks import save

SIGNATURE = rt.Signature((rt.TensorSpec("x", ("batch", "width"), "float32"),), (rt.TensorSpec("y", ("batch",), "float32"),))


class Recorder:
    """Sums each row; can be held back, and can fail."""

    def __init__(self) -> None:
        self.model = rt.Model("sum", Path("none"), SIGNATURE, "0" * 64)
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail = False

    def run(self, inputs: Mapping[str, Any]) -> Tensors:
        self.gate.wait(10)
        self.batches.append(len(inputs["x"]))
        if self.fail:
            raise RuntimeError("engine trouble")
        return {"y": inputs["x"].sum(axis=1)}


def rows(count: int, width: int = 3, start: float = 0.0) -> dict[str, np.ndarray]:
    return {"x": (np.arange(count * width, dtype=np.float32) + start).reshape(count, width)}


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    requests=st.lists(st.tuples(st.integers(0, 23), st.integers(1, 3)), min_size=1, max_size=25),
    max_batch=st.integers(1, 16),
    deadline_ms=st.sampled_from([0.0, 1.0, 20.0]),
)
def test_every_request_gets_its_own_rows_and_no_batch_is_too_large(
    requests: list[tuple[int, int]], max_batch: int, deadline_ms: float
) -> None:
    async def scenario() -> Recorder:
        session = Recorder()
        async with rt.Batcher(session, max_batch=max_batch, deadline_ms=deadline_ms, max_queue=10_000) as batcher:
            inputs = [rows(count, width, 100.0 * i) for i, (count, width) in enumerate(requests)]
            answers = await asyncio.gather(*(batcher.submit(x) for x in inputs))
            for x, answer in zip(inputs, answers, strict=True):
                np.testing.assert_array_equal(answer["y"], x["x"].sum(axis=1))
            assert batcher.statistics.rows == sum(count for count, _ in requests)
            assert sum(batcher.statistics.released.values()) == batcher.statistics.batches
        return session

    session = asyncio.run(scenario())
    assert max(session.batches) <= max_batch


def test_requests_that_wait_together_run_together() -> None:
    async def scenario() -> tuple[Recorder, rt.BatcherStatistics]:
        session = Recorder()
        async with rt.Batcher(session, max_batch=8, deadline_ms=5_000) as batcher:
            await asyncio.gather(*(batcher.submit(rows(1)) for _ in range(8)))
            return session, batcher.statistics

    session, statistics = asyncio.run(scenario())
    assert session.batches == [8]
    assert statistics.released == {"full": 1}


def test_the_deadline_releases_a_lone_request() -> None:
    async def scenario() -> rt.BatcherStatistics:
        async with rt.Batcher(Recorder(), max_batch=8, deadline_ms=10) as batcher:
            await batcher.submit(rows(2))
            return batcher.statistics

    assert asyncio.run(scenario()).released == {"deadline": 1}


def test_other_shapes_end_a_batch() -> None:
    async def scenario() -> tuple[Recorder, rt.BatcherStatistics]:
        session = Recorder()
        async with rt.Batcher(session, max_batch=8, deadline_ms=50) as batcher:
            await asyncio.gather(batcher.submit(rows(2, 3)), batcher.submit(rows(2, 5)))
            return session, batcher.statistics

    session, statistics = asyncio.run(scenario())
    assert session.batches == [2, 2]
    assert statistics.released["shape"] == 1


def test_a_full_queue_refuses_and_forgets_nothing() -> None:
    async def scenario() -> None:
        session = Recorder()
        session.gate.clear()
        async with rt.Batcher(session, max_batch=2, deadline_ms=0, max_queue=4) as batcher:
            first = asyncio.create_task(batcher.submit(rows(2)))
            while batcher.statistics.batches == 0:
                await asyncio.sleep(0.001)
            waiting = [asyncio.create_task(batcher.submit(rows(2))) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(rt.QueueFullError, match="4 rows wait"):
                await batcher.submit(rows(1))
            session.gate.set()
            assert len(await asyncio.gather(first, *waiting)) == 3

    asyncio.run(scenario())


def test_closing_waits_for_nobody_who_gave_up() -> None:
    async def scenario() -> Recorder:
        session = Recorder()
        async with rt.Batcher(session, deadline_ms=60_000) as batcher:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(batcher.submit(rows(2)), 0.01)
        with pytest.raises(rt.BatcherClosedError, match="make a new one"):
            async with batcher:
                raise AssertionError
        return session

    assert asyncio.run(asyncio.wait_for(scenario(), 10)).batches == []


def test_a_cancelled_request_is_not_run() -> None:
    async def scenario() -> list[int]:
        session = Recorder()
        async with rt.Batcher(session, max_batch=8, deadline_ms=40) as batcher:
            gone = asyncio.create_task(batcher.submit(rows(5)))
            kept = asyncio.create_task(batcher.submit(rows(1)))
            await asyncio.sleep(0)
            gone.cancel()
            await kept
        return session.batches

    assert asyncio.run(scenario()) == [1]


def test_an_engine_error_reaches_the_requests_of_its_batch_alone() -> None:
    async def scenario() -> None:
        session = Recorder()
        async with rt.Batcher(session, max_batch=2, deadline_ms=1) as batcher:
            session.fail = True
            with pytest.raises(RuntimeError, match="engine trouble"):
                await batcher.submit(rows(1))
            session.fail = False
            assert len((await batcher.submit(rows(1)))["y"]) == 1

    asyncio.run(scenario())


def test_closing_answers_what_waits_and_refuses_what_comes() -> None:
    async def scenario() -> None:
        batcher = rt.Batcher(Recorder(), max_batch=64, deadline_ms=60_000)
        with pytest.raises(rt.BatcherClosedError):
            await batcher.submit(rows(1))
        async with batcher:
            task = asyncio.create_task(batcher.submit(rows(3)))
            await asyncio.sleep(0)
        assert len((await task)["y"]) == 3
        assert batcher.statistics.released == {"drain": 1}
        with pytest.raises(rt.BatcherClosedError):
            await batcher.submit(rows(1))

    asyncio.run(scenario())


def test_wrong_input_is_refused_before_it_waits() -> None:
    async def scenario() -> None:
        async with rt.Batcher(Recorder(), max_batch=4, deadline_ms=1) as batcher:
            with pytest.raises(rt.InputError, match="float64"):
                await batcher.submit({"x": np.zeros((1, 3))})

    asyncio.run(scenario())


def test_requests_whose_rows_can_not_be_joined_run_one_by_one() -> None:
    """A state counts rows on its second axis, and one output is of the whole request."""

    class Stateful:
        def __init__(self) -> None:
            inputs = (rt.TensorSpec("x", ("batch", 3), "float32"), rt.TensorSpec("state", (2, "batch"), "float32"))
            outputs = (rt.TensorSpec("y", ("batch",), "float32"), rt.TensorSpec("mean", (), "float32"))
            self.model = rt.Model("stateful", Path("none"), rt.Signature(inputs, outputs), "0" * 64)

        def run(self, inputs: Mapping[str, Any]) -> Tensors:
            return {"y": inputs["x"].sum(axis=1) + inputs["state"].sum(axis=0), "mean": inputs["x"].mean()}

    async def scenario() -> None:
        requests = [{"x": np.full((n, 3), n, np.float32), "state": np.full((2, n), 10 * n, np.float32)} for n in (1, 2, 1, 3)]
        async with rt.Batcher(Stateful(), deadline_ms=50) as batcher:
            answers = await asyncio.gather(*(batcher.submit(request) for request in requests))
        for request, answer in zip(requests, answers, strict=True):
            n = len(request["x"])
            assert answer["y"].tolist() == [3 * n + 20 * n] * n
            assert answer["mean"] == n
        assert batcher.statistics.released == {"alone": 4}

    asyncio.run(scenario())


@pytest.mark.parametrize(("operator", "joined"), [("Relu", True), ("Softmax", False)])
def test_requests_are_joined_only_where_no_row_depends_on_another(operator: str, joined: bool, tmp_path: Path) -> None:
    """A softmax over the rows would mix the requests of several users; the names of its dimensions do not tell."""
    node = helper.make_node(operator, ["x"], ["y"], **({"axis": 0} if operator == "Softmax" else {}))
    path = save(tmp_path / "one.onnx", [node], {}, {"x": ["batch", 4]}, {"y": ["batch", 4]})
    requests = [{"x": np.random.default_rng(n).standard_normal((n, 4)).astype(np.float32)} for n in (1, 2, 3)]

    async def scenario() -> None:
        with rt.Session(rt.load(path), plans=tmp_path / "plans", threads=1) as session:
            async with rt.Batcher(session, deadline_ms=50) as batcher:
                answers = await asyncio.gather(*(batcher.submit(request) for request in requests))
            for request, answer in zip(requests, answers, strict=True):
                np.testing.assert_allclose(answer["y"], session.run(request)["y"], rtol=1e-5)
        assert ("alone" in batcher.statistics.released) is not joined
        assert batcher.statistics.batches == (1 if joined else 3)

    asyncio.run(scenario())
