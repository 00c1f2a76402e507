"""One table per model family: axis map, config rewriting, on-disk names.

A family reads a config as plain JSON data (no tensor library is imported), so that a model can be
counted and planned from its config.json alone.
"""

import reprlib

from star_elastic.architectures.base import Family, read_config
from star_elastic.architectures.llama import Llama
from star_elastic.architectures.nemotron_h import NemotronH

FAMILIES: dict[str, Family] = {family.model_type: family for family in (NemotronH(), Llama())}


def family_of(config: dict) -> Family:
    """The family of a config. Raises ConfigError if none serves its `model_type`."""
    from star_elastic.errors import ConfigError

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model_type={reprlib.repr(model_type)} has no family table; supported: "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "family_of", "read_config"]
