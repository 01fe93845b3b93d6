"""Run as a process of its own: the peak memory of one way to run a model, as JSON on standard output."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path


def main() -> None:
    """Compile, run one row, and print the peak over what the imports took [MiB]."""
    facts = json.loads(sys.argv[1])
    import shared_runtime as rt
    from shared_runtime.backends.base import backends, specialise

    graph = Path(facts["graph"])
    model = rt.load(graph.parent if (graph.parent / "card.toml").is_file() else graph)
    backend = backends()[facts["backend"]]
    backend.availability(facts["device"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    variant = None if facts["variant"] == "float32" else model.variant(facts["variant"])
    executable = backend.compile(model, facts["device"], facts["threads"], variant, facts["mode"])
    probe = model.random()
    specialise(executable, probe)
    executable.run(probe)
    print(json.dumps({"peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}))


if __name__ == "__main__":
    main()
