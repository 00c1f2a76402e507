"""config.json: reading it, and its fields one by one, each checked."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from star_elastic.errors import CheckpointError, ConfigError, library_boundary
from star_elastic.files.paths import exists, is_folder, require_content

Config = dict[str, Any]

LARGEST = 2**24
"""Most units that a dimension may have. No model comes near; a table of it could still be made."""
MOST_LAYERS = 2**10
MOST_EXPERTS = 2**18
"""Of all layers together: every expert is a tensor with a name of its own on disk."""
MOST_PARAMETERS = 10**14
ATTENTION_KEYS: Mapping[str, tuple[Any, ...]] = MappingProxyType({
    "sliding_window": (), "attention_chunk_size": (), "per_layer_config": ({}, []),
    "kv_sharing_modes": (), "is_causal": (True,), "number_of_conv_states": (1,),
    "text_config": (), "decoder": (), "generator": (), "text_encoder": (),
})  # fmt: skip
"""Keys of a config with their values that say nothing. transformers' caches and masks read them
whatever the model type is, but layers only where it knows the key (`Architecture.attention_keys`):
text that is generated with a cache would be another model's than the one that is trained."""
ADAPTER = "adapter_config.json"
"""What peft writes in place of a config.json."""
FULL = ("full_attention", "attention")
"""How a config names a layer that sees the whole text."""
NOT_BY_LAYER = re.compile(r"architectures|.*_token_ids?|.*_tokens|time_step_limit|mtp_.*")
"""Lists in a config that may be as long as there are layers and have nothing to do with them."""


def read_json_config(path: str | Path) -> Config:
    """The config of a checkpoint directory or config.json file, as it stands there.

    Raises ConfigError if there is none, or if it cannot be read; for a name of the Hub it says how
    to get the model here.
    """
    path = Path(path)
    try:
        file = path / "config.json" if is_folder(path) else path
        if file == path and file.suffix != ".json":
            raise ConfigError(not_a_directory(path))
        if exists(file):
            require_content(file)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    try:
        with library_boundary(f"{file} is not valid JSON", "restore the file", ConfigError):
            config = json.loads(file.read_text(encoding="utf-8"), object_hook=_decode_float)
    except ConfigError as error:
        if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            if exists(path / ADAPTER):
                raise ConfigError(
                    f"{path} holds an adapter and no model; merge it into its base model "
                    "(merge_and_unload of peft), and name that"
                ) from None
            raise ConfigError(
                f"{path} holds no config.json; name a Hugging Face checkpoint directory or its "
                "config"
            ) from None
        if isinstance(error.__cause__, OSError):
            raise ConfigError(
                f"{file} cannot be read ({error.__cause__.strerror}); allow it, or name another"
            ) from None
        raise
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is not a JSON object; it cannot be a model config")
    return config


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a model's name on the Hub: organisation/model."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def not_a_directory(path: Path) -> str:
    """What is wrong with a path that should be a checkpoint directory, and what to do."""
    if os.path.lexists(path):
        return f"{path} is a file; name the checkpoint directory that it lies in"
    advice = "name a Hugging Face checkpoint directory"
    if is_hub_name(str(path)):
        advice = (
            "models are read from local directories, so download it first: "
            f"hf download {path} --local-dir {path.name}"
        )
    return f"{path} is no directory here; {advice}"


def _decode_float(entry: dict[str, Any]) -> Any:
    """transformers stores infinities as {"__float__": "Infinity"}; older readers cannot."""
    return float(entry["__float__"]) if set(entry) == {"__float__"} else entry


def told(key: str, value: Any) -> str:
    """`key=value` in a message, however long the value is."""
    return f"{key}={reprlib.repr(value)}"


def one_name(config: Config, other: str, name: str) -> Config:
    """A config in which a field with two names has the second. Raises ConfigError for a field that
    stands there twice with two values."""
    named = {key: value for key, value in config.items() if key != other}
    value = config.get(other)
    if value is not None and named.setdefault(name, value) != value:
        raise ConfigError(
            f"{told(other, value)} and {told(name, named[name])} are one field of "
            f"{config.get('model_type')} with two values; remove one of them from config.json"
        )
    return named


def get_int(
    config: Config, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST
) -> int:
    """An integer field of a config from `least` to `most`. Raises ConfigError naming the field."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        needed = "a positive integer" if least == 1 else f"an integer of {least} or more"
        raise ConfigError(f"{told(key, value)} is not {needed}; correct config.json")
    if value > most:
        raise ConfigError(
            f"{told(key, value)} is more than the {most:,} that a model may have here; correct "
            "config.json"
        )
    return value


def get_optional_int(config: Config, key: str) -> int | None:
    """A positive integer field, or None where it is absent or null. Raises ConfigError."""
    return None if config.get(key) is None else get_int(config, key)


def get_float(config: Config, key: str, default: float) -> float:
    """A positive, finite number. Raises ConfigError naming the field."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{told(key, value)} is not a positive number; correct config.json")
    if value > LARGEST:
        raise ConfigError(f"{told(key, value)} is too large; correct config.json")
    return float(value)


def get_bool(config: Config, key: str, default: bool) -> bool:
    """A field that is true or false. Raises ConfigError naming the field."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{told(key, value)} is neither true nor false; correct config.json")
    return value


def without_nulls(config: Config, known: Collection[str]) -> Config:
    """A config without the keys that only caches and masks read (`ATTENTION_KEYS`) where they are
    null; those that are `known` to the model stay: null is not what they default to."""
    return {
        key: value
        for key, value in config.items()
        if value is not None or key in known or key not in ATTENTION_KEYS
    }


def require_known_attention(config: Config, known: Collection[str]) -> None:
    """Raises ConfigError for a key that would let caches or masks show layers another part of the
    text than layers know (`ATTENTION_KEYS`); those that are `known` to the model may."""
    for key, harmless in ATTENTION_KEYS.items():
        value = config.get(key)
        if (
            key not in known
            and value is not None
            and not any(value == own and type(value) is type(own) for own in harmless)
        ):
            raise ConfigError(
                f"{told(key, value)} is not known for model_type={config.get('model_type')}: "
                "caches would obey it, the layers do not; remove it from config.json"
            )


def cut_by_layer(config: Config, num_layers: int, kept: Collection[int]) -> Config:
    """A config whose lists with an entry for each of `num_layers` hold those of the kept ones."""
    return {
        key: [item for layer, item in enumerate(value) if layer in kept]
        if isinstance(value, list) and len(value) == num_layers and not NOT_BY_LAYER.fullmatch(key)
        else value
        for key, value in config.items()
    }


def require_at_most(name: str, value: int, limit_name: str, limit: int) -> None:
    """Raises ConfigError if `value` is more than `limit`."""
    if value > limit:
        raise ConfigError(f"{name}={value} exceeds {limit_name}={limit}; correct config.json")


def require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raises ConfigError unless `value` is a multiple of `divisor`."""
    if value % divisor:
        raise ConfigError(
            f"{name}={value} is not a multiple of {divisor_name}={divisor}; correct config.json"
        )


def require_full_layers(config: Config, num_layers: int) -> None:
    """Raises ConfigError for `layer_types` of which one does not see the whole text, or that are
    not as many as the layers."""
    layer_types = config.get("layer_types")
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or any(kind not in FULL for kind in layer_types):
        raise ConfigError(
            f"{told('layer_types', layer_types)} is not known for model_type="
            f"{config.get('model_type')}, whose layers all see the whole text: caches would obey "
            "it; remove it from config.json"
        )
    if len(layer_types) != num_layers:
        raise ConfigError(
            f"layer_types names {len(layer_types)} layers, num_hidden_layers={num_layers}; correct "
            "config.json"
        )
