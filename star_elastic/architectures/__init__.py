"""Architectures: one short file per model type, composed of parts.

An architecture reads a config as plain JSON data (no tensor library is imported), so that a model
can be counted and planned from its config.json alone. To add one, write its file and name it in
`ARCHITECTURES`; docs/architectures.md shows how.
"""

import reprlib

from star_elastic.architectures.config_file import read_config
from star_elastic.architectures.decoder import Architecture
from star_elastic.architectures.llama import Llama
from star_elastic.architectures.nemotron_h import NemotronH
from star_elastic.architectures.qwen3 import Qwen3
from star_elastic.errors import ConfigError

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture for architecture in (NemotronH(), Llama(), Qwen3())
}


def family_of(config: dict) -> Architecture:
    """The architecture of a config. Raises ConfigError if none serves its `model_type`."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ConfigError(
            f"model_type={reprlib.repr(model_type)} has no family table; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


__all__ = ["ARCHITECTURES", "Architecture", "family_of", "read_config"]
