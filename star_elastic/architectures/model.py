"""The model read: a config, its architecture and its axis map, derived once and passed on."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from star_elastic.architectures.config_file import Config, read_json_config, without_nulls
from star_elastic.architectures.decoder import Architecture
from star_elastic.architectures.gemma3_text import Gemma3Text
from star_elastic.architectures.gpt_oss import GptOss
from star_elastic.architectures.llama import Llama
from star_elastic.architectures.mistral import Mistral
from star_elastic.architectures.nemotron_h import NemotronH
from star_elastic.architectures.qwen2 import Qwen2
from star_elastic.architectures.qwen3 import Qwen3
from star_elastic.architectures.qwen3_moe import Qwen3Moe
from star_elastic.architectures.smollm3 import SmolLM3
from star_elastic.axes import AxisMap
from star_elastic.errors import ConfigError

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        NemotronH(), Gemma3Text(), GptOss(), Llama(), Mistral(), Qwen2(), Qwen3(), Qwen3Moe(),
        SmolLM3(),
    )
}  # fmt: skip
"""Every model type that is served. To add one, write its file and name it here."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config. Raises ConfigError if none serves its `model_type`."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ConfigError(
            f"model_type={reprlib.repr(model_type)} is not served; supported: "
            f"{', '.join(ARCHITECTURES)}; docs/architectures.md shows how to add one"
        )
    return ARCHITECTURES[model_type]


class ModelConfig(dict[str, Any]):
    """A config as config.json holds it, and what follows from it. It is not changed once read.

    What follows is derived when it is first asked for: only then is ConfigError raised for a model
    that no architecture serves, or that is invalid.
    """

    @classmethod
    def of(cls, config: Config) -> ModelConfig:
        """A plain config as one of these; one of these as it is."""
        return config if isinstance(config, cls) else cls(config)

    @cached_property
    def architecture(self) -> Architecture:
        """Of its `model_type`."""
        return architecture_of(self)

    @cached_property
    def axis_map(self) -> AxisMap:
        """What every dimension of every tensor of the model is."""
        return self.architecture.axis_map(self)

    def at(self, widths: Mapping[str, Any]) -> ModelConfig:
        """The config of the submodel at `widths`. Raises ShapeError if none can express it."""
        return ModelConfig(self.architecture.config_at(self, widths, self.axis_map))


def read_config(path: str | Path) -> ModelConfig:
    """The config of a checkpoint directory or config.json file. Raises ConfigError if there is none
    or it cannot be read; for a name of the Hub it says how to get the model here."""
    config = read_json_config(path)
    model_type = config.get("model_type")
    served = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    return ModelConfig(without_nulls(config, served.attention_keys if served else ()))
