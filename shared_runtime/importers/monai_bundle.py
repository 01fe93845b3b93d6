"""MONAI bundles: the network is rebuilt from `network_def`, its weights loaded, its preprocessing kept in the card.

A bundle's configuration may hold Python expressions and any class; here only literals, references to literals and
networks of `monai.networks.nets` are followed, so that opening a bundle runs none of its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.importers.base import Imported, needs
from shared_runtime.importers.trained import described_in, load_weights, read_json, read_weights

CONFIGS = ("inference.json", "inference.yaml", "inference.yml", "train.json", "train.yaml", "evaluate.json")
SMALLEST = 32


class MonaiBundleImporter:
    """Bundle folders: `configs/metadata.json`, `configs/inference.json`, `models/model.pt`."""

    name, requires = "monai-bundle", "monai, torch and onnxscript"

    def takes(self, source: Any) -> bool:
        return isinstance(source, Path) and source.is_dir() and (source / "configs" / "metadata.json").is_file()

    def load(self, source: Any, example: Mapping[str, Any] | None) -> Imported:
        needs("torch", "a MONAI bundle")
        needs("monai", "a MONAI bundle")
        from shared_runtime.importers.torch_module import from_module

        about = source / "configs" / "metadata.json"
        config, metadata = _config(source), read_json(about)
        network = _network(config)
        weights = source / "models" / "model.pt"
        if not weights.is_file():
            raise UnsupportedModelError(f"the bundle {source.name} has no models/model.pt (TorchScript, model.ts, is refused); restore it")
        state = read_weights(weights)
        load_weights(network, state.get("model", state.get("state_dict", state)), f"{source.name}/models/{weights.name}")
        with described_in(about):
            formats = metadata.get("network_data_format", {})
            inputs: dict[str, dict[str, Any]] = formats.get("inputs", {})
            outputs = tuple(formats.get("outputs", {}))[:1]
            name, facts = next(iter(inputs.items()), ("image", {}))
            shape = (1, int(facts.get("num_channels", 1)), *_sizes(facts))
        if example is None:
            example = {name: np.random.default_rng(0).standard_normal(shape, np.float32)}
        imported = from_module(network, example, "monai bundle", outputs)
        imported.card |= {
            "bundle": {key: metadata.get(key) for key in ("version", "monai_version", "description", "copyright") if metadata.get(key)},
            "preprocessing": {"transforms": config.get("preprocessing", {}), "inputs": inputs},
        }
        return imported


def _config(source: Path) -> dict[str, Any]:
    path = next((source / "configs" / name for name in CONFIGS if (source / "configs" / name).is_file()), None)
    if path is None:
        raise UnsupportedModelError(f"the bundle {source.name} has none of configs/{{{', '.join(CONFIGS)}}}")
    if path.suffix == ".json":
        found: Any = read_json(path)
    else:
        yaml = needs("yaml", "a bundle with a YAML configuration")
        try:
            found = yaml.safe_load(path.read_text())
        except (ValueError, yaml.YAMLError) as error:
            raise UnsupportedModelError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}; restore it") from error
    if not isinstance(found, dict) or not isinstance(found.get("network_def"), dict):
        raise UnsupportedModelError(f"{path} has no network_def, from which the network could be rebuilt")
    return found


def _network(config: dict[str, Any]) -> Any:
    import monai
    from monai.networks import nets

    wanted = {key: _resolve(value, config, f"network_def.{key}") for key, value in config["network_def"].items()}
    target = str(wanted.pop("_target_", ""))
    module, _, name = target.rpartition(".")
    found = getattr(nets, name, None)
    if (module and not module.startswith("monai.networks.nets")) or not isinstance(found, type):
        raise UnsupportedModelError(
            f"the bundle's network {target!r} is not one of monai.networks.nets; build it in Python and pass the module"
        )
    arguments = {key: value for key, value in wanted.items() if not key.startswith("_")}
    try:
        return found(**arguments)
    except Exception as error:  # networks check their arguments, and what they need, in ways of their own
        said = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(
            f"MONAI {monai.__version__} can't build the bundle's {name}: {type(error).__name__}: {said}; "
            "correct its network_def, or install what is missing"
        ) from error


def _resolve(value: Any, config: dict[str, Any], place: str, depth: int = 0) -> Any:
    """Literals and references to literals; an expression is refused."""
    if depth > 20:
        raise UnsupportedModelError(f"{place} refers to itself")
    if isinstance(value, dict):
        return {key: _resolve(item, config, f"{place}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, config, place, depth + 1) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("@"):
        target: Any = config
        for part in value[1:].replace("#", "::").split("::"):
            key: Any = int(part) if isinstance(target, list) and part.isdigit() else part
            if key not in (range(len(target)) if isinstance(target, list) else target):
                raise UnsupportedModelError(f"{place} refers to {value!r}, which the configuration does not hold")
            target = target[key]
        return _resolve(target, config, place, depth + 1)
    if value.startswith(("$", "%")):
        raise UnsupportedModelError(f"{place} is the expression {value!r}; bundles' expressions are not run: write its value instead")
    return value


def _sizes(facts: Mapping[str, Any]) -> list[int]:
    """The spatial shape; a size that is a pattern ("16*n", "*") becomes the smallest sensible one."""
    return [size if isinstance(size, int) else SMALLEST for size in facts.get("spatial_shape", [SMALLEST] * 3)]
