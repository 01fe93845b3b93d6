"""OpenVINO on the CPU, held to the precision that was asked for: left alone it computes in bfloat16 on some CPUs."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import logging
import lzma
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.backends.base import Availability, Executable, precision_of, refuse_foreign, refuse_unknown_mode, zero_rows
from shared_runtime.backends.openvino_mends import FUSING, NO_FUSING, fills_bytes, in_float, mend, safe, unsteady
from shared_runtime.backends.signal_stack import signal_stack_kept
from shared_runtime.backends.streams import StreamedExecutable
from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError
from shared_runtime.graph.check import has_subgraphs
from shared_runtime.host import host
from shared_runtime.model import Model
from shared_runtime.signature import Tensors
from shared_runtime.variants import FLOAT, Variant

logger = logging.getLogger(__name__)
HINTS = {FLOAT: "f32", "bfloat16": "bf16", "float16": "f16"}
UNPACK: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}
"""How a network's description is read; variants of earlier versions have it in .gz."""
MOST_SHAPES = 6
NO_REGISTERS = "Not enough gp registers"
SOURCE_PLACES = re.compile(r"^Exception from \S+:$|^Check '.*' failed at \S+:$|^(FrontEnd API failed with )?\w*Failure:$", re.MULTILINE)
READ = "import sys, openvino; core = openvino.Core(); core.compile_model(core.read_model(sys.argv[1]), 'CPU')"
"""What is tried in a process of its own."""


class OpenVinoExecutable:
    """A compiled model for any shape, and one more for each shape it was prepared for; an infer request a thread.

    The one for any shape is compiled by `prepare_any`, or when a shape comes that was not prepared for; where its numbers would
    depend on earlier shapes, it computes INT8 in float.
    """

    device = "cpu"

    def __init__(self, network: Any, properties: dict[str, str], outputs: list[str], precision: str) -> None:
        self._network, self._properties, self._outputs, self.precision = network, properties, outputs, precision
        self._lock = threading.Lock()
        self._any: Any = None
        if not network.is_dynamic():
            self._general()
        self._prepared: dict[tuple[Any, ...], Any] = {}
        self._local = threading.local()

    def run(self, inputs: Tensors) -> Tensors:
        if (empty := zero_rows(self, inputs)) is not None:
            return empty
        try:
            results = self._request(inputs).infer(inputs, share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            shapes = {name: list(value.shape) for name, value in inputs.items()}
            raise UnsupportedModelError(f"OpenVINO failed on inputs of shape {shapes}: {reason(error)}") from error
        return {name: np.array(results[index]) for index, name in enumerate(self._outputs)}

    def run_at_once(self, parts: Sequence[Tensors]) -> list[Tensors]:
        """The outputs of several requests that run side by side, as far as the engine has streams."""
        requests = [self._request(part, place) for place, part in enumerate(parts)]
        try:
            for request, part in zip(requests, parts, strict=True):
                request.start_async(part, share_inputs=True)
            for request in requests:
                request.wait()
        except RuntimeError as error:
            raise UnsupportedModelError(f"OpenVINO failed on {len(parts)} parts: {reason(error)}") from error
        return [{name: np.array(r.get_output_tensor(i).data) for i, name in enumerate(self._outputs)} for r in requests]

    def specialise(self, inputs: Tensors) -> None:
        """Compile for exactly these shapes: the engine plans better when it knows them."""
        key = _shapes(inputs)
        if key in self._prepared or len(self._prepared) >= MOST_SHAPES or not self._network.is_dynamic():
            return
        self._prepared[key] = _compile(self._network.clone(), self._properties, {name: list(v.shape) for name, v in inputs.items()})

    def prepare_any(self) -> None:
        """Compile for any shape now, so that no request pays for it; it holds the weights once more."""
        self._general()

    def nodes(self, inputs: Tensors) -> dict[str, int]:
        """Operators of the compiled graph, by the implementation that runs them."""
        compiled = next(iter(self._prepared.values()), None) or self._general()
        kinds = (dict(op.get_rt_info()) for op in compiled.get_runtime_model().get_ordered_ops())
        return dict(Counter(str(k["runtimePrecision"].astype(str)) for k in kinds if "runtimePrecision" in k))

    def close(self) -> None:
        self._prepared.clear()
        del self._any, self._network
        self._local = threading.local()

    def _request(self, inputs: Tensors, place: int = 0) -> Any:
        key = _shapes(inputs) if self._prepared else None
        if key not in self._prepared:
            key = None
        requests = self._local.__dict__.setdefault("requests", {})
        if (key, place) not in requests:
            compiled = self._general() if key is None else self._prepared[key]
            requests[key, place] = compiled.create_infer_request()
        return requests[key, place]

    def _general(self) -> Any:
        with self._lock:
            if self._any is None:
                network, properties = self._network, self._properties
                if unsteady(network):
                    logger.info("INT8 is computed in float for sizes that were not planned: here its numbers would depend on earlier sizes")
                    network = network.clone()
                    properties = properties | in_float(network)
                self._any = _compile(network, properties)
            return self._any


def _shapes(inputs: Tensors) -> tuple[Any, ...]:
    return tuple((name, inputs[name].shape) for name in sorted(inputs))


def _compile(network: Any, properties: dict[str, str], shapes: dict[str, list[int]] | None = None) -> Any:
    """Raises UnsupportedModelError where OpenVINO can't, BackendUnavailableError where it would compute in another precision."""
    import openvino

    try:
        if shapes:
            network.reshape(shapes)
        with signal_stack_kept():
            compiled = openvino.Core().compile_model(network, "CPU", properties)
    except RuntimeError as error:
        if NO_REGISTERS in str(error) and FUSING not in properties:  # for what it fuses into one kernel (AMX)
            return _compile(network, properties | NO_FUSING)
        raise UnsupportedModelError(f"OpenVINO can't compile {network.get_friendly_name()!r}: {reason(error)}") from error
    hint = "INFERENCE_PRECISION_HINT"
    chosen = str(compiled.get_property(hint).get_type_name())
    if chosen != properties[hint]:
        name = network.get_friendly_name()
        raise BackendUnavailableError(f"OpenVINO would compute {name!r} in {chosen}; {properties[hint]} was asked for")
    return compiled


class OpenVinoBackend:
    """The backend `openvino`."""

    name = "openvino"
    requires = "openvino"
    devices = ("cpu",)
    planned = ("cpu",)

    def availability(self, device: str) -> Availability:
        if importlib.util.find_spec("openvino") is None:
            return Availability(lacks="the package openvino (pip install openvino)")
        return Availability(version=importlib.metadata.version("openvino"))

    def modes(self, device: str) -> tuple[str, ...]:
        return ("", "streams")

    def compile(self, model: Model, device: str, threads: int, variant: Variant | None = None, mode: str = "") -> Executable:
        if lacks := self.availability(device).lacks:
            raise BackendUnavailableError(f"OpenVINO lacks {lacks}")
        refuse_foreign(self.name, device, variant)
        refuse_unknown_mode(self.name, device, mode, self.modes(device))
        graph = model.graph if variant is None else variant.graph(model.graph)
        rest = FLOAT if variant is None else variant.facts.rest
        outputs = [spec.name for spec in model.signature.outputs]
        streams = threads if mode == "streams" else 1
        executable = compile_graph(model.name, graph, outputs, threads, rest, precision_of(variant), streams)
        return executable if streams == 1 else StreamedExecutable(executable, streams, model.signature, model.name)


def compile_graph(
    name: str, graph: Path | Any, outputs: list[str], threads: int, rest: str, precision: str, streams: int = 1
) -> OpenVinoExecutable:
    """Compile an ONNX file, a file of `save_network` or an `openvino.Model`; what is not quantized computes in `rest`.

    Raises UnsupportedModelError where OpenVINO can't load it, BackendUnavailableError where it would compute in another precision.
    """

    properties = {
        "INFERENCE_PRECISION_HINT": HINTS[rest],
        "EXECUTION_MODE_HINT": "ACCURACY" if rest == FLOAT else "PERFORMANCE",
        "INFERENCE_NUM_THREADS": str(threads),
        **({"PERFORMANCE_HINT": "LATENCY"} if streams == 1 else {"NUM_STREAMS": str(streams)}),
    }
    try:
        network = read_network(graph) if isinstance(graph, Path) else graph
    except (RuntimeError, OSError, EOFError, lzma.LZMAError) as error:
        raise UnsupportedModelError(f"OpenVINO can't load {name!r}: {reason(error)}") from error
    network.set_friendly_name(name)
    mend(network)
    if host().saturates and fills_bytes(network):
        properties |= in_float(network)  # its kernels would saturate
    return OpenVinoExecutable(network, properties | safe(network), outputs, precision)


def reason(error: BaseException) -> str:
    """What OpenVINO says went wrong, on one line, without the places in its source code that it says it at."""
    text = str(error)
    said = text.rpartition("Summary:")[2] if "Summary:" in text else SOURCE_PLACES.sub("", text)
    return " ".join(said.replace("-- ", "").split())[:400] or " ".join(text.split())[:400]


@lru_cache(maxsize=64)
def _killer(path: Path, changed: int) -> int:
    """The signal that ends a process in which OpenVINO reads and compiles a graph, or 0: some loops (ONNX's Scan) do that to it."""
    ended = subprocess.run([sys.executable, "-c", READ, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return max(0, -ended.returncode)


def save_network(network: Any, path: Path) -> None:
    """Write an `openvino.Model`: its description to `path` (.xml.xz: plain, it may outweigh small weights), its weights beside."""
    import openvino

    plain = path.with_suffix("")
    openvino.save_model(network, str(plain), compress_to_fp16=False)
    path.write_bytes(lzma.compress(plain.read_bytes()))
    plain.unlink()


def read_network(path: Path) -> Any:
    """An `openvino.Model` from what `save_network` wrote, or from any file that OpenVINO reads.

    Raises RuntimeError as it does, UnsupportedModelError where it would crash."""
    import openvino

    if path.suffix not in UNPACK:
        if path.suffix == ".onnx" and has_subgraphs(path) and (signal := _killer(path, path.stat().st_mtime_ns)):
            raise UnsupportedModelError(f"OpenVINO would end this process by signal {signal} when it reads {path.name}")
        return openvino.Core().read_model(str(path))
    weights = np.fromfile(path.with_suffix("").with_suffix(".bin"), np.uint8)
    return openvino.Core().read_model(UNPACK[path.suffix](path.read_bytes()), weights.tobytes())
