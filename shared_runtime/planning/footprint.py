"""The peak memory of one way to run a model, measured in a process of its own."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from shared_runtime.errors import BackendUnavailableError
from shared_runtime.planning.plan import Candidate
from shared_runtime.signature import Tensors
from shared_runtime.variants import FLOAT, Variant, VariantFacts

if TYPE_CHECKING:
    from shared_runtime.model import Model


RUNS = 3
"""Some engines hold more from the second run on."""


class Footprint(msgspec.Struct, frozen=True):
    """What the process is asked: the graph, the way to run it, the variant's facts and folder, and the inputs' shapes."""

    graph: str
    candidate: Candidate
    facts: VariantFacts | None
    folder: str
    dims: dict[str, int]


def peak_memory_mib(model: Model, candidate: Candidate, inputs: Tensors | None = None) -> float:
    """Peak resident memory of a fresh process that loads the candidate and runs one row, over one that only imports [MiB].

    The row is as large as `inputs`, or as `model.random()`. Raises BackendUnavailableError where the process fails.
    """
    variant = None if candidate.variant == FLOAT else model.variant(candidate.variant)
    asked = Footprint(
        str(model.graph.resolve()),
        candidate,
        None if variant is None else variant.facts,
        "" if variant is None else str(variant.folder.resolve()),
        model.signature.dims_of(inputs or model.random()),
    )
    command = [sys.executable, "-m", "shared_runtime.planning.footprint", msgspec.json.encode(asked).decode()]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if answer.returncode:
        raise BackendUnavailableError(f"the memory of {candidate.label} could not be measured: {answer.stderr.strip()[-300:]}")
    return float(json.loads(answer.stdout)["peak_mib"])


def main() -> None:
    """Compile, run one row a few times, and print the peak over what the imports took."""
    asked = msgspec.json.decode(sys.argv[1], type=Footprint)
    from shared_runtime.backends.base import backends, specialise
    from shared_runtime.host import peak_resident_mib
    from shared_runtime.model import load

    backend = backends()[asked.candidate.backend]
    if importlib.util.find_spec(backend.name) is not None:
        importlib.import_module(backend.name)  # its import is not the model's memory
    graph = Path(asked.graph)
    before = peak_resident_mib()
    model = load(graph.parent if (graph.parent / "card.toml").is_file() else graph)
    variant = None if asked.facts is None else Variant(asked.facts, Path(asked.folder))
    executable = backend.compile(model, asked.candidate.device, asked.candidate.threads, variant, asked.candidate.mode)
    probe = model.signature.random(dims=asked.dims)
    specialise(executable, probe)
    for _ in range(RUNS):
        executable.run(probe)
    print(json.dumps({"peak_mib": peak_resident_mib() - before}))


if __name__ == "__main__":
    main()
