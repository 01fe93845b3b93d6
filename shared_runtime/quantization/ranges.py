"""Ranges of a graph's tensors over a calibration set, by ONNX Runtime's calibrators, for tensors of any width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.quantization.samples import SampleStore

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
"""What ONNX Runtime calls them."""
WIDEST = 1e6
"""Beyond this lie masks (-1e9, -inf), not measurements: 255 steps over such a range leave nothing of what is masked."""
ENDLESS = 1e30
"""From here on a tensor counts as endless, as do infinities and NaN: steps over such a range are no numbers of use."""
MOST_WIDER = 16
"""A histogram that has to reach so many times as far as with its first bins gets wider ones."""


@dataclass(frozen=True)
class Ranges:
    """What was measured: `data` as ONNX Runtime's quantizers take it; tensors beyond WIDEST, and those of them that are endless."""

    data: Any
    wide: frozenset[str]
    endless: frozenset[str]

    def unfit(self, graph: onnx.GraphProto, layers: frozenset[str]) -> frozenset[str]:
        """The names of the nodes that can't be quantized: between layers those that touch a wide tensor, layers only an endless one."""
        huge = {item.name for item in graph.initializer if _is_float(item) and not _bound(onnx.numpy_helper.to_array(item)) < WIDEST}
        wide = self.wide | huge
        return frozenset(
            node.name for node in graph.node if not (self.endless if node.name in layers else wide).isdisjoint((*node.input, *node.output))
        )


def measure_ranges(path: Path, samples: SampleStore, method: str, folder: Path) -> Ranges:
    """Run the calibration set through the graph in `path`, in bounded memory; `folder` holds what lies between.

    Raises UnsupportedModelError for an unknown method; what ONNX Runtime raises passes through.
    """
    from onnxruntime.quantization import CalibrationMethod, create_calibrator
    from onnxruntime.quantization.calibrate import HistogramCollector, TensorsData
    from onnxruntime.quantization.registry import QDQRegistry

    if method not in METHODS:
        raise UnsupportedModelError(f"unknown calibration {method!r}; expected one of {', '.join(METHODS)}")
    kind = CalibrationMethod[METHODS[method]]
    bounds: dict[str, float] = {}

    class Collector(HistogramCollector):  # type: ignore[misc]
        """Leaves out endless tensors, which have no histogram, and keeps the number of bins small: ONNX Runtime's adds bins of the
        first sample's width until the widest sample fits, a thousand million of them where the first was nearly blank."""

        def collect(self, name_to_arr: dict[str, Any]) -> None:
            for name, arrays in name_to_arr.items():
                bound = _bound(np.asarray(arrays))
                bounds[name] = max(bounds.get(name, 0.0), bound if bound < ENDLESS else np.inf)
                if not bound < ENDLESS:
                    continue
                before = self.histogram_dict.get(name)
                if before is not None and bound > MOST_WIDER * self.num_bins * (before[1][1] - before[1][0]) > 0:
                    self.histogram_dict[name] = self._wider(before, bound)
                super().collect({name: arrays})

        def _wider(self, before: tuple[Any, ...], bound: float) -> tuple[Any, ...]:
            """The same counts in bins that reach as far as `bound`."""
            counts, edges, low, high, *threshold = before
            ends = (0.0 if self.symmetric else -bound, bound)
            wider = np.linspace(*ends, self.num_bins + 1, dtype=edges.dtype)
            middles = np.abs(edges[:-1] + edges[1:]) / 2 if self.symmetric else (edges[:-1] + edges[1:]) / 2
            moved = np.histogram(middles, wider, weights=counts)[0].astype(counts.dtype)
            return (moved, wider, low, high, *(np.array(bound, edges.dtype) for _ in threshold))

    calibrator = create_calibrator(
        path, op_types_to_calibrate=list(QDQRegistry), augmented_model_path=str(folder / "augmented.onnx"), calibrate_method=kind
    )
    if method != "minmax":
        asked = ("method", "symmetric", "num_bins", "num_quantized_bins", "percentile", "scenario")
        calibrator.collector = Collector(**{name: getattr(calibrator, name) for name in asked})
    for inputs in samples:
        # One sample a call: what the calibrator keeps between calls is ranges and histograms, not tensors.
        calibrator.collect_data(_Reader([inputs]))
    found = calibrator.compute_data()
    if method == "minmax":
        bounds = {name: _bound(np.stack(item.range_value)) for name, item in found.items()}
    wide = frozenset(name for name, bound in bounds.items() if not bound < WIDEST)
    endless = frozenset(name for name in wide if not bounds[name] < ENDLESS)
    return Ranges(TensorsData(kind, {name: item for name, item in found.items() if name not in endless}), wide, endless)


class _Reader:
    """The calibration set as ONNX Runtime reads it: one sample at a time from disk."""

    def __init__(self, samples: Iterable[Any]) -> None:
        self._samples: Iterator[Any] = iter(samples)

    def get_next(self) -> Any:
        return next(self._samples, None)


def _bound(values: np.ndarray) -> float:
    """The largest magnitude; NaN where there is one."""
    return float(np.abs(values).max(initial=0.0)) if values.size else 0.0


def _is_float(item: onnx.TensorProto) -> bool:
    return item.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
