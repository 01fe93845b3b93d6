"""A core for each thread of an engine."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

import shared_runtime as rt
from shared_runtime.backends.base import backends
from shared_runtime.backends.cores import Cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not say which cores a thread may use")


def usable() -> set[int]:
    return os.sched_getaffinity(0)


def test_a_caller_has_the_first_core_while_it_runs_and_the_workers_the_others() -> None:
    before = usable()
    cores = Cores(len(before))
    if len(before) == 1:
        assert cores.workers == ()
        assert cores.run(usable) == before
        return
    assert cores.run(usable) == {min(before)}
    assert usable() == before
    assert set(cores.workers) == before - {min(before)}
    with cores.pool(len(before) - 1, "test") as pool:
        barrier = threading.Barrier(len(before) - 1)
        held = [pool.submit(lambda: (barrier.wait(), usable())[1]) for _ in cores.workers]
        assert sorted(core for future in held for core in future.result()) == sorted(cores.workers)


def test_an_error_leaves_the_caller_its_cores() -> None:
    before = usable()
    with pytest.raises(ZeroDivisionError):
        Cores(len(before)).run(lambda: 1 / 0)
    assert usable() == before


def test_of_several_callers_one_is_held_on_the_first_core() -> None:
    cores = Cores(len(usable()))
    assert cores.run(lambda: cores.run(usable)) == cores.run(usable)
    seen: list[set[int]] = []

    def beside() -> None:
        thread = threading.Thread(target=lambda: seen.append(cores.run(usable)))
        thread.start()
        thread.join()

    before = usable()
    cores.run(lambda: (os.sched_setaffinity(0, before), beside()))
    assert seen == [before]


@pytest.mark.parametrize("threads", [1, 1000])
def test_other_numbers_of_threads_are_the_system_s(threads: int) -> None:
    cores = Cores(threads)
    assert cores.workers == ()
    assert cores.run(usable) == usable()
    with cores.pool(1, "test") as pool:
        assert pool.submit(usable).result() == usable()


def test_a_system_that_refuses_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not allowed")

    count = len(usable())
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert Cores(count).workers == ()
    assert Cores(count).run(usable) == usable()


@pytest.mark.parametrize("name", ["onnxruntime", "fused"])
def test_engines_give_the_caller_its_cores_back(name: str) -> None:
    if not backends()[name].availability("cpu").available:
        pytest.skip(f"{name} is not there")
    model, before = rt.load("fraud-sequence"), usable()
    mode = "streams" if name == "fused" else ""
    executable = backends()[name].compile(model, "cpu", len(before), mode=mode)
    alone = backends()["onnxruntime"].compile(model, "cpu", 1)
    x = model.signature.random(8, 0)
    for _ in range(3):
        np.testing.assert_allclose(executable.run(x)["logit"], alone.run(x)["logit"], atol=1e-4)
    assert usable() == before
    executable.close()


def test_cores_that_were_taken_from_the_process_end_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    cores = Cores(len(usable()))
    monkeypatch.setattr(os, "sched_setaffinity", gone)
    assert cores.run(lambda: 7) == 7
