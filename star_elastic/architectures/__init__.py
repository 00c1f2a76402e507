"""Architectures: one short file per model type, composed of parts.

An architecture reads a config as plain JSON data (no tensor library is imported), so that a model
can be counted and planned from its config.json alone. To add one, write its file and name it in
`model.py`; docs/architectures.md shows how.
"""

from star_elastic.architectures.decoder import Architecture
from star_elastic.architectures.model import (
    ARCHITECTURES,
    ModelConfig,
    architecture_of,
    read_config,
)

__all__ = [
    "ARCHITECTURES", "Architecture", "ModelConfig", "architecture_of", "read_config",
]  # fmt: skip
