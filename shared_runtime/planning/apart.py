"""Planning in a process of its own, so that engines which are only tried leave nothing in this one's memory."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shared_runtime.errors import BackendUnavailableError, SharedRuntimeError
from shared_runtime.planning.plan import Plan

if TYPE_CHECKING:
    from shared_runtime.model import Model


class _Answer(msgspec.Struct):
    plan: Plan | None = None
    error: str = ""


def plan_apart(model: Model, device: str, threads: int, asked: dict[str, Any]) -> Plan:
    """As `plan_and_compile` with the arguments `asked`, the plan alone. Raises BackendUnavailableError with the reason of the process."""
    with tempfile.TemporaryDirectory(prefix="triscope-plan-") as folder:
        question, answer = Path(folder) / "question", Path(folder) / "answer"
        question.write_bytes(pickle.dumps((model, device, threads, asked)))
        command = [sys.executable, "-m", "shared_runtime.planning.apart", str(question), str(answer)]
        process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        found = msgspec.json.decode(answer.read_bytes(), type=_Answer) if answer.is_file() else _Answer()
    if found.plan is None:
        why = found.error or f"its process ended with {process.returncode}: {process.stderr.strip()[-300:]}"
        raise BackendUnavailableError(f"{model.name!r} could not be planned: {why}")
    return found.plan


def main() -> None:
    """Read the question, plan without a cache, write the answer."""
    from shared_runtime.planning.planner import plan_and_compile

    model, device, threads, asked = pickle.loads(Path(sys.argv[1]).read_bytes())
    try:
        answer = _Answer(plan_and_compile(model, device, threads, None, apart=False, **asked)[0])
    except SharedRuntimeError as error:
        answer = _Answer(error=str(error))
    Path(sys.argv[2]).write_bytes(msgspec.json.encode(answer))


if __name__ == "__main__":
    main()
