"""ONNX Runtime: on the CPU, and on an NVIDIA GPU through its CUDA and TensorRT providers."""

from __future__ import annotations

import ctypes.util
import json
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from shared_runtime.backends.base import Availability, precision_of, refuse_foreign, refuse_unknown_mode, zero_rows
from shared_runtime.backends.cores import Cores
from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError
from shared_runtime.graph.check import EXACT_BYTES, ROUNDS_WEIGHTS, float_between_quantized, session_source
from shared_runtime.host import host
from shared_runtime.model import Model
from shared_runtime.signature import Tensors
from shared_runtime.variants import Variant

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
SMALL_BYTES, MOST_SHAPES = 1 << 16, 4
SMALL_GRAPH = 4 << 20
"""Up to this size a graph is loaded once more for each prepared shape: with its sizes known, nothing is left that computes them."""
TENSORRT = "TensorrtExecutionProvider"
LEAN = "lean"
"""Without memory patterns, for which a second block as large as all activations is held from the second run on; and outputs leave
the engine's arena at once, which would otherwise grow around one that the caller still holds when the next run begins."""

SPINNING = "spinning"
"""As ONNX Runtime is installed: idle threads spin for tens of milliseconds after a run, so that they need not be woken for the
next. It pays for runs below a millisecond or so, and takes the cores of whatever else runs meanwhile."""

Fixed = Callable[[Mapping[str, int]], ort.InferenceSession]


class _Bound:
    """Buffers bound to a session once: a call copies into them and out of them and saves ONNX Runtime's own conversions."""

    def __init__(self, session: ort.InferenceSession, inputs: Tensors, outputs: Tensors) -> None:
        self._inputs = {name: value.copy() for name, value in inputs.items()}
        self._outputs = {name: np.empty_like(value) for name, value in outputs.items()}
        self._shapes = [(name, value, value.shape) for name, value in self._inputs.items()]
        binding = session.io_binding()
        for name, value in self._inputs.items():
            binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        for name, value in self._outputs.items():
            binding.bind_output(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        self._binding, self._run = binding, session._sess.run_with_iobinding
        self._handle = binding._iobinding
        self._lock, self.usable = threading.Lock(), True

    def fits(self, inputs: Tensors) -> bool:
        """Whether the buffers have the shapes of `inputs`."""
        for name, _, shape in self._shapes:  # noqa: SIM110 - a generator would cost as much as the model
            if inputs[name].shape != shape:
                return False
        return True

    def run(self, inputs: Tensors) -> Tensors | None:
        """None where another thread uses the buffers, or the engine can't use them: an output's shape may depend on values."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            for name, buffer, _ in self._shapes:
                buffer[...] = inputs[name]
            self._run(self._handle, None)
            return {name: value.copy() for name, value in self._outputs.items()}
        except RuntimeError:
            self.usable = False
            return None
        finally:
            self._lock.release()


class OnnxRuntimeExecutable:
    """One inference session; ONNX Runtime lets several threads run it at once."""

    def __init__(
        self,
        session: ort.InferenceSession,
        graph: Path,
        device: str,
        precision: str,
        fixed: Fixed | None = None,
        *,
        lean: bool = False,
        cores: Cores | None = None,
    ) -> None:
        """`fixed`: opens the graph once more with named dimensions of one size. `cores`: those of the session's threads."""
        self._session, self._graph, self.device, self.precision, self._fixed = session, graph, device, precision, fixed
        self._lean, self._cores = lean, cores
        self._outputs = [output.name for output in session.get_outputs()]
        self._run = session._sess.run if device == "cpu" else None
        self._bound: list[_Bound] = []

    def specialise(self, inputs: Tensors) -> None:
        """Bind buffers for exactly these shapes, where a call is so short that handing arrays over counts."""
        small = sum(value.nbytes for value in inputs.values()) <= SMALL_BYTES
        if self.device != "cpu" or not small or len(self._bound) >= MOST_SHAPES or any(bound.fits(inputs) for bound in self._bound):
            return
        outputs = self.run(inputs)
        plain = all(value.dtype.kind in "fiub" for value in (*inputs.values(), *outputs.values()))
        if plain and sum(value.nbytes for value in outputs.values()) <= SMALL_BYTES and all(v.size for v in inputs.values()):
            self._bound.append(_Bound(self._session_for(inputs), inputs, outputs))

    def _session_for(self, inputs: Tensors) -> ort.InferenceSession:
        """A session for exactly these shapes where the graph is small and has named dimensions, else the one for all."""
        named = {
            (name, size)
            for item in self._session.get_inputs()
            for name, size in zip(item.shape, inputs[item.name].shape, strict=True)
            if isinstance(name, str)
        }
        sizes = dict(named)
        if self._fixed is None or not sizes or len(sizes) < len(named) or not _small(self._graph):
            return self._session
        try:
            session = self._fixed(sizes)
            session.run(self._outputs, inputs)
        except Exception:  # a graph may contradict what it says of its dimensions, and run all the same where they are not held to
            return self._session
        return session

    def run(self, inputs: Tensors) -> Tensors:
        return self._run_here(inputs) if self._cores is None else self._cores.run(lambda: self._run_here(inputs))

    def _run_here(self, inputs: Tensors) -> Tensors:
        for bound in self._bound:
            if bound.usable and bound.fits(inputs) and (found := bound.run(inputs)) is not None:
                return found
        if (empty := zero_rows(self, inputs)) is not None:  # some of its operators end the process without rows
            return empty
        try:
            return self._through(inputs)
        except Exception as error:
            shapes = {name: list(value.shape) for name, value in inputs.items()}
            raise UnsupportedModelError(f"ONNX Runtime failed on inputs of shape {shapes}: {' '.join(str(error).split())[:400]}") from error

    def _through(self, inputs: Tensors) -> Tensors:
        if self._run is not None:
            outputs = self._run(self._outputs, inputs, None)
            if self._lean:
                outputs = [value.copy() for value in outputs]
            return dict(zip(self._outputs, outputs, strict=True))
        # Inputs and outputs are bound, so that each crosses to the GPU and back once.
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, self.device, 0))
        for name in self._outputs:
            binding.bind_output(name, self.device)
        self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))

    def nodes(self, inputs: Tensors) -> dict[str, int]:
        """Nodes of the optimised graph, by the provider that ran them."""
        events = profiled_run(self._graph.name, self._graph, inputs, self.device, 1)
        return dict(Counter(event["args"]["provider"] for event in events))

    def close(self) -> None:
        self._run = None
        self._bound.clear()
        del self._session


def _small(graph: Path) -> bool:
    """Whether a graph with all its weights, which may lie in files beside it, is up to SMALL_GRAPH large."""
    if graph.stat().st_size > SMALL_GRAPH:
        return False
    import onnx
    from onnx.external_data_helper import uses_external_data

    return not any(uses_external_data(item) for item in onnx.load(str(graph), load_external_data=False).graph.initializer)


class OnnxRuntimeBackend:
    """The backend `onnxruntime`."""

    name = "onnxruntime"
    requires = "onnxruntime (CPU); onnxruntime-gpu, an NVIDIA driver, CUDA and cuDNN libraries (GPU); TensorRT's for the mode 'tensorrt'"
    devices = ("cpu", "cuda")
    planned = ("cpu", "cuda")

    def availability(self, device: str) -> Availability:
        if device == "cpu":
            return Availability(version=ort.__version__)
        if not host().gpus:
            return Availability(lacks="an NVIDIA GPU with its driver (nvidia-smi finds none)")
        if PROVIDERS["cuda"] not in ort.get_available_providers():
            return Availability(lacks="the CUDA provider (install onnxruntime-gpu)")
        return Availability(version=ort.__version__)

    def modes(self, device: str) -> tuple[str, ...]:
        if device == "cpu":
            return ("", SPINNING, LEAN)
        built = TENSORRT in ort.get_available_providers()
        return ("", "tensorrt") if built and ctypes.util.find_library("nvinfer") else ("",)

    def compile(self, model: Model, device: str, threads: int, variant: Variant | None = None, mode: str = "") -> OnnxRuntimeExecutable:
        refuse_foreign(self.name, device, variant)
        refuse_unknown_mode(self.name, device, mode, self.modes(device))
        graph = model.graph if variant is None else variant.graph(model.graph)
        return compile_file(model.name, graph, device, threads, precision_of(variant), mode)


def compile_file(name: str, graph: Path, device: str, threads: int, precision: str, mode: str = "") -> OnnxRuntimeExecutable:
    """An ONNX file made ready. Raises UnsupportedModelError, BackendUnavailableError."""

    cores = Cores(threads) if device == "cpu" and threads > 1 and mode != SPINNING else None

    def fixed(sizes: Mapping[str, int]) -> ort.InferenceSession:
        return _session(name, graph, _options(threads, mode, sizes, cores), device, mode)

    session = _session(name, graph, _options(threads, mode, cores=cores), device, mode)
    return OnnxRuntimeExecutable(session, graph, device, precision, fixed, lean=mode == LEAN, cores=cores)


def _options(threads: int, mode: str = "", sizes: Mapping[str, int] | None = None, cores: Cores | None = None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    options.enable_mem_pattern = mode != LEAN
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    if threads > 1 and mode != SPINNING:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if cores is not None and cores.workers:
        options.add_session_config_entry("session.intra_op_thread_affinities", ";".join(str(core + 1) for core in cores.workers))
    if host().saturates:
        options.add_session_config_entry(EXACT_BYTES, "1")
    return options


def _session(name: str, graph: Path, options: ort.SessionOptions, device: str, mode: str) -> ort.InferenceSession:
    providers: list[Any] = [(PROVIDERS[device], {"use_tf32": "0"} if device == "cuda" else {})]
    if device == "cuda":
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN as pip installs them beside torch
        if mode == "tensorrt":
            providers.insert(0, (TENSORRT, {"trt_fp16_enable": False}))
    try:
        disabled = [ROUNDS_WEIGHTS] if float_between_quantized(graph) else []
        session = ort.InferenceSession(session_source(graph), options, providers=providers, disabled_optimizers=disabled)
    except Exception as error:
        raise UnsupportedModelError(f"ONNX Runtime can't load {name!r}: {error}") from error
    wanted = TENSORRT if mode == "tensorrt" else PROVIDERS[device]
    if session.get_providers()[0] != wanted:
        raise BackendUnavailableError(
            f"ONNX Runtime was asked for {wanted} and would run on {session.get_providers()[0]}: "
            "its CUDA, cuDNN or TensorRT libraries are missing; install them or ask for device='cpu'"
        )
    return session


def profiled_run(name: str, graph: Path, inputs: Tensors, device: str, threads: int, runs: int = 1) -> list[dict[str, Any]]:
    """The events of ONNX Runtime's own profiler over `runs` runs after one warm-up: node times [us], providers, shapes, sizes."""
    with tempfile.TemporaryDirectory() as folder:
        options = _options(threads)
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = _session(name, graph, options, device, "")
        for _ in range(runs + 1):
            session.run(None, inputs)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    starts = sorted(e["ts"] for e in events if e["name"] == "model_run")
    return [e for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time") and e["ts"] >= starts[1]]
