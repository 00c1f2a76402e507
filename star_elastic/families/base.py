"""What a family table must provide, and how a config file is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from star_elastic.axes import LAYERS, AxisMap
from star_elastic.errors import ConfigError, ShapeError
from star_elastic.widths import Widths

Config = dict[str, Any]


class Family(Protocol):
    """One table per model family. Configs are dictionaries as in config.json."""

    model_type: str
    """`model_type` in config.json."""
    end_of_thinking: str
    """Text that ends the thinking phase when the budget is used up."""
    prefix_aliases: Mapping[str, str]
    """On-disk name prefixes that other writers use -> the prefix of our pieces."""
    ignored: tuple[str, ...]
    """Parts of the names of on-disk tensors that the model in memory does not have."""

    def axis_map(self, config: Config) -> AxisMap:
        """The axis map of the model of this config. Raises ConfigError on an invalid config."""
        ...

    def config_at(self, config: Config, widths: Mapping[str, Any]) -> Config:
        """The config.json of the submodel. Raises ShapeError if the format cannot express it."""
        ...


def read_config(path: str | Path) -> Config:
    """The config of a checkpoint directory or config.json file. Raises ConfigError."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"{path} holds no config.json; name a Hugging Face checkpoint directory or its config"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_hook=_decode_float)
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); restore the file") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is not a JSON object; it cannot be a model config")
    return config


def _decode_float(entry: dict[str, Any]) -> Any:
    """transformers stores infinities as {"__float__": "Infinity"}; older readers cannot."""
    return float(entry["__float__"]) if set(entry) == {"__float__"} else entry


def get_int(config: Config, key: str, default: int | None = None) -> int:
    """A positive integer field of a config. Raises ConfigError naming the field."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key}={value!r} is not a positive integer; correct config.json")
    return value


def get_optional_int(config: Config, key: str) -> int | None:
    """A positive integer field, or None where it is absent or null. Raises ConfigError."""
    return None if config.get(key) is None else get_int(config, key)


def get_float(config: Config, key: str, default: float) -> float:
    """A positive number. Raises ConfigError naming the field."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{key}={value!r} is not a positive number; correct config.json")
    return float(value)


def require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raises ConfigError unless `value` is a multiple of `divisor`."""
    if value % divisor:
        raise ConfigError(
            f"{name}={value} is not a multiple of {divisor_name}={divisor}; correct config.json"
        )


def homogeneous(widths: Mapping[str, Any], axis_map: AxisMap) -> dict[str, int]:
    """Widths as scalars, `layers` apart. Raises ShapeError for per-layer widths that a config
    cannot hold, with the nearest widths that it can."""
    nearest = nearest_homogeneous(widths, axis_map)
    for axis, width in widths.items():
        if axis != LAYERS and width != nearest[axis] and set(width) != {nearest[axis]}:
            kept = {name: value for name, value in nearest.items() if name != LAYERS}
            raise ShapeError(
                f"{axis} differs between layers, which {axis_map.family}'s config.json cannot "
                f"express; the nearest widths that it can: {Widths(kept)}"
            )
    return {axis: width for axis, width in nearest.items() if axis != LAYERS}


def nearest_homogeneous(widths: Mapping[str, Any], axis_map: AxisMap) -> dict[str, Any]:
    """One width per axis: of the widths that occur in the layers that are kept, the one nearest to
    their mean."""
    kept = axis_map.kept_layers(widths)
    nearest: dict[str, Any] = {}
    for name, width in widths.items():
        if name != LAYERS and isinstance(width, tuple):
            layers = axis_map.axes[name].layers
            values = [w for w, layer in zip(width, layers, strict=True) if layer in kept]
            mean = sum(values) / max(len(values), 1)
            width = min(values or width, key=lambda w: (abs(w - mean), -w))
        nearest[name] = width
    return nearest
