"""Runs the folds and the final training side by side, one process each, over the devices at hand."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import torch

from apps.medical.errors import InputError
from apps.medical.training.hippocampus import Recipe, read_cases, run_fold


def train_all(data: Path, out: Path, *, number: int, recipe: Recipe, device: str = "auto", final: bool = True) -> None:
    """Cross-validate over `number` folds (0 for none), then or meanwhile train on every case.

    Leaves `foldK.pt|json` and `all.pt` in `out`. On GPUs all runs go at once, spread over the cards; on
    a CPU one after another. Raises InputError for data that can't be learned from, for a number of folds
    that leaves a run without cases, and where there is no GPU that was asked for.
    """
    cases = len(read_cases(data))
    if number == 1 or number > cases:
        raise InputError(f"{number} folds of {cases} cases leave nothing to learn from or to judge; expected 2 to {cases}, or 0 for none")
    out.mkdir(parents=True, exist_ok=True)
    jobs: list[int | None] = [*([None] if final else []), *range(number)]
    cards = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if device == "cuda" and not cards:
        raise InputError("device 'cuda' was asked for and torch sees no GPU; use --device cpu")
    devices = [f"cuda:{i}" for i in range(cards)] or ["cpu"]
    context = multiprocessing.get_context("spawn")
    running = []
    for index, fold in enumerate(jobs):
        threads = 2 if cards else torch.get_num_threads()
        arguments = (data, out, fold, number, recipe, devices[index % len(devices)], threads)
        process = context.Process(target=run_fold, args=arguments)
        process.start()
        running.append(process)
        if not cards:
            process.join()
    for process in running:
        process.join()
    if failed := [p.exitcode for p in running if p.exitcode]:
        raise RuntimeError(f"{len(failed)} of {len(running)} training runs failed (exit codes {failed}); see their output above")
    scores = [entry for k in range(number) for entry in json.loads((out / f"fold{k}.json").read_text())]
    (out / "cross_validation.json").write_text(json.dumps(scores, indent=1))
