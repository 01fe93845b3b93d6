"""`shared_constants`: a network that runs the same weights twice in OpenVINO, as it is read and with a bias for each layer.

python benchmarks/run.py shared_constants
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import shared_runtime as rt
from shared_runtime.backends.openvino import HINTS, read_network
from shared_runtime.backends.openvino_mends import unshare_constants
from shared_runtime.host import host
from shared_runtime.planning.measure import Timed, interleave, paired_ratio

SECONDS = 20.0
REST_SECONDS = 0.06


def shared_constants() -> dict[str, Any]:
    """`texture-features`, one row, in each precision that this processor computes in."""
    import openvino

    model = rt.load("texture-features")
    inputs = model.signature.random(1, 0)
    results: dict[str, Any] = {}
    for precision, hint in (("float32", HINTS["float32"]), ("bfloat16", HINTS["bfloat16"])):
        properties = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": str(host().cores), "PERFORMANCE_HINT": "LATENCY"}
        racing, copies = [], 0
        for own in (False, True):
            network = read_network(model.graph)
            copies = unshare_constants(network) if own else 0
            network.reshape({name: list(value.shape) for name, value in inputs.items()})
            compiled = openvino.Core().compile_model(network, "CPU", properties)
            if str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()) != hint:
                break
            request = compiled.create_infer_request()
            racing.append(Timed(lambda request=request: request.infer(inputs)))  # type: ignore[misc]
        if len(racing) == 2:
            interleave(racing, SECONDS, hopeless=float("inf"), rest=REST_SECONDS)
            ratio, interval = paired_ratio(racing[0].times, racing[1].times)
            results[precision] = {"copies": copies, "ratio": ratio, "interval": interval, "rounds": len(racing[1].times)}
    return results


def report_lines(load: Callable[[str], Any], where: Callable[[dict[str, Any]], str]) -> list[str]:
    """The page's part on shared constants."""
    if not (found := load("shared_constants")):
        return []
    return [
        "## Layers that share a bias, in OpenVINO",
        "",
        f"`texture-features` reads an image at two sizes with the same weights. One row, {where(found)}; as it is read / with a bias for each layer,",
        "medians of paired rounds with 95 % intervals. INT8 forms have a bias for each layer already.",
        "",
        "| precision | shared / own |",
        "|---|---|",
        *(f"| {name} | {r['ratio']:.2f} ({r['interval'][0]:.2f} to {r['interval'][1]:.2f}) |" for name, r in found["result"].items()),
        "",
    ]


SUITES: dict[str, Callable[[], dict[str, Any]]] = {"shared_constants": shared_constants}
