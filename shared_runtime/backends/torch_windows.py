"""ONNX operators that move windows over pictures, cut, pad and resize them, as torch calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from shared_runtime.errors import UnsupportedModelError

Attributes = Mapping[str, Any]
Operator = Callable[[list[Any], Attributes], Tensor]


def ints(value: Any) -> list[int]:
    """Shapes, axes and indices, which stay on the host."""
    return value if isinstance(value, list) else value.reshape(-1).tolist()


def _pads(attributes: Attributes, shape: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """How much is added before and after each axis of a picture of `shape`."""
    rank, auto = len(kernel), attributes.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
        windows = zip(shape, kernel, strides, dilations, strict=True)
        total = [max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size) for size, k, stride, dilation in windows]
        less, more = [n // 2 for n in total], [n - n // 2 for n in total]
        return (less, more) if auto == "SAME_UPPER" else (more, less)
    pads = [0] * (2 * rank) if auto == "VALID" else list(attributes.get("pads", [0] * (2 * rank)))
    return pads[:rank], pads[rank:]


def _padded(x: Tensor, before: list[int], after: list[int], fill: float = 0.0) -> Tensor:
    pairs = [value for axis in reversed(range(len(before))) for value in (before[axis], after[axis])]
    return functional.pad(x, pairs, value=fill) if any(pairs) else x


def convolution(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, weight, bias = [*inputs, None][:3]
    rank = weight.dim() - 2
    call = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    return call(
        _padded(x, *_pads(attributes, tuple(x.shape[2:]), tuple(weight.shape[2:]))),
        weight,
        bias,
        stride=attributes.get("strides", [1] * rank),
        dilation=attributes.get("dilations", [1] * rank),
        groups=attributes.get("group", 1),
    )


def transposed_convolution(inputs: list[Any], attributes: Attributes) -> Tensor:
    """Where the pads before and after differ, or the output's size says what they are, the whole is computed and cut."""
    x, weight, bias = [*inputs, None][:3]
    rank = weight.dim() - 2
    strides, dilations, more = (attributes.get(name, [n] * rank) for name, n in (("strides", 1), ("dilations", 1), ("output_padding", 0)))
    auto, sizes = attributes.get("auto_pad", "NOTSET"), attributes.get("output_shape")
    if auto in ("SAME_UPPER", "SAME_LOWER") and sizes is None:
        sizes = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if sizes is not None:
        spans = zip(x.shape[2:], weight.shape[2:], strides, dilations, more, sizes[-rank:], strict=True)
        total = [(size - 1) * stride + (k - 1) * dilation + 1 + extra - want for size, k, stride, dilation, extra, want in spans]
        if min(total) < 0:
            raise UnsupportedModelError(f"ConvTranspose with an output_shape of {list(sizes)}, larger than its windows reach")
        less, rest = [n // 2 for n in total], [n - n // 2 for n in total]
        before, after = (less, rest) if auto == "SAME_UPPER" else (rest, less)
    else:
        before, after = _pads({**attributes, "auto_pad": "NOTSET"}, (), tuple(weight.shape[2:]))
    call = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
    even = before == after
    result = call(
        x,
        weight,
        bias,
        stride=strides,
        padding=before if even else 0,
        output_padding=more,
        groups=attributes.get("group", 1),
        dilation=dilations,
    )
    return result if even else _padded(result, [-n for n in before], [-n for n in after])


def pooling(calls: tuple[Any, Any, Any], average: bool) -> Operator:
    """The maximum or mean of windows. The mean leaves out what is padded, as far as it is not to be counted."""

    def run(inputs: list[Any], attributes: Attributes) -> Tensor:
        x, kernel = inputs[0], tuple(attributes["kernel_shape"])
        rank, shape = len(kernel), tuple(inputs[0].shape[2:])
        strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
        if average and set(dilations) != {1}:
            raise UnsupportedModelError("dilated averages")
        before, after = _pads(attributes, shape, kernel)
        beyond = [0] * rank
        if attributes.get("ceil_mode", 0):
            for axis in range(rank):
                size, reach = shape[axis] + before[axis] + after[axis], (kernel[axis] - 1) * dilations[axis] + 1
                windows = -(-(size - reach) // strides[axis]) + 1
                windows -= (windows - 1) * strides[axis] >= shape[axis] + before[axis]
                beyond[axis] = max(0, (windows - 1) * strides[axis] + reach - size)
        ends, none = [a + b for a, b in zip(after, beyond, strict=True)], [0] * rank
        call = calls[rank - 1]
        if not average:
            result: Tensor = call(_padded(x, before, ends, float("-inf")), kernel, stride=strides, dilation=dilations)
            return result
        mean: Tensor = call(_padded(x, before, ends), kernel, stride=strides)
        counted = bool(attributes.get("count_include_pad", 0))
        if not any(beyond) and (counted or not any((*before, *after))):
            return mean
        there = _padded(torch.ones_like(x[:1, :1]), before, after, float(counted))
        share: Tensor = call(_padded(there, none, beyond), kernel, stride=strides)
        return mean / share

    return run


def cut(inputs: list[Any], attributes: Attributes) -> Tensor:
    """Slice."""
    x, starts, ends, axes, steps = [*inputs, None, None, None, None][:5]
    starts, ends = ints(attributes["starts"] if starts is None else starts), ints(attributes["ends"] if ends is None else ends)
    axes = ints(axes) if axes is not None else attributes.get("axes", list(range(len(starts))))
    steps = ints(steps) if steps is not None else [1] * len(starts)
    index: list[slice] = [slice(None)] * x.dim()
    backwards = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            backwards.append((axis, range(*slice(start, end, step).indices(x.shape[axis]))))
        else:
            size = x.shape[axis]  # exporters write the least and the largest number of 64 bits for "from the first" and "to the last"
            index[axis % x.dim()] = slice(max(min(start, size), -size), max(min(end, size), -size), step)
    result = x[tuple(index)]
    for axis, places in backwards:
        taken = torch.arange(len(places), device=x.device) * places.step + places.start
        result = result.index_select(axis, taken)
    return result


def pad(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, mode = inputs[0], attributes.get("mode", "constant")
    pads = ints(inputs[1]) if len(inputs) > 1 else list(attributes["pads"])
    fill = ints(inputs[2])[0] if len(inputs) > 2 and inputs[2] is not None else attributes.get("value", 0.0)
    if mode not in ("constant", "reflect", "edge"):
        raise UnsupportedModelError(f"Pad with mode {mode!r}")
    axes = [axis % x.dim() for axis in ints(inputs[3])] if len(inputs) > 3 and inputs[3] is not None else list(range(x.dim()))
    ends = {axis: (pads[place], pads[place + len(axes)]) for place, axis in enumerate(axes)}
    pairs = [value for axis in reversed(range(x.dim())) for value in ends.get(axis, (0, 0))]
    if mode == "constant":
        return functional.pad(x, pairs, value=fill)
    while pairs[-2:] == [0, 0]:
        del pairs[-2:]
    return functional.pad(x, pairs, mode={"reflect": "reflect", "edge": "replicate"}[mode])


def resize(inputs: list[Any], attributes: Attributes) -> Tensor:
    """Resize, and Upsample as it was called before."""
    if attributes.get("opset", 11) < 11:  # where the coordinates were not told
        attributes = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", **attributes}
    x, given = inputs[0], inputs[1:]
    sizes = given[2] if len(given) > 2 else None
    scales = attributes.get("scales") if not given else given[0] if len(given) == 1 else given[1]
    mode, place = attributes.get("mode", "nearest"), attributes.get("coordinate_transformation_mode", "half_pixel")
    odd = [name for name in ("antialias", "exclude_outside", "axes") if attributes.get(name)]
    if odd or attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise UnsupportedModelError(f"Resize with {', '.join(odd) or 'a policy of its own'}")
    if sizes is not None:
        target, factors = ints(sizes)[2:], None
    else:
        factors = ints(scales)[2:]
        target = [int(size * factor) for size, factor in zip(x.shape[2:], factors, strict=True)]
    ratios = factors or [want / have for want, have in zip(target, x.shape[2:], strict=True)]
    smooth = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}.get(
        (mode, x.dim() - 2)
    )
    if smooth and place in ("half_pixel", "align_corners") and attributes.get("cubic_coeff_a", -0.75) == -0.75:
        exact = all(size * factor == want for size, factor, want in zip(x.shape[2:], ratios, target, strict=True))
        if exact or factors is None:
            return functional.interpolate(x, target, mode=smooth, align_corners=place == "align_corners")
    if mode not in ("nearest", "linear") or place not in PLACES:
        raise UnsupportedModelError(f"Resize with mode {mode!r} and {place!r}")
    for axis, (want, ratio) in enumerate(zip(target, ratios, strict=True), 2):
        if want != x.shape[axis] or ratio != 1:
            x = _resized(x, axis, want, ratio, mode, place, attributes.get("nearest_mode", "round_prefer_floor"))
    return x


PLACES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")


def _resized(x: Tensor, axis: int, want: int, ratio: float, mode: str, place: str, rounding: str) -> Tensor:
    """One axis to another size, by the coordinates of ONNX's definition, in float32 as ONNX Runtime has them."""
    size, new = x.shape[axis], torch.arange(want, device=x.device, dtype=torch.float32)
    if place == "align_corners":
        old = new * (size - 1) / max(1, want - 1)
    elif place == "asymmetric":
        old = new / ratio
    else:
        old = new * 0 if place == "pytorch_half_pixel" and want == 1 else (new + 0.5) / ratio - 0.5
    if mode == "nearest":
        rounds = {
            "round_prefer_floor": lambda v: torch.ceil(v - 0.5),
            "round_prefer_ceil": lambda v: torch.floor(v + 0.5),
            "floor": torch.floor,
            "ceil": torch.ceil,
        }
        return x.index_select(axis, rounds[rounding](old).long().clamp(0, size - 1))
    old = old.clamp(0, size - 1)
    low = old.floor().long()
    share = (old - low).to(x.dtype).reshape([-1 if at == axis else 1 for at in range(x.dim())])
    return x.index_select(axis, low) * (1 - share) + x.index_select(axis, (low + 1).clamp(max=size - 1)) * share


def depth_to_space(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, block = inputs[0], attributes["blocksize"]
    rows, channels, height, width = x.shape
    if attributes.get("mode", "DCR") == "DCR":
        parts = x.reshape(rows, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(rows, channels // block**2, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(rows, channels // block**2, height * block, width * block)


def space_to_depth(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, block = inputs[0], attributes["blocksize"]
    rows, channels, height, width = x.shape
    parts = x.reshape(rows, channels, height // block, block, width // block, block).permute(
        *((0, 3, 5, 1, 2, 4) if attributes.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4))
    )
    return parts.reshape(rows, channels * block**2, height // block, width // block)
