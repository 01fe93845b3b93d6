"""`rt.rewrite`: chosen graph passes on a model, as a new model; also those that change what goes in and comes out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from shared_runtime.certificate import hash_file
from shared_runtime.errors import ModelError
from shared_runtime.folders import replace_folder
from shared_runtime.graph.check import read_whole
from shared_runtime.graph.passes.base import PassResult, passes, run_pass
from shared_runtime.importers.base import NAME, card_text
from shared_runtime.model import Model, load
from shared_runtime.repository.store import ModelRepository
from shared_runtime.rewritten import valid_inputs
from shared_runtime.signature import Signature


def rewrite(
    model: Model | str | Path,
    steps: Mapping[str, Mapping[str, Any]] | Sequence[str],
    name: str,
    *,
    repository: ModelRepository | None = None,
) -> tuple[Model, list[PassResult]]:
    """Apply passes in order and keep the result in the repository under `name`; what each pass did or why it was refused.

    `steps`: names, or names with options: `{"normalize-input": {"mean": [...], "std": [...]}, "argmax-output": {}}`. Passes
    that are exact are verified numerically. Raises ModelError for an unknown pass, and where every pass was refused.
    """
    loaded = model if isinstance(model, Model) else load(model)
    if not NAME.fullmatch(name):
        raise ModelError(f"{name!r} can't be a model's name; expected letters, digits, '.', '_', '-', starting with a letter or digit")
    if isinstance(steps, str):
        steps = [steps]
    options = dict(steps) if isinstance(steps, Mapping) else {step: {} for step in steps}
    if not options:
        raise ModelError("no pass was named; triscope model passes lists them")
    if unknown := sorted(set(options) - set(passes())):
        raise ModelError(f"there is no pass {unknown[0]!r}; triscope model passes lists them")
    proto, probes, results = read_whole(loaded.graph), [valid_inputs(loaded)], []
    for step, given in options.items():
        proto, result = run_pass(proto, passes()[step], probes, **given)
        results.append(result)
        if result.changes and step.endswith("-input"):
            probes = []  # its inputs are others from here on: later passes are checked for validity alone
    if not any(result.changes for result in results):
        raise ModelError(f"no pass changed {loaded.name!r}: " + "; ".join(f"{r.name}: {r.refused}" for r in results))
    root = (repository or ModelRepository.default()).roots[0]
    root.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        graph = part / "model.onnx"
        onnx.save(proto, graph)
        Signature.from_onnx(graph).write(part / "signature.json")
        done = [result.name for result in results if result.changes]
        facts: dict[str, dict[str, Any]] = {"artefact": {"sha256": hash_file(graph)}, "rewritten": {"from": loaded.sha256, "passes": done}}
        (part / "card.toml").write_text(card_text(name, facts))
        part.chmod(0o755)
        replace_folder(part, root / name)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return load(root / name), results
