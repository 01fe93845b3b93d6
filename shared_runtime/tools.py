"""Every tool of the optimiser by name, with one line: graph passes, quantizers and analyses."""

from __future__ import annotations

import msgspec

from shared_runtime.graph.passes.base import passes


class Tool(msgspec.Struct, frozen=True):
    """`kind`: pass, quantizer or analysis; `engine`: the one whose operators it needs, "" for all."""

    name: str
    kind: str
    summary: str
    engine: str = ""


QUANTIZERS = (
    Tool("int8-openvino", "quantizer", "INT8 weights and activations by NNCF, a scale a channel (min-max, percentile)", "openvino"),
    Tool("int8-bfloat16-openvino", "quantizer", "the same, with bfloat16 for what is not quantized", "openvino"),
    Tool("int8-onnxruntime", "quantizer", "INT8 in QDQ form, a scale a channel (min-max, entropy, percentile)", "onnxruntime"),
    Tool("int8-onnxruntime-operators", "quantizer", "INT8 in operator form (QLinearConv, QLinearMatMul ...)", "onnxruntime"),
    Tool("int8-dynamic", "quantizer", "INT8 weights, activations from each request's own range (matrix products, LSTM)", "onnxruntime"),
    Tool("int8-weights", "quantizer", "INT8 storage of the weights alone, arithmetic in float", "onnxruntime"),
    Tool("bfloat16-openvino", "quantizer", "OpenVINO's own bfloat16, certified instead of by default", "openvino"),
    Tool("float16-torch", "quantizer", "FP16 on a GPU, layers that would overflow kept in float", "torch"),
    Tool("tf32-torch", "quantizer", "TF32 on a GPU, certified instead of by default", "torch"),
    Tool("float8-torch", "quantizer", "FP8 (e4m3) matrix products on a GPU of Hopper's generation, scales of powers of two", "torch"),
    Tool("int8-trained", "quantizer", "quantization-aware training in torch, exported as it was trained (rt.qat)", "torch"),
)
ANALYSES = (
    Tool("guard", "analysis", "the metric's drop with its interval, by slice; which layers do the harm"),
    Tool("saturation", "analysis", "16-bit sums that saturate on CPUs without VNNI, emulated and counted"),
    Tool("peaks", "analysis", "the largest magnitude of every tensor on the calibration set (overflow in half precision)"),
    Tool("cost", "analysis", "arithmetic and bytes of every operator, without running it"),
    Tool("memory", "analysis", "static memory plan: where every tensor lies, and the peak before loading"),
    Tool("profile", "analysis", "time of every operator and its share of the host's bound"),
    Tool("plan", "analysis", "every way to run the model here, timed in interleaved rounds"),
)


def tools() -> list[Tool]:
    """All of them; passes of other distributions included."""
    found = [Tool(one.name, "pass", one.summary, one.engine) for one in passes().values()]
    return [*found, *QUANTIZERS, *ANALYSES]
