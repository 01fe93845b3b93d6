"""Which reduced forms of a model this host's engines know, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx

from shared_runtime.backends.base import backends
from shared_runtime.host import host
from shared_runtime.model import Model
from shared_runtime.quantization.forms import Form
from shared_runtime.quantization.samples import SampleStore
from shared_runtime.variants import DYNAMIC

if TYPE_CHECKING:
    from shared_runtime.quantization.openvino_int8 import OpenVinoInt8

PRECISIONS = ("int8", "bfloat16", "float16", "tf32", "float8")


@dataclass(frozen=True)
class FormMaker:
    """A named form; `make` yields it with one way of calibration after another, for as long as the guard asks."""

    name: str
    precision: str
    make: Callable[[SampleStore], Iterator[Form]]


def forms_for(model: Model, device: str, precisions: Sequence[str]) -> list[FormMaker]:
    """The forms to try on `device` ("auto", "cpu" or "cuda")."""
    made: list[FormMaker] = []
    if device in ("auto", "cpu"):
        made += _cpu(model)
    if device in ("auto", "cuda"):
        made += _cuda(model)
    return [maker for maker in made if maker.precision in precisions]


def _cpu(model: Model) -> list[FormMaker]:
    from shared_runtime.quantization import onnxruntime_int8, openvino_int8

    made = []
    kinds = {node.op_type for node in onnx.load(str(model.graph), load_external_data=False).graph.node}
    layered = bool(kinds & {*onnxruntime_int8.STATIC_KINDS, "LSTM"})
    half = bool({"avx512_bf16", "amx_bf16"} & set(host().vector))
    if layered:
        ready: dict[str, openvino_int8.OpenVinoInt8] = {}
        made.append(FormMaker("int8-openvino", "int8", lambda data: _openvino(model, data, "float32", ready)))
        if half:
            made.append(FormMaker("int8-bfloat16-openvino", "int8", lambda data: _openvino(model, data, "bfloat16", ready)))
    if layered:
        if kinds & set(onnxruntime_int8.STATIC_KINDS):
            made.append(FormMaker("int8-onnxruntime", "int8", lambda data: _static(model, data)))
        if kinds & set(onnxruntime_int8.DYNAMIC_KINDS) and not kinds & {"Conv", "ConvTranspose"}:
            made.append(FormMaker(DYNAMIC, "int8", lambda data: one(onnxruntime_int8.DynamicInt8(model))))
        made.append(FormMaker("int8-weights", "int8", lambda data: one(onnxruntime_int8.WeightOnlyInt8(model))))
    if half:
        made.append(FormMaker("bfloat16-openvino", "bfloat16", lambda data: one(openvino_int8.EnginePrecision(model, "bfloat16"))))
    return made


def one(form: Form) -> Iterator[Form]:
    """A form that has one way of being made."""
    yield form


def _openvino(model: Model, data: SampleStore, rest: str, ready: dict[str, OpenVinoInt8]) -> Iterator[Form]:
    """By one calibration after another; `ready` keeps what was calibrated for the same network with another rest."""
    from shared_runtime.quantization.openvino_int8 import OpenVinoInt8

    for method in ("minmax", "percentile"):
        if method not in ready:
            ready[method] = OpenVinoInt8(model, data, method)
        yield ready[method].with_rest(rest)


def _static(model: Model, data: SampleStore) -> Iterator[Form]:
    from shared_runtime.quantization.onnxruntime_int8 import StaticInt8

    for method in ("minmax", "percentile"):
        yield StaticInt8(model, data, method)
    if host().saturates:  # weights of half the range lose too much; of the whole range they take kernels that are exact and slower
        yield StaticInt8(model, data, half=False)


def _cuda(model: Model) -> list[FormMaker]:
    if "torch" not in backends() or not backends()["torch"].availability("cuda").available:
        return []
    from shared_runtime.quantization.gpu import PRODUCTS, Float8, Float16, Tf32

    made = [
        FormMaker("float16-torch", "float16", lambda data: one(Float16(model, data))),
        FormMaker("tf32-torch", "tf32", lambda data: one(Tf32(model))),
    ]
    if Float8.supported() and any(node.op_type in PRODUCTS for node in onnx.load(str(model.graph), load_external_data=False).graph.node):
        made.append(FormMaker("float8-torch", "float8", lambda data: one(Float8(model, data))))
    return made
