"""Qwen3: a norm over each query and key head, whose width is not tied to the hidden size.

These norms have `head_dim` channels, which no axis cuts: nothing has to be corrected.
"""

from __future__ import annotations

from star_elastic.architectures.config_file import Config
from star_elastic.architectures.pre_norm import PreNorm
from star_elastic.architectures.qwen2 import Qwen2


class Qwen3(Qwen2):
    """The `qwen3` architecture. Defaults are those of transformers' Qwen3Config."""

    model_type = "qwen3"
    head_size = 128
    head_norms = ("q_norm", "k_norm")

    def biases(self, config: Config) -> tuple[bool, bool]:
        """See `PreNorm.biases`."""
        return PreNorm.biases(self, config)
